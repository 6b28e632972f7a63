//! The machines on which a kernel case runs: the simulator with host memory, or a GPU with its own memory.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::launchers::{self, Launchers};
use crate::kernels::{Buffer, Stream};

/// A build of the kernels, and the memory that they use.
pub trait Machine {
    /// Returns the launchers of the build.
    fn launchers(&self) -> &'static Launchers;
    /// Returns the stream for launches from this thread.
    fn stream(&self) -> Result<Stream>;
    /// Allocates `bytes` bytes, aligned to 128; the content is not specified.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block + '_>>;
    /// Waits for all launches; returns an error if one failed.
    fn finish(&self) -> Result<()>;
}

/// Memory of a machine. A copy runs after all earlier launches and is complete on return.
pub trait Block {
    /// Returns the address of the first byte.
    fn address(&self) -> usize;
    /// Copies `bytes` into the memory, from byte `at` on.
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()>;
    /// Sets `count` bytes to `byte`, from byte `at` on.
    fn fill(&mut self, at: usize, count: usize, byte: u8) -> Result<()>;
    /// Copies the memory to `bytes`, from byte `at` on.
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()>;
}

/// The simulator.
pub struct Simulator {
    launchers: &'static Launchers,
}

impl Simulator {
    /// # Errors
    /// When the variant named in the environment cannot be loaded.
    pub fn new() -> Result<Self> {
        Ok(Self {
            launchers: launchers::sim()?,
        })
    }
}

impl Machine for Simulator {
    fn launchers(&self) -> &'static Launchers {
        self.launchers
    }
    fn stream(&self) -> Result<Stream> {
        Stream::of(Device::Sim)
    }
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block + '_>> {
        Ok(Box::new(Lines(vec![Line([0; 128]); bytes.div_ceil(128)])))
    }
    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

#[repr(C, align(128))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([u8; 128]);

struct Lines(Vec<Line>);

impl Block for Lines {
    fn address(&self) -> usize {
        self.0.as_ptr() as usize
    }
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        bytemuck::cast_slice_mut(&mut self.0)[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn fill(&mut self, at: usize, count: usize, byte: u8) -> Result<()> {
        bytemuck::cast_slice_mut(&mut self.0)[at..at + count].fill(byte);
        Ok(())
    }
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(&bytemuck::cast_slice(&self.0)[at..at + bytes.len()]);
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl Machine for crate::device::cuda::Gpu {
    fn launchers(&self) -> &'static Launchers {
        match launchers::cuda() {
            Some(launchers) => launchers,
            None => unreachable!("a GPU is opened only where its kernels are compiled in"),
        }
    }
    fn stream(&self) -> Result<Stream> {
        Stream::of_gpu(self, Machine::launchers(self))
    }
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block + '_>> {
        Ok(Box::new(self.allocate(bytes)?))
    }
    fn finish(&self) -> Result<()> {
        self.finish()
    }
}

#[cfg(feature = "cuda")]
impl Block for crate::device::cuda::DeviceMemory {
    fn address(&self) -> usize {
        self.address()
    }
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.write(at, bytes)
    }
    fn fill(&mut self, at: usize, count: usize, byte: u8) -> Result<()> {
        self.fill(at, count, byte)
    }
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        self.read(at, bytes)
    }
}

const GUARD_BYTES: usize = 4096;
const GUARD: u8 = 0xA5;
/// Initial value of every byte that a kernel must write: NaN in bf16 and f32, −1 in integers.
pub const POISON: u8 = 0xFF;

/// A buffer between two guard bands that a kernel must not change. The second band begins directly after the last byte, so
/// that a write of one element too many is detected.
pub struct Guarded<'m> {
    block: Box<dyn Block + 'm>,
    bytes: usize,
}

impl<'m> Guarded<'m> {
    /// A poisoned buffer.
    pub fn new(machine: &'m dyn Machine, bytes: usize) -> Result<Self> {
        let mut block = machine.allocate(GUARD_BYTES + bytes + GUARD_BYTES)?;
        block.fill(0, GUARD_BYTES, GUARD)?;
        block.fill(GUARD_BYTES + bytes, GUARD_BYTES, GUARD)?;
        let mut guarded = Self { block, bytes };
        guarded.poison()?;
        Ok(guarded)
    }

    /// Returns the buffer as an argument of a launch.
    pub fn buffer(&self) -> Buffer {
        // SAFETY: the block owns this number of bytes from this address on.
        unsafe { Buffer::from_address(self.block.address() + GUARD_BYTES, self.bytes) }
    }

    /// Returns the address on the machine.
    pub fn pointer(&self) -> *mut u8 {
        (self.block.address() + GUARD_BYTES) as *mut u8
    }

    /// Fills the buffer with the poison value.
    pub fn poison(&mut self) -> Result<()> {
        self.block.fill(GUARD_BYTES, self.bytes, POISON)
    }

    /// Replaces the first bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.bytes {
            let got = format!("{} bytes", bytes.len());
            return Err(Error::invalid(
                "guarded buffer",
                format!("at most {} bytes", self.bytes),
                got,
                "a bug",
            ));
        }
        self.block.write(GUARD_BYTES, bytes)
    }

    /// Reads the whole buffer.
    pub fn read(&self) -> Result<Vec<u8>> {
        self.read_first(self.bytes)
    }

    /// Reads at most the first `bytes` bytes.
    pub fn read_first(&self, bytes: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; bytes.min(self.bytes)];
        self.block.read(GUARD_BYTES, &mut bytes)?;
        Ok(bytes)
    }

    /// Returns the position of the first changed byte outside of the buffer, in bytes from the buffer's start.
    pub fn overwritten(&self) -> Result<Option<i64>> {
        for (start, from_buffer) in [
            (0, -(GUARD_BYTES as i64)),
            (GUARD_BYTES + self.bytes, self.bytes as i64),
        ] {
            let mut band = vec![0; GUARD_BYTES];
            self.block.read(start, &mut band)?;
            if let Some(at) = band.iter().position(|&b| b != GUARD) {
                return Ok(Some(from_buffer + at as i64));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_on_either_side_of_a_buffer_is_detected() {
        let machine = Simulator::new().unwrap();
        for (at, place) in [(4095, -1), (4096 + 10, 10), (4096 + 9 + 4096, 9 + 4096)] {
            let mut buffer = Guarded::new(&machine, 10).unwrap();
            assert_eq!(buffer.read().unwrap(), [POISON; 10]);
            assert_eq!(buffer.overwritten().unwrap(), None);
            buffer.block.write(at, &[0]).unwrap();
            assert_eq!(buffer.overwritten().unwrap(), Some(place));
        }
    }
}
