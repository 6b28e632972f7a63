//! What a preparation shows: a bar on a terminal, a line now and then elsewhere.

use super::inputs::Input;
use crate::report::stderr_line;
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress on standard error, by the bytes of the inputs that were read.
pub(super) struct Progress {
    bar: ProgressBar,
    terminal: bool,
    quiet: bool,
    last_line: Mutex<Instant>,
}

impl Progress {
    pub fn new(inputs: &[Input], quiet: bool) -> Self {
        let terminal = crate::report::shows_bars() && !quiet;
        let target = match terminal {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bytes = inputs.iter().map(|i| i.bytes).sum();
        let bar = ProgressBar::with_draw_target(Some(bytes), target);
        let template = "{bar:12} {bytes}/{total_bytes}  {eta} left  {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        Progress {
            bar,
            terminal,
            quiet,
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// So many bytes were read, and made so many tokens.
    pub fn at(&self, consumed: u64, tokens: u64) {
        let text = format!("{:.1} M tokens", tokens as f64 / 1e6);
        if self.terminal {
            self.bar.set_position(consumed);
            self.bar.set_message(text);
            return;
        }
        let mut last = self.last_line.lock().unwrap_or_else(|e| e.into_inner());
        if !self.quiet && last.elapsed() >= LINE_INTERVAL {
            *last = Instant::now();
            let all = HumanBytes(self.bar.length().unwrap_or(0));
            self.note(&format!("{} of {all}, {text}", HumanBytes(consumed)));
        }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        if self.terminal {
            self.bar.println(text);
        } else if !self.quiet {
            stderr_line(text);
        }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
