//! Ranges of a device's memory, for what moves them between ranks.

use super::{Device, side};
use crate::error::{Error, Result};
use std::ops::Range;

/// A range of a device's memory. It borrows nothing, as a launch's arguments do not: launches and moves of a device run one
/// after another, so that memory which is given back goes to a later one.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    device: Device,
    address: usize,
    bytes: usize,
}

impl Span {
    /// `bytes` bytes at `address` of `device`.
    ///
    /// # Safety
    /// The memory is there for as long as the moves that the range is given to, those of a captured step included. What is
    /// received there is written through no reference of the host.
    pub unsafe fn from_address(device: Device, address: usize, bytes: usize) -> Self {
        Span {
            device,
            address,
            bytes,
        }
    }

    /// Its first byte, in the device's address space.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Some of the bytes.
    ///
    /// # Panics
    /// When there are fewer.
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

    /// The content, which the host sees of the simulator's memory alone.
    ///
    /// # Errors
    /// On a GPU.
    pub fn read(&self, to: &mut [u8]) -> Result<()> {
        self.seen_by_host(to.len())?;
        // SAFETY: the memory is there, is the host's, and no launch is under way.
        unsafe {
            std::ptr::copy_nonoverlapping(self.address as *const u8, to.as_mut_ptr(), self.bytes)
        };
        Ok(())
    }

    /// Replaces the content, under the same condition.
    ///
    /// # Errors
    /// On a GPU.
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
        let help = "a bug: NCCL was not connected";
        let got = self.device.to_string();
        Err(Error::invalid(
            "ranks",
            "memory that the host sees, or a library that moves it",
            got,
            help,
        ))
    }
}
