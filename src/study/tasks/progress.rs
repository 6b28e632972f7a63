//! Progress of the scoring of benchmarks.

use super::question::{Question, Task};
use super::results::Score;
use crate::report;

/// Progress by bytes of text, since the time of a question is proportional to them.
pub(super) struct Progress {
    shown: report::progress::Progress,
    /// Bytes and questions done, and the number of all questions.
    bytes: u64,
    asked: usize,
    questions: usize,
}

/// Returns the bytes that the model reads for a question; text that its answers share counts once.
fn size(question: &Question) -> u64 {
    let prompt = question
        .answers
        .first()
        .map_or(0, |(prompt, _)| prompt.len());
    let answers = question.answers.iter().map(|(_, answer)| answer.len());
    (prompt + answers.sum::<usize>()) as u64
}

impl Progress {
    pub fn new<'q>(asked: impl Iterator<Item = &'q Question> + Clone, quiet: bool) -> Self {
        let all = asked.clone().map(size).sum();
        Progress {
            shown: report::progress::Progress::new(all, quiet),
            bytes: 0,
            asked: 0,
            questions: asked.count(),
        }
    }

    /// Adds a question that is done.
    pub fn asked(&mut self, task: &Task, question: &Question) {
        self.asked += 1;
        self.bytes += size(question);
        let (asked, all, name) = (self.asked, self.questions, task.name);
        let text = format!("{name}: {asked}/{all} questions");
        self.shown.at(self.bytes, &text);
    }

    /// Prints a task's score on a permanent line.
    pub fn scored(&self, score: &Score) {
        let (name, questions) = (score.task, score.questions);
        let headline = score.headline();
        self.shown.note(&format!(
            "{name:<14} {questions:>6} questions  {headline:.2}%"
        ));
    }
}
