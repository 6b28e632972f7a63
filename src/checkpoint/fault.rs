//! A hook for tests: `ROUTEGRAD_FAULT_POINT=n` makes the process kill itself, as SIGKILL would, at
//! the n-th point it passes, counted from 1. The points stand after each write, sync and rename of
//! a save. Without the variable a point costs one comparison.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// A moment at which a crash must not lose what was saved before.
pub(super) fn point() {
    static LAST: OnceLock<u64> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);
    let last = *LAST.get_or_init(|| {
        let value = std::env::var("ROUTEGRAD_FAULT_POINT").ok();
        value.and_then(|v| v.parse().ok()).unwrap_or(0)
    });
    if last != 0 && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == last {
        let _ = signal_hook::low_level::raise(signal_hook::consts::SIGKILL);
    }
}
