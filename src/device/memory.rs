//! Memory of tensors: a block of the host, of the GPU, or of both.
//!
//! The host reads and writes through [`Memory::bytes`], kernels through addresses. Memory that both use is kept on both
//! sides and copied when one side asks for what the other wrote last: code that has no kernel yet runs on the host and
//! gives the same result, only slower. On the simulator both sides are the host's.
//!
//! Blocks return to a pool when dropped: a training step frees and asks for the same sizes again and again, and handing
//! the pages back each time would cost a page fault per 4 KB.

use bytemuck::{Pod, Zeroable};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock};

/// The unit of allocation; its alignment (128 bytes) serves vector loads and the kernels' bulk copies.
#[repr(C, align(128))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Line([u8; 128]);

/// Blocks that nobody uses, by their size.
struct Pool<T>(Mutex<BTreeMap<usize, Vec<T>>>);

impl<T> Pool<T> {
    const fn new() -> Self {
        Pool(Mutex::new(BTreeMap::new()))
    }

    fn blocks(&self) -> MutexGuard<'_, BTreeMap<usize, Vec<T>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn take(&self, size: usize) -> Option<T> {
        self.blocks().get_mut(&size)?.pop()
    }

    fn give(&self, size: usize, block: T) {
        self.blocks().entry(size).or_default().push(block);
    }
}

static POOL: Pool<Vec<Line>> = Pool::new();

/// A block, at least as long as was asked for.
pub struct Memory {
    bytes: usize,
    /// What neither side has written yet is 0.
    zeros: bool,
    host: OnceLock<Host>,
    #[cfg(feature = "cuda")]
    gpu: gpu::Side,
}

impl Memory {
    /// A block of `bytes` bytes whose content is unspecified (on the host of a debug build 0xFF: NaN in every float
    /// type, so that reading before writing shows).
    pub fn unspecified(bytes: usize) -> Self {
        Memory {
            bytes,
            zeros: false,
            host: OnceLock::new(),
            #[cfg(feature = "cuda")]
            gpu: gpu::Side::default(),
        }
    }

    /// A block of zeros, written where they are asked for first.
    pub fn zeros(bytes: usize) -> Self {
        Memory {
            zeros: true,
            ..Self::unspecified(bytes)
        }
    }

    /// The block's bytes; waits for what kernels write there.
    ///
    /// # Panics
    /// When the GPU failed: the process must start anew.
    pub fn bytes(&self) -> &[u8] {
        #[cfg(feature = "cuda")]
        self.gpu.bring(self);
        self.host_block().slice(self.bytes)
    }

    /// The block's bytes, to write.
    ///
    /// # Panics
    /// As [`bytes`](Self::bytes).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        #[cfg(feature = "cuda")]
        {
            self.gpu.bring(self);
            self.gpu.forget();
        }
        self.host_block();
        let bytes = self.bytes;
        match self.host.get_mut() {
            Some(host) => &mut bytemuck::cast_slice_mut(&mut host.0)[..bytes],
            None => unreachable!("the block was made above"),
        }
    }

    fn host_block(&self) -> &Host {
        self.host.get_or_init(|| {
            let mut host = Host::new(self.bytes);
            if self.zeros {
                host.0.fill(Line::zeroed());
            }
            host
        })
    }
}

/// A block of host memory.
struct Host(Vec<Line>);

impl Host {
    fn new(bytes: usize) -> Self {
        let count = rounded_lines(bytes);
        let mut lines = POOL
            .take(count)
            .unwrap_or_else(|| vec![Line::zeroed(); count]);
        if cfg!(debug_assertions) {
            lines.fill(Line([0xFF; 128]));
        }
        Host(lines)
    }

    fn slice(&self, bytes: usize) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[..bytes]
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.0);
        POOL.give(lines.len(), lines);
    }
}

/// The GPU's side of a block.
#[cfg(feature = "cuda")]
mod gpu {
    use super::{Host, Memory, Pool, rounded_bytes};
    use crate::device::cuda::{self, DeviceMemory};
    use crate::device::timeline;
    use crate::error::Result;
    use std::sync::{Mutex, MutexGuard};

    static POOL: Pool<DeviceMemory> = Pool::new();

    /// Who wrote last.
    #[derive(Clone, Copy, Default, PartialEq)]
    enum Newest {
        /// The host, or nobody.
        #[default]
        Host,
        Gpu,
        /// Both sides hold the same.
        Both,
    }

    #[derive(Default)]
    struct State {
        block: Option<DeviceMemory>,
        newest: Newest,
    }

    #[derive(Default)]
    pub struct Side(Mutex<State>);

    impl Side {
        fn state(&self) -> MutexGuard<'_, State> {
            self.0.lock().unwrap_or_else(|e| e.into_inner())
        }

        /// Brings to the host what the GPU wrote last.
        pub fn bring(&self, memory: &Memory) {
            let mut state = self.state();
            if state.newest != Newest::Gpu {
                return;
            }
            let mut host = Host::new(memory.bytes);
            if let Some(block) = &state.block {
                let bytes = &mut bytemuck::cast_slice_mut(&mut host.0)[..memory.bytes];
                block.read(0, bytes).unwrap_or_else(|e| panic!("{e}"));
                timeline::copied(true, memory.bytes);
            }
            // Nobody holds a slice of an older host block: kernels wrote through `&mut`, which took it away.
            let _ = memory.host.set(host);
            state.newest = Newest::Both;
        }

        /// The host is about to write.
        pub fn forget(&self) {
            self.state().newest = Newest::Host;
        }
    }

    impl Memory {
        /// Address on the GPU for a kernel that reads.
        ///
        /// # Errors
        /// When there is no room.
        pub fn gpu_address(&self) -> Result<usize> {
            let state = &mut *self.gpu.state();
            let fresh = state.block.is_none();
            let block = own(&mut state.block, self.bytes)?;
            if state.newest == Newest::Host {
                if let Some(host) = self.host.get() {
                    block.write(0, host.slice(self.bytes))?;
                    timeline::copied(false, self.bytes);
                    state.newest = Newest::Both;
                } else if fresh && (self.zeros || cfg!(debug_assertions)) {
                    block.fill(0, self.bytes, if self.zeros { 0 } else { 0xFF })?;
                }
            }
            Ok(block.address())
        }

        /// Address on the GPU for a kernel that writes, and may read what is there.
        ///
        /// # Errors
        /// As [`gpu_address`](Self::gpu_address).
        pub fn gpu_address_mut(&mut self) -> Result<usize> {
            let address = self.gpu_address()?;
            self.gpu.state().newest = Newest::Gpu;
            self.host.take();
            Ok(address)
        }
    }

    fn own(block: &mut Option<DeviceMemory>, bytes: usize) -> Result<&mut DeviceMemory> {
        if block.is_none() {
            let bytes = rounded_bytes(bytes as u64) as usize;
            *block = Some(match POOL.take(bytes) {
                Some(block) => block,
                None => cuda::gpu()?.allocate(bytes).or_else(|_| {
                    // What the pool keeps for other sizes may be the room that is missing.
                    POOL.blocks().clear();
                    cuda::gpu()?.allocate(bytes)
                })?,
            });
        }
        match block {
            Some(block) => Ok(block),
            None => unreachable!("made above"),
        }
    }

    impl Drop for Side {
        fn drop(&mut self) {
            // Launches run one after another, so that the next owner writes after the last has read.
            if let Some(block) = self.state().block.take() {
                POOL.give(block.bytes(), block);
            }
        }
    }
}

/// Bytes of the block that holds `bytes`.
pub fn rounded_bytes(bytes: u64) -> u64 {
    let line = size_of::<Line>();
    (rounded_lines(bytes as usize) * line) as u64
}

/// Lines to allocate: sizes are rounded up to eight steps per power of two, so that ragged row
/// counts reuse each other's blocks at a waste of at most an eighth.
fn rounded_lines(bytes: usize) -> usize {
    let lines = bytes.div_ceil(size_of::<Line>()).max(1);
    let step = (lines.next_power_of_two() / 16).max(1);
    lines.div_ceil(step) * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_wastes_at_most_an_eighth() {
        for bytes in (1..100_000usize).step_by(37) {
            let lines = bytes.div_ceil(128);
            assert!(rounded_lines(bytes) >= lines);
            assert!(rounded_lines(bytes) <= lines + lines.div_ceil(8));
        }
    }

    #[test]
    fn memory_is_aligned_for_bulk_copies() {
        for bytes in [1, 127, 4096, 100_001] {
            let m = Memory::unspecified(bytes);
            assert_eq!(m.bytes().len(), bytes);
            assert_eq!(m.bytes().as_ptr() as usize % 128, 0);
        }
    }
}
