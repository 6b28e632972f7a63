//! Pinned host memory, which the GPU reads and writes while the host continues.

use super::counters;
use super::driver::error;
use crate::error::Result;
use cudarc::driver::{CudaEvent, DriverError, result};
use std::sync::Mutex;

/// Pinned host memory for small copies to the GPU, so that these need not wait. It has two halves; one is filled from
/// its start while the copies from the other are in progress.
pub(super) struct Staging {
    halves: [*mut u8; 2],
    /// The event after the last copy from each half.
    left: [Option<CudaEvent>; 2],
    current: usize,
    at: usize,
}

// SAFETY: the memory belongs to the struct, and a mutex guards it.
unsafe impl Send for Staging {}

impl Staging {
    /// Larger than the tokens and targets of a step of the paper's models, so that the copies of the next step never
    /// wait for this step.
    const HALF: usize = 32 << 20;

    pub fn new() -> Result<Self, DriverError> {
        // SAFETY: the memory lives as long as the process.
        let half = || unsafe { result::malloc_host(Self::HALF, 0) }.map(|p| p.cast());
        Ok(Staging {
            halves: [half()?, half()?],
            left: [None, None],
            current: 0,
            at: 0,
        })
    }

    /// Copies `bytes` to pinned memory, if they fit, and returns the copy; `mark` records an event after the copies
    /// so far.
    pub fn stage(
        &mut self,
        bytes: &[u8],
        mark: impl Fn() -> Result<CudaEvent>,
    ) -> Result<Option<&'static [u8]>> {
        if bytes.len() > Self::HALF {
            return Ok(None);
        }
        if self.at + bytes.len() > Self::HALF {
            self.left[self.current] = Some(mark()?);
            self.current = 1 - self.current;
            self.at = 0;
            if let Some(left) = self.left[self.current].take() {
                if !left.is_complete() {
                    counters::waited();
                }
                left.synchronize()
                    .map_err(|e| error("wait for its copies", e))?;
            }
        }
        // SAFETY: the range is inside the half, and no copy reads it any more.
        let staged = unsafe {
            let to = self.halves[self.current].add(self.at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            std::slice::from_raw_parts(to, bytes.len())
        };
        self.at += bytes.len();
        Ok(Some(staged))
    }
}

/// The destinations of copies to the host: blocks that are reserved for one copy, and released when it was read.
#[derive(Default)]
pub(super) struct PinnedReadbacks(Mutex<Vec<Pinned>>);

struct Pinned {
    memory: *mut u8,
    capacity: usize,
}

// SAFETY: the memory belongs to the struct, and is written only through `&mut`.
unsafe impl Send for Pinned {}

/// A copy in progress. If it is dropped, its block is never released, because the GPU may still write to it.
pub struct PinnedReadback {
    block: Pinned,
    bytes: usize,
    over: Option<CudaEvent>,
}

impl PinnedReadback {
    /// Returns the destination of the copy.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the block has this many bytes, and was zeroed.
        unsafe { std::slice::from_raw_parts_mut(self.block.memory, self.bytes) }
    }

    /// Sets the event after the copy.
    pub(super) fn over_at(mut self, mark: CudaEvent) -> Self {
        self.over = Some(mark);
        self
    }
}

impl PinnedReadbacks {
    fn blocks(&self) -> std::sync::MutexGuard<'_, Vec<Pinned>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Reserves `bytes` bytes for a copy to the host.
    ///
    /// # Errors
    /// Returns an error when the host cannot pin this much memory.
    pub fn take(&self, bytes: usize) -> Result<PinnedReadback> {
        let mut blocks = self.blocks();
        let found = blocks.iter().position(|block| block.capacity >= bytes);
        let block = match found {
            Some(place) => blocks.swap_remove(place),
            None => Pinned::new(bytes).map_err(|e| error("pin memory of the host", e))?,
        };
        Ok(PinnedReadback {
            block,
            bytes,
            over: None,
        })
    }

    /// Waits only for the copy, releases the block, and returns the bytes.
    ///
    /// # Errors
    /// Returns the error of an earlier launch.
    pub fn receive(&self, mut readback: PinnedReadback) -> Result<Vec<u8>> {
        if let Some(over) = readback.over.take() {
            if !over.is_complete() {
                counters::waited();
            }
            over.synchronize()
                .map_err(|e| error("wait for a copy", e))?;
        }
        let bytes = readback.bytes_mut().to_vec();
        self.blocks().push(readback.block);
        Ok(bytes)
    }
}

impl Pinned {
    fn new(capacity: usize) -> Result<Self, DriverError> {
        // SAFETY: the memory lives as long as the process, and is zeroed before anyone sees it.
        let memory = unsafe {
            let memory = result::malloc_host(capacity.max(1), 0)?.cast::<u8>();
            memory.write_bytes(0, capacity);
            memory
        };
        Ok(Pinned { memory, capacity })
    }
}
