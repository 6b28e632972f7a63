//! Ranges of a device's memory, for communication between ranks.

use super::{Device, side};
use crate::error::{Error, Result};
use std::ops::Range;

/// A range of a device's memory. Like the arguments of a launch, it borrows nothing: the launches and transfers of a
/// device run one after another, so freed memory is reused only by later ones.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    device: Device,
    address: usize,
    bytes: usize,
}

impl Span {
    /// Creates the range of `bytes` bytes at `address` of `device`.
    ///
    /// # Safety
    /// The memory must stay valid for all transfers that use the range, including those of a captured step. While a
    /// transfer writes to the range, the host must hold no reference to it.
    pub unsafe fn from_address(device: Device, address: usize, bytes: usize) -> Self {
        Span {
            device,
            address,
            bytes,
        }
    }

    /// Returns the address of the first byte, in the device's address space.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns a part of the range.
    ///
    /// # Panics
    /// Panics when there are fewer.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.bytes,
            "bytes {range:?} of {}",
            self.bytes
        );
        Span {
            device: self.device,
            address: self.address + range.start,
            bytes: range.len(),
        }
    }

    /// Copies the content to `to`. The host can read only the simulator's memory.
    ///
    /// # Errors
    /// Returns an error on a GPU.
    pub fn read(&self, to: &mut [u8]) -> Result<()> {
        self.seen_by_host(to.len())?;
        // SAFETY: the memory is valid host memory, and no launch is running.
        unsafe {
            std::ptr::copy_nonoverlapping(self.address as *const u8, to.as_mut_ptr(), self.bytes)
        };
        Ok(())
    }

    /// Replaces the content. The host can write only the simulator's memory.
    ///
    /// # Errors
    /// Returns an error on a GPU.
    pub fn write(&self, from: &[u8]) -> Result<()> {
        self.seen_by_host(from.len())?;
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.address as *mut u8, self.bytes)
        };
        Ok(())
    }

    /// Replaces the content by that of another range of the same device and length, behind its launches so far; a captured step
    /// repeats it.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When device or length differ.
    pub fn copy_from(&self, other: &Span) -> Result<()> {
        let place = |span: &Span| (span.device, span.bytes);
        assert_eq!(place(self), place(other), "a copy within a device");
        match self.bytes {
            0 => Ok(()),
            bytes => side::copy(self.device, self.address, other.address, bytes),
        }
    }

    fn seen_by_host(&self, bytes: usize) -> Result<()> {
        assert_eq!(bytes, self.bytes, "bytes to copy");
        if self.device == Device::Sim {
            return Ok(());
        }
        let help = "this is a bug: NCCL was not connected";
        let got = self.device.to_string();
        Err(Error::invalid(
            "ranks",
            "memory that the host can access, or a communication library",
            got,
            help,
        ))
    }
}
