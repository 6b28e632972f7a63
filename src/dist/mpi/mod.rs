//! Transfers bytes between processes by MPI.
//!
//! Calls are non-blocking and polled, so that a lost rank ends them with an error. MPI may still write to the buffers
//! of a call that ended with an error. This module therefore owns the buffers, and never frees them after an error.

pub(super) mod library;

use super::Collective;
use super::processes::{Transfer, Transport, Waiting};
use crate::device::Memory;
use crate::error::Result;
use library::Library;
use std::mem::{self, ManuallyDrop};
use std::time::Duration;

/// Largest number of bytes that a rank gives to MPI at a time. With many ranks it is smaller, so that a call has at
/// most 2^30 bytes.
const PIECE: usize = 8 << 20;

/// Largest number of bytes of all ranks that MPI transfers at once without copies. Even on a slow network this takes
/// only a part of the time limit.
const AT_ONCE: usize = 8 * PIECE;

/// The ranks of a communicator.
pub(super) struct Mpi {
    library: Library,
}

impl Mpi {
    /// Initialises the first library of `names` that exists.
    ///
    /// # Errors
    /// Returns an error when no library exists, or MPI fails.
    pub fn start(names: &[String]) -> Result<Self> {
        let library = Library::start(names)?;
        Ok(Mpi { library })
    }

    /// The host of this rank.
    pub fn host(&self) -> &str {
        &self.library.host
    }

    /// Begins a request on the buffers and waits for it. After an error the buffers are not freed.
    fn run(
        &self,
        kind: Transfer,
        own: Memory,
        mut all: Memory,
        waiting: &mut Waiting,
    ) -> Result<[Memory; 2]> {
        waiting.renew();
        let begin = match kind {
            Transfer::AllGather => Library::all_gather,
            Transfer::Exchange => Library::all_to_all,
        };
        let mut waited = || {
            // SAFETY: the buffers and the request stay valid until the request is done, or forever.
            let request = unsafe { begin(&self.library, own.bytes(), all.bytes_mut()) }?;
            let mut request = ManuallyDrop::new(request);
            while !self.library.done(&mut request)? {
                waiting.pause()?;
            }
            drop(ManuallyDrop::into_inner(request));
            Ok(())
        };
        match waited() {
            Ok(()) => Ok([own, all]),
            Err(e) => {
                mem::forget([own, all]);
                Err(e)
            }
        }
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.library.rank
    }

    fn size(&self) -> usize {
        self.library.size
    }

    fn name(&self) -> &str {
        &self.library.version
    }

    fn transfer(
        &self,
        kind: Transfer,
        own: &[u8],
        all: &mut [u8],
        waiting: &mut Waiting,
    ) -> Result<()> {
        let size = self.size();
        // The rows that this rank gives, and the bytes of each that MPI moves at a time.
        let (rows, most) = match kind {
            Transfer::AllGather => (1, PIECE.min((1 << 30) / size)),
            Transfer::Exchange => (size, (PIECE / size).max(1)),
        };
        let n = own.len() / rows;
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            let mut piece = Memory::unspecified(count * rows);
            for (r, row) in piece.bytes_mut().chunks_mut(count).enumerate() {
                row.copy_from_slice(&own[r * n + first..][..count]);
            }
            let moved = Memory::unspecified(count * size);
            let [_, moved] = self.run(kind, piece, moved, waiting)?;
            for (r, row) in moved.bytes().chunks(count).enumerate() {
                if kind == Transfer::AllGather || r != self.rank() {
                    all[r * n + first..][..count].copy_from_slice(row);
                }
            }
        }
        Ok(())
    }

    fn transfer_owned(
        &self,
        kind: Transfer,
        own: Memory,
        mut all: Memory,
        waiting: &mut Waiting,
    ) -> Result<[Memory; 2]> {
        if all.bytes().len() <= AT_ONCE {
            return self.run(kind, own, all, waiting);
        }
        self.transfer(kind, own.bytes(), all.bytes_mut(), waiting)?;
        Ok([own, all])
    }

    fn group(
        &self,
        size: usize,
        _all: &dyn Collective,
        _limit: Duration,
    ) -> Result<Box<dyn Transport>> {
        let library = self.library.group(size)?;
        Ok(Box::new(Mpi { library }))
    }

    fn finish(&self) {
        self.library.finalize();
    }
}
