//! Readback of a step's results from a device with kernels. The copies are enqueued behind the step's launches, and the next
//! step may be launched before they are read.

use crate::device::{self, Device, Sent};
use crate::error::Result;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;

/// Tensors that are being copied to the host.
pub struct Readback {
    kinds: Vec<(DType, Shape)>,
    sent: Sent,
}

impl Readback {
    /// Begins to copy tensors of `device` as the launches so far leave them.
    ///
    /// # Errors
    /// When the device failed.
    pub fn begin(device: Device, tensors: &[&Tensor]) -> Result<Self> {
        let range = |t: &&Tensor| (t.pointer::<u8>() as usize, t.elements() * t.dtype().size());
        let ranges: Vec<_> = tensors.iter().map(range).collect();
        Ok(Readback {
            kinds: tensors.iter().map(|t| (t.dtype(), t.shape())).collect(),
            sent: device::send(device, &ranges)?,
        })
    }

    /// Waits for the copies and gives the tensors on the CPU.
    ///
    /// # Errors
    /// When a launch before them failed.
    pub fn wait(self) -> Result<Vec<Tensor>> {
        let bytes = self.sent.receive()?;
        let mut rest = &bytes[..];
        let mut next = |(dtype, shape): (DType, Shape)| {
            let mut tensor = Tensor::unspecified(Device::Cpu, dtype, shape);
            let own = tensor.bytes_mut();
            let (first, others) = rest.split_at(own.len());
            own.copy_from_slice(first);
            rest = others;
            tensor
        };
        Ok(self.kinds.into_iter().map(&mut next).collect())
    }
}
