//! Scores as tables.

use super::results::{Results, Value};

/// The paper's results for 1.96b 8c1 after 160 billion tokens (arXiv 2504.12463): the average score of 13 tasks, and the
/// average improvement of 12.
const PAPER: [(&str, f64, f64); 2] = [("paper, topk", 46.9, 52.3), ("paper, default", 47.9, 54.9)];

/// Formats `mean ± standard error`, in percent.
fn percent(v: &Value) -> String {
    match v.standard_error {
        Some(error) => format!("{:.2} ± {:.2}", 100.0 * v.mean, 100.0 * error),
        None => format!("{:.2}", 100.0 * v.mean),
    }
}

/// Formats a number with these decimal places; a dash if there is none.
fn shown(value: Option<f64>, places: usize) -> String {
    value.map_or("–".into(), |v| format!("{v:.places$}"))
}

/// Formats an average in percent.
fn average(value: Option<f64>) -> String {
    value.map_or("–".into(), |v| format!("{v:.1}%"))
}

impl Results {
    /// Returns a table of every score, followed by the averages next to the paper's.
    pub fn table(&self) -> String {
        let mut lines = vec![format!(
            "{:<14} {:>9} {:>15} {:>15} {:>9} {:>12} {:>9}",
            "task", "questions", "acc %", "acc_norm %", "guessing", "improvement", "cut off"
        )];
        for s in &self.scores {
            lines.push(format!(
                "{:<14} {:>9} {:>15} {:>15} {:>9.0} {:>11.1}% {:>8.1}%",
                s.task,
                s.questions,
                percent(&s.acc),
                s.acc_norm.as_ref().map(percent).unwrap_or_default(),
                s.baseline,
                s.improvement(),
                100.0 * s.truncated
            ));
            if let Some(p) = s.perplexity {
                let error = p.standard_error.map(|e| format!(" ± {e:.2}"));
                let error = error.unwrap_or_default();
                lines.push(format!("{:<14} perplexity {:.2}{error}", "", p.mean));
            }
        }
        self.ended(lines)
    }

    /// Returns the lines of a table, followed by the averages next to the paper's and the speed.
    fn ended(&self, mut lines: Vec<String>) -> String {
        lines.extend([String::new(), self.beside_the_paper(), self.speed()]);
        lines.join("\n")
    }

    fn beside_the_paper(&self) -> String {
        let [score, improvement] = self.averages();
        let row = |name: &str, score: Option<f64>, improvement: Option<f64>, of: &str| {
            let (score, improvement) = (average(score), average(improvement));
            format!("{name:<14} {score:>16} {improvement:>25}  {of}")
        };
        let mut lines = vec![format!(
            "{:<14} {:>16} {:>25}",
            "average", "of scores", "improvement, no LAMBADA"
        )];
        let tasks = match self.scores.len() {
            1 => "1 task".to_owned(),
            n => format!("{n} tasks"),
        };
        lines.push(row("this model", score, improvement, &tasks));
        let of = "13 tasks; 1.96b 8c1, 160B tokens";
        lines.extend(
            PAPER.map(|(name, score, improvement)| row(name, Some(score), Some(improvement), of)),
        );
        lines.join("\n")
    }

    fn speed(&self) -> String {
        format!(
            "{} tokens in {:.1} s, {:.0} tokens/s; {:.2} times as many without shared beginnings",
            self.tokens,
            self.seconds,
            self.tokens as f64 / self.seconds,
            self.unshared_tokens as f64 / self.tokens.max(1) as f64
        )
    }

    /// Returns a line with the averages.
    pub fn summary(&self) -> String {
        let [score, improvement] = self.averages().map(average);
        let (tasks, seconds) = (self.scores.len(), self.seconds);
        format!(
            "average of {tasks} benchmarks {score}, improvement {improvement}, in {seconds:.1} s"
        )
    }

    /// Compares these scores with those of `other` for the same questions: a table with the mean difference over the
    /// questions and its standard error.
    pub fn compared(&self, name: &str, other: &Results, other_name: &str) -> String {
        let row = |task: &str,
                   questions: &str,
                   [a, b, difference]: [String; 3],
                   improvement: &str| {
            format!("{task:<14} {questions:>9} {a:>18} {b:>18} {difference:>16} {improvement:>25}")
        };
        let names = [
            format!("{name} %"),
            format!("{other_name} %"),
            "difference".into(),
        ];
        let mut lines = vec![row("task", "questions", names, "improvement %")];
        for (a, b) in self.scores.iter().zip(&other.scores) {
            let of = |right: &[f64]| percent(&Value::of(right.iter().copied()));
            let pairs: Vec<f64> = a.right.iter().zip(&b.right).map(|(a, b)| a - b).collect();
            let numbers = [&a.right, &b.right, &pairs].map(|right| of(right));
            let improvement = format!("{:.1}, {:.1}", a.improvement(), b.improvement());
            lines.push(row(a.task, &a.questions.to_string(), numbers, &improvement));
            if let (Some(p), Some(q)) = (a.perplexity, b.perplexity) {
                let numbers = [p.mean, q.mean, p.mean - q.mean].map(|x| format!("{x:.2}"));
                lines.push(row("", "perplexity", numbers, "").trim_end().into());
            }
        }
        let ([score, improvement], [other_score, other_improvement]) =
            (self.averages(), other.averages());
        let difference = score.zip(other_score).map(|(a, b)| a - b);
        let numbers = [score, other_score, difference].map(|x| shown(x, 2));
        let improvements = [improvement, other_improvement].map(|x| shown(x, 1));
        lines.push(row("average", "", numbers, &improvements.join(", ")));
        self.ended(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::super::question::{behind, find};
    use super::super::results::{Answer, Score};
    use super::*;

    /// Returns the scores of four questions with two answers each, answered correctly where `right` is true.
    fn results(right: [bool; 4]) -> Results {
        of_task("piqa", right)
    }

    fn of_task(task: &str, right: [bool; 4]) -> Results {
        let question = behind("", &["a", "b"], 1);
        let likelihoods = |right| match right {
            true => vec![-2.0, -1.0],
            false => vec![-1.0, -2.0],
        };
        let answers = right.map(|r| Answer::new(0.into(), &question, likelihoods(r), false, false));
        Results {
            scores: vec![Score::of(find(task).unwrap(), &answers)],
            ..Results::default()
        }
    }

    #[test]
    fn the_difference_of_two_models_is_that_of_each_question() {
        let a = results([true, true, true, false]);
        let b = results([true, true, false, true]);
        let table = a.compared("with", &b, "without");
        let line = table.lines().find(|l| l.starts_with("piqa")).unwrap();
        // The means are equal; for the differences 0, 0, 1, −1 the standard error is √(2/3/4).
        assert!(
            line.contains("75.00 ± 25.00") && line.contains("0.00 ± 40.82"),
            "{table}"
        );
        assert!(line.contains("50.0, 50.0"), "{table}");
    }

    #[test]
    fn the_papers_averages_are_next_to_ours() {
        let table = results([true; 4]).table();
        let line = |start: &str| table.lines().find(|l| l.starts_with(start)).unwrap();
        // From 50% by guessing to 100%.
        assert!(line("this model").contains("100.0%") && line("this model").contains("1 task"));
        assert!(line("paper, topk").contains("46.9%") && line("paper, default").contains("54.9%"));
    }

    #[test]
    fn an_average_of_no_benchmark_is_a_dash() {
        let lambada = of_task("lambada_openai", [true, true, true, false]);
        let compared = lambada.compared("with", &lambada, "without");
        for text in [lambada.table(), compared] {
            let line = text.lines().find(|l| l.starts_with("this model")).unwrap();
            assert!(line.contains(" –  1 task"), "{text}");
        }
        assert!(lambada.summary().contains("improvement –,"));
    }
}
