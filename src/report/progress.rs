//! Progress of long work on standard error: a bar on a terminal, a line now and then elsewhere.

use super::{shows_bars, stderr_line};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Work of a known size. The bar goes away with it.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
    quiet: bool,
    begun: Instant,
    last_line: Mutex<Instant>,
}

impl Progress {
    /// Of work of `total`, in any unit; shows nothing but notes that matter if `quiet`.
    pub fn new(total: u64, quiet: bool) -> Self {
        let terminal = shows_bars() && !quiet;
        let target = match terminal {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:12} {wide_msg}") {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        Progress {
            bar,
            terminal,
            quiet,
            begun: Instant::now(),
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// `position` of the work is done; `text` says so in the reader's units.
    pub fn at(&self, position: u64, text: &str) {
        self.bar.set_position(position);
        if self.terminal {
            self.bar
                .set_message(format!("{text}  {} left", self.left()));
            return;
        }
        let mut last = self.last_line.lock().unwrap_or_else(|e| e.into_inner());
        if !self.quiet && last.elapsed() >= LINE_INTERVAL {
            *last = Instant::now();
            stderr_line(&format!("{text}, {} left", self.left()));
        }
    }

    /// The rest at the rate so far.
    fn left(&self) -> HumanDuration {
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rest = total.saturating_sub(done) as f64 / done.max(1) as f64;
        HumanDuration(self.begun.elapsed().mul_f64(rest))
    }

    /// A line that stays, unless quiet.
    pub fn note(&self, text: &str) {
        if self.terminal {
            self.bar.println(text);
        } else if !self.quiet {
            stderr_line(text);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
