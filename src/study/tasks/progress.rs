//! What the scoring of benchmarks shows while it goes.

use super::question::{Question, Task};
use super::results::Score;
use crate::report;

/// Progress by text: a question takes as long as its text is.
pub(super) struct Progress {
    shown: report::progress::Progress,
    /// Bytes and questions asked, and all questions.
    bytes: u64,
    asked: usize,
    questions: usize,
}

/// Bytes that the model reads of a question, but for what its answers share.
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

    /// One question more.
    pub fn asked(&mut self, task: &Task, question: &Question) {
        self.asked += 1;
        self.bytes += size(question);
        let (asked, all, name) = (self.asked, self.questions, task.name);
        let text = format!("{name}: {asked}/{all} questions");
        self.shown.at(self.bytes, &text);
    }

    /// A task's score, a line that stays.
    pub fn scored(&self, score: &Score) {
        let (name, questions) = (score.task, score.questions);
        let headline = score.headline();
        self.shown.note(&format!(
            "{name:<14} {questions:>6} questions  {headline:.2}%"
        ));
    }
}
