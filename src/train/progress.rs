//! What a run shows while it goes: a bar on a terminal, a line now and then elsewhere.

use crate::report::metrics::Record;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::Write;
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress on standard error.
pub(super) struct Progress {
    bar: ProgressBar,
    terminal: bool,
    begun: Instant,
    first: u64,
    last_line: Option<Instant>,
    /// Of the last evaluation.
    validation: Option<f64>,
    quiet: bool,
    /// Another rank shows the run's progress.
    silent: bool,
}

impl Progress {
    /// Of a rank that shows nothing.
    pub fn silent(first: u64, total: u64) -> Self {
        Progress {
            silent: true,
            ..Self::new(first, total, true)
        }
    }

    /// From step `first` to `total`; `quiet` shows nothing but notes.
    pub fn new(first: u64, total: u64, quiet: bool) -> Self {
        let terminal = crate::report::shows_bars() && !quiet;
        let target = if terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_position(first);
        if let Ok(style) = ProgressStyle::with_template("{bar:12} {pos}/{len}  {wide_msg}") {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        Progress {
            bar,
            terminal,
            begun: Instant::now(),
            first,
            last_line: None,
            validation: None,
            quiet,
            silent: false,
        }
    }

    /// Lines at the beginning.
    pub fn introduce(&self, lines: &[String]) {
        if !self.quiet {
            lines.iter().for_each(|line| self.note(line));
        }
    }

    /// After a step of `total`.
    pub fn step(&mut self, record: &Record, total: u64) {
        let step = record.step;
        let done = (step - self.first).max(1) as f64;
        let left = self.begun.elapsed().as_secs_f64() / done * (total - step) as f64;
        if record.validation_loss.is_some() {
            self.validation = record.validation_loss;
        }
        let number = |x: Option<f64>| x.map_or("not finite".into(), |x| format!("{x:.3}"));
        let validation = self.validation.map(|x| format!(" (validation {x:.3})"));
        let text = format!(
            "loss {}{}  {:.0} tokens/s  {} left  busiest expert {:.2}×",
            number(record.loss),
            validation.unwrap_or_default(),
            record.tokens_per_second,
            clock(left),
            busiest(&record.load),
        );
        if self.terminal {
            self.bar.set_position(step);
            self.bar.set_message(text);
            return;
        }
        let due = self.last_line.is_none_or(|t| t.elapsed() >= LINE_INTERVAL);
        let notable = step == total || record.validation_loss.is_some();
        if (due || notable) && !self.quiet {
            self.last_line = Some(Instant::now());
            say(&format!("step {step}/{total}  {text}"));
        }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        if self.silent {
            return;
        }
        if self.terminal {
            self.bar.println(text);
        } else {
            say(text);
        }
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// A line on standard error; a run goes on when nobody listens.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The greatest load of an expert in any layer, relative to a balanced one.
fn busiest(load: &[Vec<u64>]) -> f64 {
    load.iter()
        .map(|counts| {
            let most = counts.iter().copied().max().unwrap_or(0) as f64;
            most * counts.len() as f64 / counts.iter().sum::<u64>().max(1) as f64
        })
        .fold(0.0, f64::max)
}

/// Seconds as 4:05 or 1:02:03.
fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s / 60 % 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_expert_is_that_of_the_worst_layer() {
        assert_eq!(busiest(&[vec![2, 2], vec![1, 3]]), 1.5);
        assert_eq!(busiest(&[vec![0, 0]]), 0.0);
        assert_eq!(busiest(&[]), 0.0);
    }

    #[test]
    fn times_read_as_on_a_clock() {
        assert_eq!(clock(0.2), "0:00");
        assert_eq!(clock(245.4), "4:05");
        assert_eq!(clock(3723.0), "1:02:03");
    }
}
