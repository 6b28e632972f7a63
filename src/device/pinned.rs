//! Pinned memory of the host, which the GPU copies from and to while the host goes on.

use super::counters;
use super::driver::error;
use crate::error::Result;
use cudarc::driver::{CudaEvent, DriverError, result};
use std::sync::Mutex;

/// Pinned memory of the host that small copies go through, so that none of them has to wait: two halves, each filled from
/// its start while the copies out of the other are under way.
pub(super) struct Staging {
    halves: [*mut u8; 2],
    /// Behind the last copy out of each half.
    left: [Option<CudaEvent>; 2],
    current: usize,
    at: usize,
}

// SAFETY: the memory belongs to the struct, and a mutex guards it.
unsafe impl Send for Staging {}

impl Staging {
    /// More than the tokens and targets of a step of the paper's models, so that the next one's never wait for this one.
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

    /// A copy of `bytes` in pinned memory, where they fit; `mark` records a point behind the copies so far.
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
        // SAFETY: the range lies inside the half, and no copy reads it any more.
        let staged = unsafe {
            let to = self.halves[self.current].add(self.at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            std::slice::from_raw_parts(to, bytes.len())
        };
        self.at += bytes.len();
        Ok(Some(staged))
    }
}

/// Where copies to the host land: blocks that are taken for one, and given back when it was read.
#[derive(Default)]
pub(super) struct PinnedReadbacks(Mutex<Vec<Pinned>>);

struct Pinned {
    memory: *mut u8,
    capacity: usize,
}

// SAFETY: the memory belongs to the struct, and is written through `&mut` alone.
unsafe impl Send for Pinned {}

/// A copy under way. One that is dropped keeps its block for ever: the GPU may still write there.
pub struct PinnedReadback {
    block: Pinned,
    bytes: usize,
    over: Option<CudaEvent>,
}

impl PinnedReadback {
    /// Where the copy goes.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the block has so many bytes, and was zeroed.
        unsafe { std::slice::from_raw_parts_mut(self.block.memory, self.bytes) }
    }

    /// The same, with the mark behind the copy.
    pub(super) fn over_at(mut self, mark: CudaEvent) -> Self {
        self.over = Some(mark);
        self
    }
}

impl PinnedReadbacks {
    fn blocks(&self) -> std::sync::MutexGuard<'_, Vec<Pinned>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Room for `bytes` bytes.
    ///
    /// # Errors
    /// When the host has none that can be pinned.
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

    /// Waits for the copy alone, and takes the block back.
    ///
    /// # Errors
    /// What a launch before it met.
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
