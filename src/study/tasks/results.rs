//! Scores of answered questions.

use super::question::{Question, Task};
use crate::study::moments;
use serde::Serialize;
use std::collections::BTreeMap;

/// The model's result for one question.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Number of the document in its file.
    pub doc_id: serde_json::Value,
    /// Log-likelihood of each answer, in nats.
    pub log_likelihoods: Vec<f64>,
    /// For a last word: whether every token of it is the most likely one.
    pub likeliest: bool,
    /// Index of the right answer.
    pub gold: usize,
    /// Index of the answer with the largest log-likelihood, which `acc` uses.
    pub chosen: usize,
    /// Index of the answer with the largest log-likelihood per character, which `acc_norm` uses.
    pub chosen_normalized: usize,
    /// Whether the beginning of a prompt was cut off.
    pub truncated: bool,
}

impl Answer {
    /// Selects the answers for `acc` and `acc_norm`. For `likeliest` and `truncated` see the fields.
    pub fn new(
        doc_id: serde_json::Value,
        question: &Question,
        log_likelihoods: Vec<f64>,
        likeliest: bool,
        truncated: bool,
    ) -> Self {
        let pairs = log_likelihoods.iter().zip(&question.lengths);
        let normalized: Vec<f64> = pairs.map(|(l, n)| l / *n as f64).collect();
        Answer {
            doc_id,
            likeliest,
            gold: question.gold,
            chosen: largest(&log_likelihoods),
            chosen_normalized: largest(&normalized),
            log_likelihoods,
            truncated,
        }
    }
}

/// Returns the index of the largest value; the first if several are equal.
fn largest(values: &[f64]) -> usize {
    let better = |best: usize, i: usize| if values[i] > values[best] { i } else { best };
    (0..values.len()).fold(0, better)
}

/// A mean and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Value {
    /// The mean.
    pub mean: f64,
    /// Standard error of the mean; `None` for a single question.
    pub standard_error: Option<f64>,
}

impl Value {
    /// The mean and standard error of at least one number.
    pub fn of(values: impl ExactSizeIterator<Item = f64> + Clone) -> Self {
        let n = values.len() as f64;
        let (mean, squares) = moments(values);
        Value {
            mean,
            standard_error: (n > 1.0).then(|| (squares / (n - 1.0) / n).sqrt()),
        }
    }
}

/// The scores of one task.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    /// Name of the benchmark.
    pub task: &'static str,
    /// Number of questions.
    pub questions: usize,
    /// Share of questions answered correctly, by log-likelihood.
    pub acc: Value,
    /// Share of questions answered correctly, by log-likelihood per character, if the harness computes it.
    pub acc_norm: Option<Value>,
    /// Perplexity of the last word.
    pub perplexity: Option<Value>,
    /// Score of random guessing, in percent.
    pub baseline: f64,
    /// Share of the questions whose prompt was cut off at the beginning.
    pub truncated: f64,
    /// For each question, in order: 1 if the headline score counts it as correct, otherwise 0.
    #[serde(skip)]
    pub right: Vec<f64>,
}

impl Score {
    /// Computes the scores from at least one answer.
    pub fn of(task: &Task, answers: &[Answer]) -> Self {
        let values = |right: &dyn Fn(&Answer) -> bool| -> Vec<f64> {
            let right = answers.iter().map(|a| u8::from(right(a)));
            right.map(f64::from).collect()
        };
        let mean = |values: &[f64]| Value::of(values.iter().copied());
        let acc = match task.last_word {
            true => values(&|a| a.likeliest),
            false => values(&|a| a.chosen == a.gold),
        };
        let acc_norm = task
            .normalized
            .then(|| values(&|a| a.chosen_normalized == a.gold));
        let perplexity = || {
            let words = Value::of(answers.iter().map(|a| a.log_likelihoods[0]));
            let mean = (-words.mean).exp();
            Value {
                mean,
                standard_error: words.standard_error.map(|e| mean * e),
            }
        };
        Score {
            task: task.name,
            questions: answers.len(),
            acc: mean(&acc),
            acc_norm: acc_norm.as_deref().map(mean),
            perplexity: task.last_word.then(perplexity),
            baseline: task.baseline,
            truncated: mean(&values(&|a| a.truncated)).mean,
            right: acc_norm.unwrap_or(acc),
        }
    }

    /// Returns the score from which the improvement is computed, in percent: `acc_norm` if the harness computes it,
    /// otherwise `acc`.
    pub fn headline(&self) -> f64 {
        100.0 * self.acc_norm.unwrap_or(self.acc).mean
    }

    /// Returns (score − guessing) / guessing, in percent (Default MoE, arXiv 2504.12463).
    pub fn improvement(&self) -> f64 {
        100.0 * (self.headline() - self.baseline) / self.baseline
    }

    /// Returns the scores by name, as in a run's log. An infinite perplexity is left out: JSON has no such number.
    pub fn numbers(&self) -> BTreeMap<String, f64> {
        let named = [
            ("acc", Some(self.acc.mean)),
            ("acc_norm", self.acc_norm.map(|v| v.mean)),
            ("improvement", Some(self.improvement())),
            ("perplexity", self.perplexity.map(|v| v.mean)),
        ];
        let there = named.into_iter().filter_map(|(name, v)| Some((name, v?)));
        let there = there.filter(|(_, v)| v.is_finite());
        there.map(|(name, v)| (name.to_owned(), v)).collect()
    }
}

/// The scores of several tasks.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// A score for each task, in order.
    pub scores: Vec<Score>,
    /// Number of tokens that the model read.
    pub tokens: usize,
    /// Seconds for all questions.
    pub seconds: f64,
    /// Number of tokens that the model would have read if answers did not share their beginnings.
    pub unshared_tokens: usize,
}

impl Results {
    /// Returns the two averages as the paper computes them, in percent: of all scores, and of the improvement without
    /// LAMBADA. None if no benchmark enters an average.
    pub fn averages(&self) -> [Option<f64>; 2] {
        let mean = |values: Vec<f64>| {
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let choices = self.scores.iter().filter(|s| s.perplexity.is_none());
        [
            mean(self.scores.iter().map(Score::headline).collect()),
            mean(choices.map(Score::improvement).collect()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::tasks::question::{behind, find};

    #[test]
    fn a_value_has_the_standard_error_of_its_mean() {
        let v = Value::of([1.0, 0.0, 0.0, 1.0].into_iter());
        assert_eq!(v.mean, 0.5);
        assert!((v.standard_error.unwrap() - (1.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-15);
        assert_eq!(Value::of([2.0].into_iter()).standard_error, None);
    }

    #[test]
    fn length_decides_acc_norm_and_the_first_of_equals_is_taken() {
        let question = behind("", &["a", "bbbb"], 1);
        let answer = |l: [f64; 2]| Answer::new(0.into(), &question, l.to_vec(), false, false);
        let answers = [[-2.0, -4.0], [-3.0, -3.0], [-9.0, -3.0]].map(answer);
        assert_eq!(answers.each_ref().map(|a| a.chosen), [0, 0, 1]);
        assert_eq!(answers.each_ref().map(|a| a.chosen_normalized), [1, 1, 1]);
        let score = Score::of(find("hellaswag").unwrap(), &answers);
        assert!((score.acc.mean - 1.0 / 3.0).abs() < 1e-15);
        assert_eq!(score.acc_norm.unwrap().mean, 1.0);
        // From 25% by guessing to 100%.
        assert!((score.improvement() - 300.0).abs() < 1e-12);
    }

    #[test]
    fn the_last_word_counts_if_the_model_would_generate_it() {
        let question = behind("", &["word"], 0);
        let answer = |l, right| Answer::new(0.into(), &question, vec![l], right, false);
        let lambada = find("lambada_openai").unwrap();
        let score = Score::of(lambada, &[answer(-1.0, true), answer(-3.0, false)]);
        assert_eq!(score.acc.mean, 0.5);
        assert!((score.perplexity.unwrap().mean - 2f64.exp()).abs() < 1e-12);
        assert!(score.numbers().contains_key("perplexity"));
        // The log of a run has no infinite numbers.
        let diverged = Score::of(lambada, &[answer(-800.0, false)]);
        assert_eq!(diverged.perplexity.unwrap().mean, f64::INFINITY);
        assert!(!diverged.numbers().contains_key("perplexity"));
    }
}
