//! Operations without a kernel, on a device that has kernels: the CPU's reference in f32 on widened
//! inputs, its results rounded to bf16.
//!
//! Whatever a model needs, it runs; on a GPU the copies to the host and back cost time.
//! [`take_ran`] says which operations ran how.

use super::{Forward, Gradients, Grads, Op, Source, Var};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// How often an operation's forward ran on a device with kernels, as kernels and as this fallback.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    pub kernels: usize,
    pub fallback: usize,
}

thread_local! {
    static RAN: RefCell<BTreeMap<&'static str, Ran>> = RefCell::default();
}

/// The operations that ran on a device with kernels from this thread since the last call.
pub fn take_ran() -> BTreeMap<&'static str, Ran> {
    RAN.take()
}

/// Where the operation's kernels would run, if it has them.
pub(super) fn device_of(inputs: &[&Var]) -> Device {
    let mut devices = inputs.iter().map(|v| v.tensor.device());
    devices
        .find(|&device| device != Device::Cpu)
        .unwrap_or_default()
}

/// Counts one forward of `op` on a device with kernels.
pub(super) fn count(op: &'static str, kernels: bool) {
    RAN.with_borrow_mut(|ran| {
        let ran = ran.entry(op).or_default();
        *if kernels {
            &mut ran.kernels
        } else {
            &mut ran.fallback
        } += 1;
    });
}

/// The reference of an operation on tensors of a device with kernels.
pub(super) struct Fallback<O> {
    pub op: O,
    /// Where the tensors are.
    pub device: Device,
    /// Dtypes of the inputs.
    pub inputs: Vec<DType>,
}

impl<O: Op> Op for Fallback<O> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let wide: Vec<Tensor> = inputs.iter().map(|t| to_cpu(t)).collect();
        let Forward { outputs, saved } = self.op.forward(&wide.iter().collect::<Vec<_>>())?;
        // What an f32 input or a scalar is made of stays exact: logits, probabilities, losses.
        let rounds = self.inputs.contains(&DType::Bf16) && !self.inputs.contains(&DType::F32);
        let outputs = outputs.into_iter().map(|t| {
            let t = if rounds && !t.shape().is_empty() {
                t.narrowed()
            } else {
                t
            };
            t.on(self.device)
        });
        Ok(Forward {
            outputs: outputs.collect(),
            saved,
        })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
        let wide: Vec<Option<Tensor>> = douts.iter().map(|d| d.as_ref().map(to_cpu)).collect();
        let sources: Vec<Source> = (0..self.inputs.len())
            .map(|i| match grads.wanted(i) {
                true => Source::Leaf {
                    slot: i,
                    exact: true,
                },
                false => Source::Constant,
            })
            .collect();
        let mut found = Gradients::new(sources.len());
        let mut inner = Grads::new(&sources, &mut [], &mut found);
        self.op.backward(saved, &wide, &mut inner)?;
        inner.finish(self.op.name());
        for (i, (gradient, dtype)) in found.shrink(0).into_iter().zip(&self.inputs).enumerate() {
            match gradient {
                None => grads.none(i),
                Some(g) if grads.dtype(i, *dtype) == DType::Bf16 => {
                    grads.give(i, g.narrowed().on(self.device))?;
                }
                Some(g) => grads.give(i, g.on(self.device))?,
            }
        }
        Ok(())
    }
}

fn to_cpu(t: &Tensor) -> Tensor {
    t.widened().on(Device::Cpu)
}
