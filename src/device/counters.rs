//! What a thread asked of its device with kernels: launches, memory, and copies between host and device.
//!
//! The simulator's kernels have memory of their own, as a GPU's have, so that these numbers are those of a GPU: a training
//! step that reads nothing back there waits for nothing here.

use std::cell::Cell;

/// Sums since the last [`take`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Kernels that were launched.
    pub launches: u64,
    /// Times that the memory of the device had to grow.
    pub allocations: u64,
    /// Copies from the device to the host, each of which waits for all launches before it.
    pub reads: u64,
    /// Times that the host waited for a GPU, copies included.
    pub waits: u64,
    /// Copies to the device, which wait for nothing.
    pub uploads: u64,
    /// Replays of captured launches, which count as none.
    pub replays: u64,
    /// A digest of all addresses that kernels were given, in order.
    pub addresses: u64,
}

thread_local! {
    static COUNTERS: Cell<Counters> = Cell::default();
}

/// What this thread did since the last call.
pub fn take() -> Counters {
    COUNTERS.take()
}

/// What this thread did since the last [`take`], which goes on.
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

/// Notes an address that a kernel gets (FNV-1a).
pub(super) fn addressed(address: usize) {
    change(|c| c.addresses = (c.addresses ^ address as u64).wrapping_mul(0x100_0000_01b3));
}
