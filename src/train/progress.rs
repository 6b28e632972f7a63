//! What a run shows while it goes: a bar on a terminal, a line now and then elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress on standard error.
pub(super) struct Progress {
    bar: ProgressBar,
    terminal: bool,
    total: u64,
    begun: Instant,
    first: u64,
    last_line: Option<Instant>,
    quiet: bool,
}

impl Progress {
    /// From step `first` to `total`; `quiet` shows nothing but notes.
    pub fn new(first: u64, total: u64, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        let target = if terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_position(first);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}") {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        Progress {
            bar,
            terminal,
            total,
            begun: Instant::now(),
            first,
            last_line: None,
            quiet,
        }
    }

    /// After `step` steps. `busiest` is the greatest load of an expert relative to a balanced one.
    pub fn step(&mut self, step: u64, loss: f64, tokens_per_second: f64, busiest: f64) {
        let done = (step - self.first).max(1) as f64;
        let left = self.begun.elapsed().as_secs_f64() / done * (self.total - step) as f64;
        let text = format!(
            "loss {loss:.3}  {tokens_per_second:.0} tokens/s  busiest expert {busiest:.2}×  {} left",
            clock(left)
        );
        if self.terminal {
            self.bar.set_position(step);
            self.bar.set_message(text);
            return;
        }
        let due = self.last_line.is_none_or(|t| t.elapsed() >= LINE_INTERVAL);
        if (due || step == self.total) && !self.quiet {
            self.last_line = Some(Instant::now());
            eprintln!("step {step}/{}  {text}", self.total);
        }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        if self.terminal {
            self.bar.println(text);
        } else {
            eprintln!("{text}");
        }
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Seconds as 4:05 or 1:02:03.
fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64;
    let mut out = String::new();
    let _ = match s / 3600 {
        0 => write!(out, "{}:{:02}", s / 60, s % 60),
        h => write!(out, "{h}:{:02}:{:02}", s / 60 % 60, s % 60),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::clock;

    #[test]
    fn times_read_as_on_a_clock() {
        assert_eq!(clock(0.2), "0:00");
        assert_eq!(clock(245.4), "4:05");
        assert_eq!(clock(3723.0), "1:02:03");
    }
}
