//! Output of the program: errors, files, logs, records, tables, plots and pages.

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
mod plain;
pub mod plots;
pub(crate) mod progress;
pub mod records;
pub mod version;

use std::io::{IsTerminal, Write};

pub use nearest::{nearest, similarity};
pub use plain::in_plain_words;

/// Returns whether progress on standard error is shown as a bar, which needs a terminal that can redraw a line. Otherwise
/// progress is printed as a line at intervals.
pub fn shows_bars() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

const MIB: f64 = (1u64 << 20) as f64;
const GIB: f64 = (1u64 << 30) as f64;

/// Formats a number of bytes in units of 2^10, as nvidia-smi does: 1.50 GiB.
pub fn size(bytes: u64) -> String {
    match bytes as f64 {
        n if n >= GIB => format!("{:.2} GiB", n / GIB),
        n if n >= MIB => format!("{:.1} MiB", n / MIB),
        n => format!("{:.1} KiB", n / 1024.0),
    }
}

/// Formats a number with the units G, M and k: 7.330 G, 3.7 M, 46.1 k.
pub fn number(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.3} G", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n if n >= 1e3 => format!("{:.1} k", n / 1e3),
        n => format!("{n:.0}"),
    }
}

/// Name of the standard output in errors.
pub(crate) const STDOUT: &str = "the standard output";

/// Writes a line to the standard output.
///
/// # Errors
/// When it cannot be written, for example because the reader has closed the pipe.
pub(crate) fn stdout_line(line: std::fmt::Arguments) -> error::Result<()> {
    let done = writeln!(std::io::stdout(), "{line}");
    done.map_err(|e| error::Error::io("write", STDOUT, e))
}

/// Writes a line to standard error in one call, so that the lines of several processes do not mix. Errors are ignored, so
/// that the program continues when there is no reader.
pub fn stderr_line(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::{number, size};

    #[test]
    fn sizes_are_in_powers_of_two() {
        assert_eq!(size(139 << 30), "139.00 GiB");
        assert_eq!(size(3 << 29), "1.50 GiB");
        assert_eq!(size((1 << 30) - 1), "1024.0 MiB");
        assert_eq!(size(512), "0.5 KiB");
    }

    #[test]
    fn numbers_have_the_largest_unit_that_fits() {
        let shown = [7.33e9, 3.712e6, 46_048.0, 999.0, 0.0].map(number);
        assert_eq!(shown, ["7.330 G", "3.7 M", "46.0 k", "999", "0"]);
    }
}
