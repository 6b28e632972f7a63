//! Scores of answered questions.

use super::question::{Question, Task};
use serde::Serialize;
use std::collections::BTreeMap;

/// What the model made of one question.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Number of the document, as its file gives it.
    pub doc_id: serde_json::Value,
    /// Of each answer, in nats.
    pub log_likelihoods: Vec<f64>,
    /// For a last word: whether the model would have written it.
    pub likeliest: bool,
    /// The right answer, and those that `acc` and `acc_norm` took.
    pub gold: usize,
    /// The answer of the largest log-likelihood, which `acc` counts.
    pub chosen: usize,
    /// The answer of the largest log-likelihood per character, which `acc_norm` counts.
    pub chosen_normalized: usize,
    /// Whether a prompt lost its beginning.
    pub truncated: bool,
}

impl Answer {
    /// `likeliest` and `truncated` as the fields say.
    pub fn new(
        doc_id: serde_json::Value,
        question: &Question,
        log_likelihoods: Vec<f64>,
        likeliest: bool,
        truncated: bool,
    ) -> Self {
        let lengths = question.lengths.iter().map(|n| *n as f64);
        let normalized: Vec<f64> = log_likelihoods
            .iter()
            .zip(lengths)
            .map(|(l, n)| l / n)
            .collect();
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

/// The first of the largest.
fn largest(values: &[f64]) -> usize {
    let better = |best: usize, i: usize| if values[i] > values[best] { i } else { best };
    (0..values.len()).fold(0, better)
}

/// A mean and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Value {
    /// Their sum divided by their number.
    pub mean: f64,
    /// None for a single question.
    pub standard_error: Option<f64>,
}

impl Value {
    /// Of numbers, at least one.
    pub fn of(values: impl ExactSizeIterator<Item = f64> + Clone) -> Self {
        let n = values.len() as f64;
        let mean = values.clone().sum::<f64>() / n;
        let squares: f64 = values.map(|x| (x - mean).powi(2)).sum();
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
    /// How many were asked.
    pub questions: usize,
    /// Share answered rightly, by log-likelihood.
    pub acc: Value,
    /// The same by log-likelihood per character, where the harness has it.
    pub acc_norm: Option<Value>,
    /// Of the last word's tokens.
    pub perplexity: Option<Value>,
    /// Score of guessing, in percent.
    pub baseline: f64,
    /// Share of the questions whose prompt lost its beginning.
    pub truncated: f64,
    /// Of each question, in order, 1 if the headline counts it as right, else 0.
    #[serde(skip)]
    pub right: Vec<f64>,
}

impl Score {
    /// The scores of at least one answer.
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

    /// The score that improvement is reckoned by, in percent: `acc_norm` where the harness has it.
    pub fn headline(&self) -> f64 {
        100.0 * self.acc_norm.unwrap_or(self.acc).mean
    }

    /// (score − guessing) / guessing, in percent (Default MoE, 2504.12463).
    pub fn improvement(&self) -> f64 {
        100.0 * (self.headline() - self.baseline) / self.baseline
    }

    /// The numbers by name, as a run's log has them.
    pub fn numbers(&self) -> BTreeMap<String, f64> {
        let named = [
            ("acc", Some(self.acc.mean)),
            ("acc_norm", self.acc_norm.map(|v| v.mean)),
            ("improvement", Some(self.improvement())),
            ("perplexity", self.perplexity.map(|v| v.mean)),
        ];
        let there = named.into_iter().filter_map(|(name, v)| Some((name, v?)));
        there.map(|(name, v)| (name.to_owned(), v)).collect()
    }
}

/// The scores of several tasks.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// A score for each task, in order.
    pub scores: Vec<Score>,
    /// Tokens that the model read, and seconds it took.
    pub tokens: usize,
    /// Time that all questions took.
    pub seconds: f64,
    /// Tokens that it would have read without sharing what answers begin with.
    pub unshared_tokens: usize,
}

impl Results {
    /// The two averages as the paper forms them, in percent: of all scores, and of the improvement without LAMBADA.
    pub fn averages(&self) -> [f64; 2] {
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
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
    use crate::study::tasks::find;

    #[test]
    fn a_value_has_the_standard_error_of_its_mean() {
        let v = Value::of([1.0, 0.0, 0.0, 1.0].into_iter());
        assert_eq!(v.mean, 0.5);
        assert!((v.standard_error.unwrap() - (1.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-15);
        assert_eq!(Value::of([2.0].into_iter()).standard_error, None);
    }

    #[test]
    fn length_decides_acc_norm_and_the_first_of_equals_is_taken() {
        let question = Question {
            answers: vec![
                (String::new(), " a".into()),
                (String::new(), " bbbb".into()),
            ],
            lengths: vec![1, 4],
            gold: 1,
        };
        let answer = |l: [f64; 2]| Answer::new(0.into(), &question, l.to_vec(), false, false);
        let answers = [
            answer([-2.0, -4.0]),
            answer([-3.0, -3.0]),
            answer([-9.0, -3.0]),
        ];
        assert_eq!(answers.each_ref().map(|a| a.chosen), [0, 0, 1]);
        assert_eq!(answers.each_ref().map(|a| a.chosen_normalized), [1, 1, 1]);
        let score = Score::of(find("hellaswag").unwrap(), &answers);
        assert!((score.acc.mean - 1.0 / 3.0).abs() < 1e-15);
        assert_eq!(score.acc_norm.unwrap().mean, 1.0);
        // From guessing's 25% to 100%.
        assert!((score.improvement() - 300.0).abs() < 1e-12);
    }

    #[test]
    fn the_last_word_counts_when_the_model_would_write_it() {
        let question = Question {
            answers: vec![(String::new(), " word".into())],
            lengths: vec![4],
            gold: 0,
        };
        let answer = |l, right| Answer::new(0.into(), &question, vec![l], right, false);
        let score = Score::of(
            find("lambada_openai").unwrap(),
            &[answer(-1.0, true), answer(-3.0, false)],
        );
        assert_eq!(score.acc.mean, 0.5);
        assert!((score.perplexity.unwrap().mean - 2f64.exp()).abs() < 1e-12);
    }
}
