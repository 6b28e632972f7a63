//! What an evaluation shows while it goes: a bar on a terminal, a line now and then elsewhere.

use super::question::{Question, Task};
use super::results::Score;
use crate::report::stderr_line;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress on standard error. Its measure is text: a question takes as long as its text is.
pub(super) struct Progress {
    bar: ProgressBar,
    questions: [usize; 2],
    begun: Instant,
    last_line: Instant,
    quiet: bool,
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
        let target = match crate::report::shows_bars() && !quiet {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let all = asked.clone().map(size).sum();
        let bar = ProgressBar::with_draw_target(Some(all), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:12} {msg}") {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        Progress {
            bar,
            questions: [0, asked.count()],
            begun: Instant::now(),
            last_line: Instant::now(),
            quiet,
        }
    }

    /// One question more.
    pub fn asked(&mut self, task: &Task, question: &Question) {
        self.questions[0] += 1;
        self.bar.inc(size(question));
        let [asked, all] = self.questions;
        let done = self.bar.position().max(1) as f64;
        let rest = self.bar.length().unwrap_or(0) as f64 - done;
        let left = self.begun.elapsed().as_secs_f64() * rest / done;
        let left = HumanDuration(Duration::from_secs_f64(left.max(0.0)));
        let text = format!("{asked}/{all} questions  {left} left  {}", task.name);
        if !self.bar.is_hidden() {
            self.bar.set_message(text);
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            self.say(&text);
        }
    }

    /// A task's score, a line that stays.
    pub fn scored(&self, score: &Score) {
        let (name, questions) = (score.task, score.questions);
        let headline = score.headline();
        self.say(&format!(
            "{name:<14} {questions:>6} questions  {headline:.2}%"
        ));
    }

    fn say(&self, line: &str) {
        if !self.bar.is_hidden() {
            self.bar.println(line);
        } else if !self.quiet {
            stderr_line(line);
        }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
