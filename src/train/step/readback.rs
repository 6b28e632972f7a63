//! Readback of a step's results from a device with kernels. The copies are enqueued after the step's launches, and
//! the next step may be launched before they are read.

use crate::device::{self, Device, Sent};
use crate::error::Result;
use crate::model::Model;
use crate::routers::LayerState;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;
use crate::train::optimizer::DeviceStep;
use std::collections::BTreeMap;

/// Tensors that are being copied to the host.
pub struct Readback {
    kinds: Vec<(DType, Shape)>,
    sent: Sent,
}

impl Readback {
    /// Starts to copy tensors of `device`, after the launches so far.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn begin(device: Device, tensors: &[&Tensor]) -> Result<Self> {
        let range = |t: &&Tensor| (t.pointer::<u8>() as usize, t.elements() * t.dtype().size());
        let ranges: Vec<_> = tensors.iter().map(range).collect();
        Ok(Readback {
            kinds: tensors.iter().map(|t| (t.dtype(), t.shape())).collect(),
            sent: device::send(device, &ranges)?,
        })
    }

    /// Waits for the copies and returns the tensors on the CPU.
    ///
    /// # Errors
    /// Returns an error when a launch before them failed.
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

/// Starts the readback of a step's results: its outcome, the statistics of its layers, and the vectors of the
/// router's state.
///
/// # Errors
/// Returns an error when the device failed.
pub fn begin_readback(model: &Model, device: &DeviceStep) -> Result<Readback> {
    let (states, tally) = (model.layer_states(), model.device_tally());
    let stats = tally.as_ref().map(|tally| tally.stats().borrow());
    let vectors = vectors_of(&states).map(|(_, vector)| vector);
    let ends = stats.as_deref().into_iter().chain(vectors);
    let all: Vec<_> = device.results().into_iter().chain(ends).collect();
    Readback::begin(model.device(), &all)
}

/// Returns the vectors of the router's state, layer by layer.
pub fn vectors_of(states: &[LayerState]) -> impl Iterator<Item = (&'static str, &Tensor)> {
    let all = states.iter().flat_map(LayerState::tensors);
    all.filter(|(_, tensor)| tensor.shape().len() == 1)
}

/// Returns the values of the vectors, by name and layer.
///
/// # Errors
/// Returns an error when a device failed.
pub fn by_name<'t>(
    vectors: impl Iterator<Item = (&'static str, &'t Tensor)>,
) -> Result<BTreeMap<&'static str, Vec<Vec<f64>>>> {
    let mut found: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (name, tensor) in vectors {
        found.entry(name).or_default().push(tensor.to_f64()?);
    }
    Ok(found)
}
