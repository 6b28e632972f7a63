//! What the ranks of a run share. Code for one rank does not change when ranks are added.
//!
//! A backend only moves bytes: [`all_gather`](Collective::all_gather) and [`exchange`](Collective::exchange). Every sum is
//! formed here, in rank order, so that its bytes depend on neither the backend nor its algorithms.

mod activity; // what a rank is doing, for messages
mod call; // ordinal, kind and count of a call, compared between ranks
mod device; // the two movers of a device's memory
mod handshake; // the first words of two ranks on a TCP connection
mod hub; // heartbeats, and one message when a rank is lost
mod mpi; // MPI moves the bytes of processes; it is loaded at run time
pub mod nccl; // their GPUs' memory; NCCL is loaded at run time
mod processes; // ranks are processes
mod start; // from the launcher's environment to a rank
mod sums; // sums and gathers on top of the two movers
mod tcp; // TCP moves the bytes of processes
mod threads; // ranks are threads of one process

pub use activity::{at, doing, doing_alone};
pub use call::Kind;
pub use device::{DeviceRanks, Part};
pub use start::{
    Launcher, Ranks, conclude, describe, groups, launcher, launcher_size, start, threads,
};
pub use sums::{agree, any, same_on_all, shared};
pub use threads::ThreadRank;

use crate::device::{Memory, Span};
use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// One rank of a run, and what it shares with the others.
///
/// Every rank makes the same calls in the same order, each with equally many bytes. The backends compare ordinal, kind and
/// count of each call; a mismatch is an error on all ranks.
pub trait Collective: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Copies the n bytes of `own` of every rank to `all` `[size, n]`, rank 0 first.
    ///
    /// # Errors
    /// When a rank has left or makes another call, or the call takes too long.
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()>;

    /// Sends row r of `own` `[size, n]` to each other rank r; row r of `all` `[size, n]` becomes what rank r sent here. The row
    /// of this rank moves nowhere: that of `all` stays as it was.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()>;

    /// [`all_gather`](Self::all_gather) of buffers that the backend may take and gives back, `[own, all]`: a backend whose
    /// library must not lose them moves those of others through copies.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn all_gather_owned(&self, own: Memory, mut all: Memory) -> Result<[Memory; 2]> {
        self.all_gather(own.bytes(), all.bytes_mut())?;
        Ok([own, all])
    }

    /// The same of [`exchange`](Self::exchange).
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn exchange_owned(&self, own: Memory, mut all: Memory) -> Result<[Memory; 2]> {
        self.exchange(own.bytes(), all.bytes_mut())?;
        Ok([own, all])
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn barrier(&self) -> Result<()> {
        self.all_gather(&[], &mut [])
    }

    /// Tells the other ranks that this one leaves, and why: whatever they wait for ends with an error.
    fn leave(&self, why: &str);

    /// Why the run ends, if this rank hears of it within `most`.
    fn failure_within(&self, _most: Duration) -> Option<String> {
        None
    }

    /// As [`all_gather`](Self::all_gather) of a device's memory, behind its launches so far; `all` holds `size` times the bytes
    /// of `own`. Without a library of the device the host moves them, which the simulator's memory allows.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather), and where nothing can move the device's memory.
    fn all_gather_on(&self, own: Span, all: Span) -> Result<()> {
        device::all_gather(self, own, all)
    }

    /// Sends and receives `parts` of a device's memory, behind its launches so far; none is this rank's own. What two ranks
    /// send each other has the same lengths, in the same order; what is received overlaps nothing else.
    ///
    /// # Errors
    /// As [`all_gather_on`](Self::all_gather_on).
    fn exchange_on(&self, parts: &[Part]) -> Result<()> {
        device::exchange(self, parts)
    }

    /// Compares a call on a device between the ranks before it is made, where nothing else does.
    ///
    /// # Errors
    /// When they differ.
    fn compare_device_call(&self, _kind: Kind, _count: usize) -> Result<()> {
        Ok(())
    }

    /// Says that a step of the device begins, which waits for those of other ranks.
    fn begin_device_step(&self) {}

    /// Says that the host begins or ends to wait for its device. Meanwhile a rank that does not begin the step is found, as in
    /// a call of the host.
    fn await_device(&self, _waiting: bool) {}

    /// From now on device calls repeat those that were compared.
    fn trust_device_calls(&self) {}

    /// Whether other ranks are in this process, and share its devices' memory.
    fn shares_process(&self) -> bool {
        false
    }

    /// Name and version of the library that moves device memory, if there is one.
    fn device_library(&self) -> Option<String> {
        None
    }

    /// Replaces `values` by their sums over the ranks.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn sum(&self, values: &mut [f64]) -> Result<()> {
        sums::sum(self, values)
    }

    /// The values of all ranks, rank 0 first.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn gather(&self, values: &[f64]) -> Result<Vec<f64>> {
        sums::gather(self, values)
    }

    /// The bytes of all ranks, rank 0 first; their numbers may differ.
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        sums::gather_bytes(self, own)
    }

    /// This rank's part of the sequences of a micro-batch: the rank-th of as many equal, consecutive
    /// parts as there are ranks. So micro-batch m of a step has the same sequences in the same places
    /// of the global batch on any number of ranks, and with it all counts, averages and draws.
    ///
    /// # Errors
    /// When the ranks cannot share the sequences equally.
    fn part(&self, sequences: Range<u64>) -> Result<Range<u64>> {
        let (count, ranks) = (sequences.end - sequences.start, self.size() as u64);
        if count % ranks != 0 {
            return Err(Error::invalid(
                "ranks",
                format!("a multiple of {ranks} sequences, one part of equal size for each rank"),
                count.to_string(),
                "change train.micro_batch or the number of ranks",
            ));
        }
        let first = sequences.start + self.rank() as u64 * (count / ranks);
        Ok(first..first + count / ranks)
    }
}

impl Collective for Arc<dyn Collective> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn size(&self) -> usize {
        (**self).size()
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        (**self).all_gather(own, all)
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        (**self).exchange(own, all)
    }

    fn all_gather_owned(&self, own: Memory, all: Memory) -> Result<[Memory; 2]> {
        (**self).all_gather_owned(own, all)
    }

    fn exchange_owned(&self, own: Memory, all: Memory) -> Result<[Memory; 2]> {
        (**self).exchange_owned(own, all)
    }

    fn barrier(&self) -> Result<()> {
        (**self).barrier()
    }

    fn leave(&self, why: &str) {
        (**self).leave(why);
    }

    fn failure_within(&self, most: Duration) -> Option<String> {
        (**self).failure_within(most)
    }

    fn all_gather_on(&self, own: Span, all: Span) -> Result<()> {
        (**self).all_gather_on(own, all)
    }

    fn exchange_on(&self, parts: &[Part]) -> Result<()> {
        (**self).exchange_on(parts)
    }

    fn compare_device_call(&self, kind: Kind, count: usize) -> Result<()> {
        (**self).compare_device_call(kind, count)
    }

    fn begin_device_step(&self) {
        (**self).begin_device_step();
    }

    fn await_device(&self, waiting: bool) {
        (**self).await_device(waiting);
    }

    fn trust_device_calls(&self) {
        (**self).trust_device_calls();
    }

    fn shares_process(&self) -> bool {
        (**self).shares_process()
    }

    fn device_library(&self) -> Option<String> {
        (**self).device_library()
    }

    fn sum(&self, values: &mut [f64]) -> Result<()> {
        (**self).sum(values)
    }
}

/// A run of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        all.copy_from_slice(own);
        Ok(())
    }

    fn exchange(&self, _own: &[u8], _all: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn leave(&self, _why: &str) {}
}
