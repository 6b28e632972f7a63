//! Simulates crashes and full disks for tests. `ROUTEGRAD_FAULT_POINT=n` makes the process kill itself with SIGKILL at the
//! n-th fault point, counted from 1; there is a fault point after each write, sync and rename of a save.
//! `ROUTEGRAD_DISK_FULL=n` makes the n-th write and all later ones fail, as on a full disk. Without these variables, a
//! call costs one comparison.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts up to the number in an environment variable.
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

    /// Counts one call. Returns the count and the number, once the count has reached the number.
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

/// A fault point: a crash here must not lose earlier saves.
pub(crate) fn point() {
    static POINT: Countdown = Countdown::new("ROUTEGRAD_FAULT_POINT");
    if POINT.reached().is_some_and(|(passed, last)| passed == last) {
        let _ = signal_hook::low_level::raise(signal_hook::consts::SIGKILL);
    }
}

/// Fails if the disk is to appear full; called before each write.
pub(crate) fn disk() -> io::Result<()> {
    static DISK: Countdown = Countdown::new("ROUTEGRAD_DISK_FULL");
    match DISK.reached() {
        None => Ok(()),
        Some(_) => Err(io::ErrorKind::StorageFull.into()),
    }
}
