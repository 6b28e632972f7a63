//! The tape: records operations as they run, then walks them in reverse to give gradients.
//!
//! It knows no operation. An [`Op`] runs forward, keeps what its backward needs, and in backward
//! answers for each of its inputs: a gradient, or explicitly none. Gradients of parameters and other
//! leaves land in a [`Gradients`] store that outlives the tape, so that micro-batches accumulate.

mod alter;
pub mod check;
mod gradients;
mod op_counts;
mod recompute;

pub use alter::{AlteredGradients, BackwardCall, alter_gradients};
pub use gradients::{Gradients, Grads};
pub use op_counts::take_op_counts;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::shape::Shape;
use std::any::Any;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an operation's forward gives back.
pub struct Forward {
    /// The results.
    pub outputs: Vec<Tensor>,
    /// Exactly the tensors that backward reads.
    pub saved: Vec<Tensor>,
}

/// A differentiable operation.
pub trait Op {
    /// Name in errors and traces.
    fn name(&self) -> &'static str;

    /// Whether it runs on tensors of `device`: an operation without kernels on the CPU alone.
    fn runs_on(&self, device: Device) -> bool {
        device == Device::Cpu
    }

    /// The operation itself, where programs that look into a tape may know its type.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }

    /// Computes the outputs.
    ///
    /// # Errors
    /// When the inputs do not fit the operation.
    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward>;

    /// Given what forward saved and the gradient of each output (`None` where nothing used it; at
    /// least one is there), answers in `grads` for every input, in any order.
    ///
    /// # Errors
    /// When the device fails.
    fn backward(&self, saved: &[Tensor], douts: &[Option<Tensor>], grads: &mut Grads)
    -> Result<()>;
}

/// The gradient of an operation's only output. It is there: backward runs only for an operation
/// that something used.
///
/// # Panics
/// When the operation has several outputs.
pub fn only(douts: &[Option<Tensor>]) -> &Tensor {
    match douts {
        [Some(dout)] => dout,
        _ => panic!("one output with a gradient, got {}", douts.len()),
    }
}

/// Where a variable's gradient goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Nowhere.
    Constant,
    /// To a slot of the [`Gradients`] store; `exact` keeps it in f32 where the value is bf16.
    Leaf { slot: usize, exact: bool },
    /// To output `output` of entry `entry` of the tape with this id.
    Entry {
        tape: u64,
        entry: usize,
        output: usize,
    },
}

/// A tensor and its place on the tape.
#[derive(Clone, Debug)]
pub struct Var {
    tensor: Tensor,
    source: Source,
}

impl Var {
    /// A value that gets no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Var {
            tensor,
            source: Source::Constant,
        }
    }

    /// A value whose gradient goes to slot `slot` of the [`Gradients`] store, in the value's dtype:
    /// an input to be differentiated.
    pub fn leaf(tensor: Tensor, slot: usize) -> Self {
        let source = Source::Leaf { slot, exact: false };
        Var { tensor, source }
    }

    /// A leaf whose gradient is kept in f32 where the value is bf16: small terms of many
    /// micro-batches are added to it.
    pub fn parameter(tensor: Tensor, slot: usize) -> Self {
        let source = Source::Leaf { slot, exact: true };
        Var { tensor, source }
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The same value without a gradient.
    pub fn detached(&self) -> Self {
        Self::constant(self.tensor.clone())
    }

    /// Whether a gradient is wanted.
    pub fn needs_gradient(&self) -> bool {
        self.source != Source::Constant
    }
}

/// One recorded operation.
struct Entry {
    op: Box<dyn Op>,
    inputs: Vec<Source>,
    saved: Vec<Tensor>,
    outputs: usize,
}

/// A record of operations.
pub struct Tape {
    id: u64,
    entries: RefCell<Vec<Entry>>,
    recording: bool,
    replaying: bool,
}

impl Tape {
    fn with(recording: bool, replaying: bool) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Tape {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            entries: RefCell::default(),
            recording,
            replaying,
        }
    }

    /// A tape that records whatever needs a gradient.
    pub fn new() -> Self {
        Self::with(true, false)
    }

    /// A tape that records nothing: evaluation.
    pub fn without_gradients() -> Self {
        Self::with(false, false)
    }

    /// Whether this is the second run of a recompute segment. State must not change again in it.
    pub fn is_replaying(&self) -> bool {
        self.replaying
    }

    /// Whether gradients are being recorded.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Number of recorded operations.
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is kept for backward: (operation, tensor), shared ones as often as they are kept.
    pub fn kept(&self) -> Vec<(&'static str, Tensor)> {
        let entries = self.entries.borrow();
        let kept = entries
            .iter()
            .flat_map(|e| e.saved.iter().map(|t| (e.op.name(), t.clone())));
        kept.collect()
    }

    /// Runs `op` on `inputs` and records it if any of them needs a gradient.
    ///
    /// # Errors
    /// When the operation has no kernels on the inputs' device, and those of the operation.
    pub fn apply(&self, op: impl Op + 'static, inputs: &[&Var]) -> Result<Vec<Var>> {
        let tensors: Vec<&Tensor> = inputs.iter().map(|v| &v.tensor).collect();
        let device = op_counts::device_of(inputs);
        if !op.runs_on(device) {
            return Err(Error::invalid(
                op.name(),
                format!(
                    "an operation that has kernels, or inputs on {}",
                    Device::Cpu
                ),
                format!("inputs on {device}"),
                "train with --device cpu, or without the option that needs it",
            ));
        }
        let forward = op.forward(&tensors)?;
        Ok(self.record_run(op, inputs, forward))
    }

    /// Records `op`, whose forward ran already and gave `forward`, if an input needs a gradient: for
    /// an operation that asks someone between its kernels.
    pub(crate) fn record_run(
        &self,
        op: impl Op + 'static,
        inputs: &[&Var],
        forward: Forward,
    ) -> Vec<Var> {
        if op_counts::device_of(inputs) != Device::Cpu {
            op_counts::count(op.name());
        }
        let record = self.recording && inputs.iter().any(|v| v.needs_gradient());
        self.record(record, Box::new(op), inputs, forward.saved, forward.outputs)
    }

    /// [`apply`](Self::apply) for an operation with one output.
    ///
    /// # Errors
    /// Those of the operation.
    pub fn apply_one(&self, op: impl Op + 'static, inputs: &[&Var]) -> Result<Var> {
        let mut outputs = self.apply(op, inputs)?;
        assert_eq!(
            outputs.len(),
            1,
            "apply_one is for operations with one output"
        );
        Ok(outputs.remove(0))
    }

    fn record(
        &self,
        record: bool,
        op: Box<dyn Op>,
        inputs: &[&Var],
        saved: Vec<Tensor>,
        outputs: Vec<Tensor>,
    ) -> Vec<Var> {
        if !record {
            return outputs.into_iter().map(Var::constant).collect();
        }
        for v in inputs {
            if let Source::Entry { tape, .. } = v.source {
                assert_eq!(
                    tape,
                    self.id,
                    "{}: an input belongs to another tape",
                    op.name()
                );
            }
        }
        let mut entries = self.entries.borrow_mut();
        let entry = entries.len();
        entries.push(Entry {
            op,
            inputs: inputs.iter().map(|v| v.source).collect(),
            saved,
            outputs: outputs.len(),
        });
        outputs
            .into_iter()
            .enumerate()
            .map(|(output, tensor)| Var {
                tensor,
                source: Source::Entry {
                    tape: self.id,
                    entry,
                    output,
                },
            })
            .collect()
    }

    /// Gradients of a scalar `loss` (seeded with `scale`), added into `store`.
    ///
    /// # Errors
    /// When `loss` is not a real scalar, or an operation fails.
    pub fn backward(self, loss: &Var, scale: f64, store: &mut Gradients) -> Result<()> {
        loss.tensor
            .expect_shape("backward", "a loss", Shape::from([]))?;
        let (shape, dtype) = (loss.tensor.shape(), loss.tensor.dtype());
        let device = loss.tensor.device();
        let seed = crate::with_real!(dtype, "backward", |T| Ok::<_, Error>(
            Tensor::constant::<T>(device, shape, &[crate::tensor::dtype::Real::of(scale)])
        ))?;
        self.backward_from(&[(loss, seed)], store)
    }

    /// Gradients of `Σ ⟨dout, output⟩` over the pairs, added into `store`. What an operation saved is
    /// dropped as soon as its backward has run.
    ///
    /// # Errors
    /// When an incoming gradient does not fit its output, or an operation fails.
    ///
    /// # Panics
    /// When an operation does not answer for each of its inputs exactly once: a bug in it.
    pub fn backward_from(self, outputs: &[(&Var, Tensor)], store: &mut Gradients) -> Result<()> {
        let mut entries = self.entries.into_inner();
        let mut pending: Vec<Vec<Option<Tensor>>> =
            entries.iter().map(|e| vec![None; e.outputs]).collect();
        for (var, dout) in outputs {
            dout.expect_shape("backward", "an incoming gradient", var.tensor.shape())?;
            dout.expect_dtype("backward", "an incoming gradient", var.tensor.dtype())?;
            let source = [var.source];
            let mut slots = Grads::new(&source, &mut pending, store);
            slots.give(0, dout.clone())?;
            slots.finish("backward");
        }
        let alter = alter::current();
        while let Some(entry) = entries.pop() {
            let Some(douts) = pending.pop() else {
                unreachable!("one row of gradients per entry")
            };
            if douts.iter().all(Option::is_none) {
                continue;
            }
            if let Some(alter) = &alter {
                let call = BackwardCall {
                    op: &*entry.op,
                    saved: &entry.saved,
                    douts: &douts,
                };
                alter::backward(alter, &call, &entry.inputs, &mut pending, store)?;
                continue;
            }
            let mut grads = Grads::new(&entry.inputs, &mut pending, store);
            entry.op.backward(&entry.saved, &douts, &mut grads)?;
            grads.finish(entry.op.name());
        }
        Ok(())
    }
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
