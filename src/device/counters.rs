//! Counters of a thread's requests to its device with kernels: launches, memory allocations, and copies between host
//! and device.
//!
//! The simulator's kernels have a separate memory, as those of a GPU do, so the numbers are the same as on a GPU: a
//! training step that reads nothing back from the simulator would not wait on a GPU either.

use std::cell::Cell;

/// The counts since the last [`take`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Number of kernel launches.
    pub launches: u64,
    /// Number of times that the memory arena of the device had to grow.
    pub allocations: u64,
    /// Number of copies from the device to the host. Each waits for all launches before it.
    pub reads: u64,
    /// Number of times that the host waited for a GPU, including waits for copies.
    pub waits: u64,
    /// Number of copies to the device, which do not wait.
    pub uploads: u64,
    /// Number of replays of captured launches. The replayed launches are not counted in `launches`.
    pub replays: u64,
    /// A digest of all addresses passed to kernels, in order.
    pub addresses: u64,
}

thread_local! {
    static COUNTERS: Cell<Counters> = Cell::default();
}

/// Returns this thread's counters since the last call, and resets them.
pub fn take() -> Counters {
    COUNTERS.take()
}

/// Returns this thread's counters since the last [`take`] without resetting them.
pub fn now() -> Counters {
    COUNTERS.get()
}

fn change(f: impl FnOnce(&mut Counters)) {
    let mut counters = COUNTERS.get();
    f(&mut counters);
    COUNTERS.set(counters);
}

/// Counts a launch.
pub fn launched() {
    change(|c| c.launches += 1);
}

/// Counts a replay.
pub fn replayed() {
    change(|c| c.replays += 1);
}

pub(super) fn allocated() {
    change(|c| c.allocations += 1);
}

pub(super) fn read() {
    change(|c| c.reads += 1);
}

#[cfg(feature = "cuda")]
pub(super) fn waited() {
    change(|c| c.waits += 1);
}

pub(super) fn uploaded() {
    change(|c| c.uploads += 1);
}

/// Adds an address that is passed to a kernel to the digest (FNV-1a).
pub(super) fn addressed(address: usize) {
    change(|c| c.addresses = (c.addresses ^ address as u64).wrapping_mul(0x100_0000_01b3));
}
