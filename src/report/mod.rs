//! What the program writes: errors, files, logs, records, tables, plots and pages.

/// Writes a line to the standard output, or returns from the function with the error.
macro_rules! say {
    ($($arguments:tt)*) => { $crate::report::stdout_line(format_args!($($arguments)*))? };
}

pub mod error;
pub mod events;
pub mod files;
pub(crate) mod lock;
pub mod metrics;
mod nearest;
pub mod page;
pub mod plots;
pub(crate) mod progress;
pub mod records;
pub mod version;

use std::io::{IsTerminal, Write};

pub use nearest::{nearest, similarity};

/// Whether progress on standard error is a bar: on a terminal that can redraw a line. Elsewhere progress is a line now and then.
pub fn shows_bars() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// What errors call the standard output.
pub(crate) const STDOUT: &str = "the standard output";

/// Writes a line to the standard output.
///
/// # Errors
/// When it cannot be written, such as where nobody reads it any more.
pub(crate) fn stdout_line(line: std::fmt::Arguments) -> error::Result<()> {
    let done = writeln!(std::io::stdout(), "{line}");
    done.map_err(|e| error::Error::io("write", STDOUT, e))
}

/// Writes a line to standard error in one piece, so that the lines of several processes do not mix. The program goes on when
/// nobody reads it.
pub fn stderr_line(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
