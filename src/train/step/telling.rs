//! What a step on a device with kernels tells the host. The copies begin behind its launches, and the next step may be
//! launched before they are read.

use crate::device::{self, Device, Sent};
use crate::error::Result;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;

/// Tensors on their way to the host.
pub struct Telling {
    kinds: Vec<(DType, Shape)>,
    sent: Sent,
}

impl Telling {
    /// Begins to copy tensors of `device` as the launches so far leave them.
    ///
    /// # Errors
    /// When the device failed.
    pub fn begin(device: Device, tensors: &[&Tensor]) -> Result<Self> {
        let range = |t: &&Tensor| (t.pointer::<u8>() as usize, t.elements() * t.dtype().size());
        let ranges: Vec<_> = tensors.iter().map(range).collect();
        Ok(Telling {
            kinds: tensors.iter().map(|t| (t.dtype(), t.shape())).collect(),
            sent: device::send(device, &ranges)?,
        })
    }

    /// The same on the CPU, when they are there.
    ///
    /// # Errors
    /// What a launch before them met.
    pub fn received(self) -> Result<Vec<Tensor>> {
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
