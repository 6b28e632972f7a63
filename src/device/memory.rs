//! Memory of tensors: a block in host memory, in the memory of a device with kernels, or in both.
//!
//! The host reads and writes through [`Memory::bytes`], kernels through addresses. Memory that both use exists on
//! both sides, and is copied when one side accesses data that the other side wrote last. The simulator's kernels have
//! a separate memory as well, so copies that a GPU needs also happen, and are counted ([`super::counters`]), on the
//! simulator.
//!
//! Dropped host blocks return to a pool: training frees and allocates the same sizes repeatedly, and returning the
//! pages to the operating system each time would cost one page fault per 4 KB. Device blocks are allocated from the
//! device's [`Arena`](super::arena).

use super::side::Block;
use super::{Device, counters, graph};
use crate::error::Result;
use bytemuck::{Pod, Zeroable};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// The unit of host allocation. Its alignment, 128 bytes, is sufficient for vector loads.
#[repr(C, align(128))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Line([u8; 128]);

/// Free host blocks, by their number of lines.
static POOL: Mutex<BTreeMap<usize, Vec<Vec<Line>>>> = Mutex::new(BTreeMap::new());

fn pool() -> MutexGuard<'static, BTreeMap<usize, Vec<Vec<Line>>>> {
    POOL.lock().unwrap_or_else(|e| e.into_inner())
}

/// The side that wrote last.
#[derive(Clone, Copy, PartialEq)]
#[repr(u8)]
enum Newest {
    /// The host, or neither side.
    Host,
    Kernels,
    /// Both sides hold the same content.
    Both,
}

/// A block that has at least the requested length.
pub struct Memory {
    bytes: usize,
    /// Whether the content is zero if neither side has written it yet.
    zeros: bool,
    host: OnceLock<Host>,
    block: Mutex<Option<Block>>,
    newest: AtomicU8,
}

impl Memory {
    /// Allocates a block of `bytes` bytes with unspecified content. In a debug build the content is 0xFF, which is
    /// NaN in every float type, so that reading before writing is noticed.
    pub fn unspecified(bytes: usize) -> Self {
        Memory {
            bytes,
            zeros: false,
            host: OnceLock::new(),
            block: Mutex::default(),
            newest: AtomicU8::new(Newest::Host as u8),
        }
    }

    /// Allocates a block of zeros. The zeros are written on the side that accesses the block first.
    pub fn zeros(bytes: usize) -> Self {
        Memory {
            zeros: true,
            ..Self::unspecified(bytes)
        }
    }

    /// Returns the block's bytes; waits for kernels that write to the block.
    ///
    /// # Panics
    /// Panics when the GPU failed; the process must then be restarted.
    pub fn bytes(&self) -> &[u8] {
        if self.newest(Newest::Kernels) {
            self.bring();
        }
        self.host_block().slice(self.bytes)
    }

    /// Returns the block's bytes for writing.
    ///
    /// # Panics
    /// Panics in the same cases as [`bytes`](Self::bytes).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.newest(Newest::Kernels) {
            self.bring();
        }
        self.set(Newest::Host);
        self.host_block();
        let bytes = self.bytes;
        match self.host.get_mut() {
            Some(host) => &mut bytemuck::cast_slice_mut(&mut host.0)[..bytes],
            None => unreachable!("the block was made above"),
        }
    }

    /// Returns a copy of a range of the bytes, for writing large arrays to a file. If kernels wrote the bytes, no
    /// host block is kept.
    ///
    /// # Errors
    /// Returns an error when the GPU failed.
    pub fn copied(&self, range: Range<usize>) -> Result<Vec<u8>> {
        let block = self.own_block();
        match &*block {
            Some(block) if self.newest(Newest::Kernels) => {
                let mut out = vec![0; range.len()];
                block.read(range.start, &mut out)?;
                Ok(out)
            }
            _ => Ok(self.host_block().slice(self.bytes)[range].to_vec()),
        }
    }

    /// Returns a new block with a range of the bytes, on the side where they are.
    ///
    /// # Errors
    /// Returns an error when the device does not have enough memory.
    pub fn duplicate(&self, range: Range<usize>) -> Result<Self> {
        let mut copy = Memory::unspecified(range.len());
        let block = self.own_block();
        match &*block {
            Some(block) if !self.newest(Newest::Host) => {
                let own = Block::new(block.device(), range.len())?;
                own.copy_from(block, range)?;
                *copy.own_block() = Some(own);
                copy.set(Newest::Kernels);
            }
            _ => {
                let all = self.host_block().slice(self.bytes);
                copy.bytes_mut().copy_from_slice(&all[range]);
            }
        }
        Ok(copy)
    }

    /// Returns the address on `device` for a kernel that reads.
    ///
    /// # Errors
    /// Returns an error when the device does not have enough memory.
    pub fn address(&self, device: Device) -> Result<usize> {
        let slot = &mut *self.own_block();
        let fresh = slot.is_none();
        let block = match slot {
            Some(block) => block,
            None => slot.insert(Block::new(device, self.bytes)?),
        };
        assert_eq!(
            block.device(),
            device,
            "memory of one device given to another"
        );
        if self.newest(Newest::Host) {
            if let Some(host) = self.host.get() {
                if graph::capturing() {
                    graph::spoil("a copy to the device");
                } else {
                    block.write(host.slice(self.bytes))?;
                    self.set(Newest::Both);
                }
            } else if fresh && self.zeros {
                block.fill(0, self.bytes)?;
            } else if fresh && cfg!(debug_assertions) {
                block.fill(0xFF, self.bytes)?;
            }
        }
        counters::addressed(block.address());
        Ok(block.address())
    }

    /// Returns the address on `device` for a kernel that writes, and may also read.
    ///
    /// # Errors
    /// The same errors as [`address`](Self::address).
    pub fn address_mut(&mut self, device: Device) -> Result<usize> {
        let address = self.address(device)?;
        self.set(Newest::Kernels);
        self.host.take();
        Ok(address)
    }

    /// Copies the content to the host if kernels wrote it last.
    fn bring(&self) {
        let block = self.own_block();
        // Another thread may have copied it in the meantime.
        let Some(block) = block.as_ref().filter(|_| self.newest(Newest::Kernels)) else {
            return;
        };
        let mut host = Host::new(self.bytes);
        let bytes = &mut bytemuck::cast_slice_mut(&mut host.0)[..self.bytes];
        block.read(0, bytes).unwrap_or_else(|e| panic!("{e}"));
        // There is no slice of an older host block: kernels wrote through `&mut`, which removed that block.
        let _ = self.host.set(host);
        self.set(Newest::Both);
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

    fn own_block(&self) -> MutexGuard<'_, Option<Block>> {
        self.block.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn newest(&self, is: Newest) -> bool {
        self.newest.load(Ordering::Acquire) == is as u8
    }

    fn set(&self, newest: Newest) {
        self.newest.store(newest as u8, Ordering::Release);
    }
}

/// A block of host memory.
struct Host(Vec<Line>);

impl Host {
    fn new(bytes: usize) -> Self {
        let count = rounded_lines(bytes);
        let pooled = pool().get_mut(&count).and_then(Vec::pop);
        let mut lines = pooled.unwrap_or_else(|| vec![Line::zeroed(); count]);
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
        pool().entry(lines.len()).or_default().push(lines);
    }
}

/// Returns the size of the host block that holds `bytes` bytes.
pub fn rounded_bytes(bytes: u64) -> u64 {
    let line = size_of::<Line>();
    (rounded_lines(bytes as usize) * line) as u64
}

/// Returns the number of lines to allocate. Sizes are rounded up to eight steps per power of two, so that blocks for
/// slightly different row counts can be reused. At most an eighth of a block is unused.
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
            assert_eq!(m.address(Device::Sim).unwrap() % 128, 0);
        }
    }

    /// Writes to the block as a kernel would.
    fn write_as_kernel(m: &mut Memory, byte: u8) {
        let address = m.address_mut(Device::Sim).unwrap();
        // SAFETY: the block has this many bytes, and only this thread uses it.
        unsafe { std::ptr::write_bytes(address as *mut u8, byte, m.bytes) };
    }

    fn read_as_kernel(m: &Memory) -> Vec<u8> {
        let address = m.address(Device::Sim).unwrap();
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(address as *const u8, m.bytes) }.to_vec()
    }

    #[test]
    fn each_side_reads_what_the_other_wrote_last_and_copies_only_then() {
        let mut m = Memory::unspecified(300);
        counters::take();
        m.bytes_mut().fill(1);
        assert_eq!(read_as_kernel(&m), [1; 300]);
        assert_eq!(read_as_kernel(&m), [1; 300]);
        assert_eq!(m.bytes(), [1; 300]);
        assert_eq!((counters::take().uploads, counters::take().reads), (1, 0));
        write_as_kernel(&mut m, 2);
        write_as_kernel(&mut m, 3);
        assert_eq!(m.copied(0..300).unwrap(), [3; 300]);
        assert_eq!(m.bytes(), [3; 300]);
        assert_eq!(m.bytes(), [3; 300]);
        let counted = counters::take();
        assert_eq!((counted.uploads, counted.reads), (0, 2));
        m.bytes_mut()[0] = 4;
        assert_eq!(read_as_kernel(&m)[..2], [4, 3]);
        assert_eq!(counters::take().uploads, 1);
    }

    #[test]
    fn a_duplicate_is_made_on_the_side_of_the_content_and_is_independent() {
        let mut m = Memory::zeros(500);
        write_as_kernel(&mut m, 7);
        counters::take();
        let mut copy = m.duplicate(0..500).unwrap();
        write_as_kernel(&mut m, 8);
        assert_eq!(read_as_kernel(&copy), [7; 500]);
        assert_eq!((counters::take().reads, counters::take().uploads), (0, 0));
        copy.bytes_mut().fill(9);
        assert_eq!(copy.duplicate(100..500).unwrap().bytes(), [9; 400]);
        assert_eq!(m.bytes(), [8; 500]);
    }

    #[test]
    fn zeros_are_zeros_on_whichever_side_reads_first() {
        assert_eq!(Memory::zeros(1000).bytes(), [0; 1000]);
        counters::take();
        assert_eq!(read_as_kernel(&Memory::zeros(1000)), [0; 1000]);
        assert_eq!(counters::take().uploads, 0);
    }
}
