//! Bytes between processes by MPI.
//!
//! Calls are non-blocking and polled, so that a lost rank ends them with an error. MPI may write to the buffers of a call
//! that was given up; they are therefore this module's own, and are never freed then.

pub(super) mod library;

use super::Collective;
use super::processes::{Transport, Waiting};
use crate::error::Result;
use library::{Library, Request};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Bytes that a rank gives to MPI at a time, at most; on several ranks less, so that all of a call stay below 2^30.
const PIECE: usize = 8 << 20;

/// The ranks of a communicator.
pub(super) struct Mpi {
    library: Library,
    buffers: Mutex<Buffers>,
}

/// What MPI reads and writes.
#[derive(Default)]
struct Buffers {
    own: Vec<u8>,
    all: Vec<u8>,
}

impl Mpi {
    /// Initialises the first of the libraries `names` that is there.
    ///
    /// # Errors
    /// When none is, or it refuses.
    pub fn start(names: &[String]) -> Result<Self> {
        Library::start(names).map(Self::new)
    }

    /// The host of this rank.
    pub fn host(&self) -> &str {
        &self.library.host
    }

    fn new(library: Library) -> Self {
        Mpi {
            library,
            buffers: Mutex::default(),
        }
    }

    /// Begins a request on the buffers and waits for it. Buffers of a request that is not done are given up.
    fn run(
        &self,
        buffers: &mut Buffers,
        waiting: &mut Waiting,
        begin: impl FnOnce(&Library, &[u8], &mut [u8]) -> Result<Request>,
    ) -> Result<()> {
        waiting.renew();
        let waited = || {
            let mut request = begin(&self.library, &buffers.own, &mut buffers.all)?;
            while !self.library.done(&mut request)? {
                waiting.pause()?;
            }
            Ok(())
        };
        let done = waited();
        if done.is_err() {
            std::mem::forget(std::mem::take(buffers));
        }
        done
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

    fn all_gather(&self, own: &[u8], all: &mut [u8], waiting: &mut Waiting) -> Result<()> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let (n, size) = (own.len(), self.size());
        let most = PIECE.min((1 << 30) / size);
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            buffers.own.clear();
            buffers.own.extend_from_slice(&own[first..first + count]);
            buffers.all.resize(count * size, 0);
            self.run(&mut buffers, waiting, |library, own, all| {
                // SAFETY: `run` keeps the buffers.
                unsafe { library.all_gather(own, all) }
            })?;
            for (r, row) in buffers.all.chunks(count).enumerate() {
                all[r * n + first..][..count].copy_from_slice(row);
            }
        }
        Ok(())
    }

    fn exchange(&self, own: &[u8], all: &mut [u8], waiting: &mut Waiting) -> Result<()> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let size = self.size();
        let n = own.len() / size;
        let most = (PIECE / size).max(1);
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            buffers.own.clear();
            for r in 0..size {
                let row = &own[r * n + first..][..count];
                buffers.own.extend_from_slice(row);
            }
            buffers.all.resize(count * size, 0);
            self.run(&mut buffers, waiting, |library, own, all| {
                // SAFETY: `run` keeps the buffers.
                unsafe { library.all_to_all(own, all) }
            })?;
            for (r, row) in buffers.all.chunks(count).enumerate() {
                all[r * n + first..][..count].copy_from_slice(row);
            }
        }
        Ok(())
    }

    fn group(
        &self,
        size: usize,
        _all: &dyn Collective,
        _limit: Duration,
    ) -> Result<Box<dyn Transport>> {
        let library = self.library.group(size)?;
        Ok(Box::new(Self::new(library)))
    }

    fn finish(&self) {
        self.library.finalize();
    }
}
