//! The memory of devices with kernels: chunks, copies, and the blocks of an arena.

use super::arena::{ALIGNMENT, Arena, block_bytes};
use super::{Device, counters, graph};
use crate::error::{Error, Result};
use crate::report::size;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

static SIMULATOR: Mutex<Arena> = Mutex::new(Arena::new());
#[cfg(feature = "cuda")]
static GPU: Mutex<Arena> = Mutex::new(Arena::new());

/// Smallest number of bytes by which an arena grows.
const CHUNK: usize = 64 << 20;

fn arena(device: Device) -> MutexGuard<'static, Arena> {
    let arena = match device {
        Device::Sim => &SIMULATOR,
        #[cfg(feature = "cuda")]
        Device::Cuda => &GPU,
        _ => panic!("{device} has no kernels: a tensor was not moved to a device with kernels"),
    };
    arena.lock().unwrap_or_else(|e| e.into_inner())
}

/// A block of a device's memory, which returns to the arena when dropped. Launches run one after another, so the next
/// owner's writes happen after the last owner's reads.
pub struct Block {
    device: Device,
    address: usize,
    bytes: usize,
}

impl Block {
    /// Allocates a block of unspecified content.
    ///
    /// # Errors
    /// Returns an error when the device does not have enough memory.
    pub fn new(device: Device, bytes: usize) -> Result<Self> {
        let mut arena = arena(device);
        let address = match arena.take(bytes) {
            Some(address) => address,
            None => {
                match grow(&mut arena, device, bytes.max(CHUNK)) {
                    // Less than a chunk may be left, and still be enough.
                    Err(_) if bytes < CHUNK => grow(&mut arena, device, bytes)?,
                    grown => grown?,
                }
                arena
                    .take(bytes)
                    .unwrap_or_else(|| unreachable!("it has just grown"))
            }
        };
        Ok(Block {
            device,
            address,
            bytes,
        })
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn address(&self) -> usize {
        self.address
    }

    /// Copies from the host.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        debug_assert!(bytes.len() <= self.bytes);
        counters::uploaded();
        copies(self.device)?.write(self.address, bytes)
    }

    /// Copies the bytes at offset `at` to the host, after all launches so far.
    ///
    /// # Panics
    /// Panics in a capture, during which no result exists yet.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        debug_assert!(at + bytes.len() <= self.bytes);
        assert!(!graph::capturing(), "a copy to the host during a capture");
        counters::read();
        copies(self.device)?.read(self.address + at, bytes)
    }

    /// Sets the first `count` bytes.
    pub fn fill(&self, byte: u8, count: usize) -> Result<()> {
        debug_assert!(count <= self.bytes);
        copies(self.device)?.fill(self.address, byte, count)
    }

    /// Copies a range of another block of the same device to the start of this one.
    pub fn copy_from(&self, other: &Block, range: Range<usize>) -> Result<()> {
        debug_assert!(range.len() <= self.bytes && range.end <= other.bytes);
        debug_assert!(self.device == other.device);
        let from = other.address + range.start;
        copies(self.device)?.copy(self.address, from, range.len())
    }
}

/// Copies to, from and within a device's memory, at addresses of its blocks.
trait Copies {
    fn write(&self, to: usize, bytes: &[u8]) -> Result<()>;
    fn read(&self, from: usize, bytes: &mut [u8]) -> Result<()>;
    fn fill(&self, to: usize, byte: u8, count: usize) -> Result<()>;
    fn copy(&self, to: usize, from: usize, count: usize) -> Result<()>;
    fn send(&self, ranges: &[(usize, usize)]) -> Result<Sent>;
}

/// Copies `count` bytes within a device's blocks, behind the launches so far.
///
/// # Errors
/// When the device failed.
pub fn copy(device: Device, to: usize, from: usize, count: usize) -> Result<()> {
    copies(device)?.copy(to, from, count)
}

/// A copy of device memory on its way to the host.
pub enum Sent {
    /// The bytes themselves: the simulator copies immediately.
    Arrived(Vec<u8>),
    /// Bytes that a GPU is copying.
    #[cfg(feature = "cuda")]
    UnderWay(super::pinned::PinnedReadback),
}

/// Starts to copy ranges of a device's blocks, given as (address, bytes), to the host, after the launches so far.
///
/// # Errors
/// Returns an error when the device failed.
///
/// # Panics
/// Panics in a capture, during which no result exists yet.
pub fn send(device: Device, ranges: &[(usize, usize)]) -> Result<Sent> {
    assert!(!graph::capturing(), "a copy to the host during a capture");
    copies(device)?.send(ranges)
}

impl Sent {
    /// Waits for the copy, and returns the concatenated bytes of the ranges. Later launches need not have finished.
    ///
    /// # Errors
    /// Returns the error of an earlier launch.
    pub fn receive(self) -> Result<Vec<u8>> {
        match self {
            Sent::Arrived(bytes) => Ok(bytes),
            #[cfg(feature = "cuda")]
            Sent::UnderWay(readback) => super::cuda::gpu()?.receive(readback),
        }
    }
}

fn copies(device: Device) -> Result<&'static dyn Copies> {
    match device {
        Device::Sim => Ok(&Simulator),
        #[cfg(feature = "cuda")]
        _ => Ok(super::cuda::gpu()?),
        #[cfg(not(feature = "cuda"))]
        _ => unreachable!("blocks are of the simulator"),
    }
}

/// No launch is running when a launcher has returned, so all copies are done immediately.
struct Simulator;

// SAFETY of all: blocks have the bytes that Block checks, and two blocks do not overlap.
impl Copies for Simulator {
    fn write(&self, to: usize, bytes: &[u8]) -> Result<()> {
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn read(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        unsafe {
            std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len());
        }
        Ok(())
    }

    fn fill(&self, to: usize, byte: u8, count: usize) -> Result<()> {
        let fill = move || {
            unsafe { std::ptr::write_bytes(to as *mut u8, byte, count) };
            Ok(())
        };
        now_or_recorded(fill)
    }

    fn copy(&self, to: usize, from: usize, count: usize) -> Result<()> {
        let copy = move || {
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, count) };
            Ok(())
        };
        now_or_recorded(copy)
    }

    fn send(&self, ranges: &[(usize, usize)]) -> Result<Sent> {
        let bytes = |&(from, count): &(usize, usize)| unsafe {
            std::slice::from_raw_parts(from as *const u8, count)
        };
        Ok(Sent::Arrived(
            ranges.iter().flat_map(bytes).copied().collect(),
        ))
    }
}

fn now_or_recorded(operation: impl Fn() -> Result<()> + 'static) -> Result<()> {
    if !graph::capturing() {
        return operation();
    }
    graph::record(operation);
    Ok(())
}

#[cfg(feature = "cuda")]
impl Copies for super::cuda::Gpu {
    fn write(&self, to: usize, bytes: &[u8]) -> Result<()> {
        self.upload(to, bytes)
    }

    fn read(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        self.download(from, bytes)
    }

    fn fill(&self, to: usize, byte: u8, count: usize) -> Result<()> {
        self.fill(to, byte, count)
    }

    fn copy(&self, to: usize, from: usize, count: usize) -> Result<()> {
        self.copy(to, from, count)
    }

    fn send(&self, ranges: &[(usize, usize)]) -> Result<Sent> {
        self.send(ranges).map(Sent::UnderWay)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        arena(self.device).give(self.address, self.bytes);
    }
}

/// Reserves `bytes` contiguous bytes before a run begins, so that no step has to request memory.
///
/// # Errors
/// Returns an error when the device has less memory; it states how much is available.
pub fn reserve(device: Device, bytes: usize) -> Result<()> {
    grow(&mut arena(device), device, bytes).map_err(|e| {
        let needed = format!("{} for this run", size(bytes as u64));
        let help = "lower train.micro_batch, set train.recompute = true, or choose a smaller --preset; \
                    `routegrad plan` says what fits";
        Error::invalid("memory", needed, e.to_string(), help)
    })
}

/// Calls `work` with the free ranges of the memory. No block is allocated during the call.
pub fn with_free_ranges<R>(device: Device, work: impl FnOnce(&BTreeMap<usize, usize>) -> R) -> R {
    work(arena(device).free_ranges())
}

/// Returns the peak number of bytes of blocks in use since the last call.
pub fn take_peak(device: Device) -> usize {
    let mut arena = arena(device);
    let peak = arena.peak();
    arena.forget_peak();
    peak
}

fn grow(arena: &mut Arena, device: Device, bytes: usize) -> Result<()> {
    let bytes = block_bytes(bytes);
    counters::allocated();
    let address = match device {
        Device::Sim => host_chunk(bytes)?,
        #[cfg(feature = "cuda")]
        _ => super::cuda::gpu()?.chunk(bytes)?,
        #[cfg(not(feature = "cuda"))]
        _ => unreachable!("arenas are of the simulator"),
    };
    arena.grow(address, bytes);
    Ok(())
}

/// Allocates host memory that is never freed. Its pages are mapped when they are first used.
fn host_chunk(bytes: usize) -> Result<usize> {
    let no_room = || {
        let help = "choose a smaller model, or lower train.micro_batch";
        Error::invalid(
            "device sim",
            "room for its memory",
            format!("none for {bytes} bytes"),
            help,
        )
    };
    let layout = std::alloc::Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| no_room())?;
    // SAFETY: the size is not 0.
    let address = unsafe { std::alloc::alloc(layout) };
    if address.is_null() {
        return Err(no_room());
    }
    Ok(address as usize)
}
