//! Hooks for tests of what may befall a program that saves. `ROUTEGRAD_FAULT_POINT=n` makes the
//! process kill itself, as SIGKILL would, at the n-th point it passes, counted from 1; the points
//! stand after each write, sync and rename of a save. `ROUTEGRAD_DISK_FULL=n` makes the n-th write
//! and all later ones fail, as on a full disk. Without the variables each costs one comparison.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts up to the number that a variable of the environment holds.
struct Countdown {
    variable: &'static str,
    last: OnceLock<u64>,
    passed: AtomicU64,
}

impl Countdown {
    const fn new(variable: &'static str) -> Self {
        Countdown {
            variable,
            last: OnceLock::new(),
            passed: AtomicU64::new(0),
        }
    }

    /// How often it was passed and the number, once that is reached.
    fn reached(&self) -> Option<(u64, u64)> {
        let last = *self.last.get_or_init(|| {
            let value = std::env::var(self.variable).ok();
            value.and_then(|v| v.parse().ok()).unwrap_or(0)
        });
        if last == 0 {
            return None;
        }
        let passed = self.passed.fetch_add(1, Ordering::SeqCst) + 1;
        (passed >= last).then_some((passed, last))
    }
}

/// A moment at which a crash must not lose what was saved before.
pub(crate) fn point() {
    static POINT: Countdown = Countdown::new("ROUTEGRAD_FAULT_POINT");
    if POINT.reached().is_some_and(|(passed, last)| passed == last) {
        let _ = signal_hook::low_level::raise(signal_hook::consts::SIGKILL);
    }
}

/// Stands before a write.
pub(crate) fn disk() -> io::Result<()> {
    static DISK: Countdown = Countdown::new("ROUTEGRAD_DISK_FULL");
    match DISK.reached() {
        None => Ok(()),
        Some(_) => Err(io::ErrorKind::StorageFull.into()),
    }
}
