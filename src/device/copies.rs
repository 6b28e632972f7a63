//! Copies between host and GPU, counted while a timeline is recorded.

use serde::Serialize;
use std::sync::{Mutex, MutexGuard};

/// Copies in one direction.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Copies {
    /// How many there were.
    pub count: usize,
    /// Bytes that they moved.
    pub bytes: u64,
}

/// The copies to the GPU and to the host; `None` while they are not counted.
static COUNTED: Mutex<Option<[Copies; 2]>> = Mutex::new(None);

fn counted() -> MutexGuard<'static, Option<[Copies; 2]>> {
    COUNTED.lock().unwrap_or_else(|e| e.into_inner())
}

/// Starts to count copies.
pub(super) fn begin() {
    *counted() = Some(Default::default());
}

/// Counts a copy.
pub(super) fn copied(to_host: bool, bytes: usize) {
    if let Some(counted) = counted().as_mut() {
        let copies = &mut counted[usize::from(to_host)];
        copies.count += 1;
        copies.bytes += bytes as u64;
    }
}

/// Stops counting, and returns the copies to the GPU and to the host.
pub(super) fn take() -> [Copies; 2] {
    counted().take().unwrap_or_default()
}
