//! Lines on standard error, above a progress bar if standard error is a terminal.

use crate::report::progress::bar;
use crate::report::{shows_bars, stderr_line};
use indicatif::ProgressBar;

/// The destination of a run's messages to its user.
#[derive(Clone)]
pub struct Console {
    bar: ProgressBar,
    /// Whether the bar is shown.
    terminal: bool,
    quiet: bool,
    /// Whether this rank writes nothing, because another rank does.
    silent: bool,
}

impl Console {
    /// Creates a console without a bar.
    pub fn notes() -> Self {
        Console {
            bar: ProgressBar::hidden(),
            terminal: false,
            quiet: true,
            silent: false,
        }
    }

    /// Creates the console of a rank that writes nothing.
    pub fn silent() -> Self {
        Console {
            silent: true,
            ..Self::notes()
        }
    }

    /// Creates a console with a bar from step `first` to `total`, unless `quiet`.
    pub fn with_bar(first: u64, total: u64, quiet: bool) -> Self {
        let terminal = shows_bars() && !quiet;
        Console {
            bar: bar(total, "{bar:12} {pos}/{len}  {wide_msg}", terminal).with_position(first),
            terminal,
            quiet,
            silent: false,
        }
    }

    /// Writes a line, even if quiet.
    pub fn note(&self, text: &str) {
        if self.silent {
            return;
        }
        if self.terminal {
            self.bar.println(text);
        } else {
            stderr_line(text);
        }
    }

    /// Writes a line unless quiet.
    pub fn info(&self, text: &str) {
        if !self.quiet {
            self.note(text);
        }
    }

    /// Returns the bar, if it is shown.
    pub fn bar(&self) -> Option<&ProgressBar> {
        self.terminal.then_some(&self.bar)
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
