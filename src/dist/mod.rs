//! Communication between the ranks of a run. The same code runs on one rank and on several.
//!
//! A backend only transfers bytes, with [`all_gather`](Collective::all_gather) and [`exchange`](Collective::exchange).
//! This crate computes every sum, in an order that depends only on the number of ranks, so that the bytes of a sum depend
//! on neither the backend nor its algorithms.

mod activity; // what a rank is doing, for messages
mod call; // ordinal, kind and count of a call, compared between ranks
mod device; // the two transfers of device memory
mod handshake; // authentication of a TCP connection between two ranks
mod hub; // heartbeats, and one message when a rank is lost
mod load; // loads the libraries of MPI and NCCL at run time
mod mpi; // transfers between processes by MPI, which is loaded at run time
pub mod nccl; // transfers between GPUs by NCCL, which is loaded at run time
mod processes; // ranks are processes
mod start; // starts a rank from the environment of the launcher
mod sums; // sums and gathers, built on the two transfers
mod tcp; // transfers between processes by TCP
mod threads; // ranks are threads of one process

pub use activity::{at, doing, doing_alone};
pub use call::Kind;
pub use device::{DeviceRanks, Part};
pub use start::{
    Launcher, Ranks, conclude, describe, groups, launcher, launcher_size, start, threads,
};
pub(crate) use sums::lost;
pub use sums::{agree, any, same_on_all, shared};
pub use threads::ThreadRank;

use crate::device::{Memory, Span};
use crate::error::{Error, Result};
use std::ops::Range;
use std::time::Duration;

/// One rank of a run, and its calls to communicate with the other ranks.
///
/// Every rank makes the same calls in the same order, with the same number of bytes. The backends compare the ordinal,
/// kind and count of each call; a difference is an error on all ranks.
pub trait Collective: Send + Sync {
    /// Returns the number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Returns the number of ranks.
    fn size(&self) -> usize;

    /// Copies the n bytes of `own` of every rank to `all` `[size, n]`, rank 0 first.
    ///
    /// # Errors
    /// Returns an error when a rank has left or makes a different call, or the call takes too long.
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()>;

    /// Sends row r of `own` `[size, n]` to each other rank r; row r of `all` `[size, n]` receives what rank r sends to
    /// this rank. The row of this rank in `all` does not change.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather).
    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()>;

    /// Does the same as [`all_gather`](Self::all_gather) with buffers that the backend owns during the call and returns
    /// as `[own, all]`. A backend whose library may access buffers after a failed call must copy buffers that it does
    /// not own.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather).
    fn all_gather_owned(&self, own: Memory, mut all: Memory) -> Result<[Memory; 2]> {
        self.all_gather(own.bytes(), all.bytes_mut())?;
        Ok([own, all])
    }

    /// Does the same as [`exchange`](Self::exchange) with buffers as in [`all_gather_owned`](Self::all_gather_owned).
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather).
    fn exchange_owned(&self, own: Memory, mut all: Memory) -> Result<[Memory; 2]> {
        self.exchange(own.bytes(), all.bytes_mut())?;
        Ok([own, all])
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather).
    fn barrier(&self) -> Result<()> {
        self.all_gather(&[], &mut [])
    }

    /// Tells the other ranks that this one leaves, and why. Their current and later calls end with an error.
    fn leave(&self, why: &str);

    /// Returns why the run ends, if this rank learns it within `most`.
    fn failure_within(&self, _most: Duration) -> Option<String> {
        None
    }

    /// Does the same as [`all_gather`](Self::all_gather) with the memory of a device, after all earlier launches on it;
    /// `all` holds `size` times the bytes of `own`. Without a library for the device the host transfers the bytes,
    /// which works for the memory of the simulator.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather), and an error when nothing can transfer the memory of the
    /// device.
    fn all_gather_on(&self, own: Span, all: Span) -> Result<()> {
        device::all_gather(self, own, all)
    }

    /// Sends and receives `parts` of the memory of a device, after all earlier launches on it. No part has this rank as
    /// its peer. Two ranks give the parts between them in the same order, with the same lengths. A range that receives
    /// overlaps no other range.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather_on`](Self::all_gather_on).
    fn exchange_on(&self, parts: &[Part]) -> Result<()> {
        device::exchange(self, parts)
    }

    /// Compares a device call between the ranks before they make it, if the call itself does not compare.
    ///
    /// # Errors
    /// Returns an error when the calls differ.
    fn compare_device_call(&self, _kind: Kind, _count: usize) -> Result<()> {
        Ok(())
    }

    /// Says that all ranks have finished their run. Connections between devices are freed only after this: a rank that frees
    /// them waits for the others, which do not come after an error.
    fn finished(&self) {}

    /// Records that a step of the device begins, which waits for the steps of other ranks.
    fn begin_device_step(&self) {}

    /// Records that the host starts (`true`) or ends (`false`) waiting for its device. During the wait, a rank that
    /// does not begin the step is detected, as in a call of the host.
    fn await_device(&self, _waiting: bool) {}

    /// Declares that all further device calls repeat calls that were compared.
    fn trust_device_calls(&self) {}

    /// Whether other ranks are in this process and share the memory of its devices.
    fn shares_process(&self) -> bool {
        false
    }

    /// Returns the number of ranks on each node if it is a power of two, the same on every node, and the ranks of a node
    /// have consecutive numbers; otherwise the number of all ranks.
    fn ranks_per_node(&self) -> usize {
        self.size()
    }

    /// Returns the name and version of the library that transfers device memory, if there is one.
    fn device_library(&self) -> Option<String> {
        None
    }

    /// Replaces `values` by their sums over the ranks.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather).
    fn sum(&self, values: &mut [f64]) -> Result<()> {
        sums::sum(self, values)
    }

    /// Returns the values of all ranks, rank 0 first.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather).
    fn gather(&self, values: &[f64]) -> Result<Vec<f64>> {
        sums::gather(self, values)
    }

    /// Returns the bytes of each rank, rank 0 first; ranks may give different numbers of bytes.
    ///
    /// # Errors
    /// Returns the errors of [`all_gather`](Self::all_gather).
    fn gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        sums::gather_bytes(self, own)
    }

    /// Returns this rank's part of the sequences of a micro-batch, which is divided into one part for each rank:
    /// consecutive parts of equal size, in rank order. Micro-batch m of a step therefore has the same sequences at the
    /// same positions of the global batch on any number of ranks, and so all counts, averages and random draws are the
    /// same.
    ///
    /// # Errors
    /// Returns an error when the number of ranks does not divide the number of sequences.
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
