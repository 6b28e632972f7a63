//! The tape: it records operations as they run, then visits them in reverse to compute gradients.
//!
//! It does not depend on any operation. An [`Op`] runs forward, keeps the tensors that its backward needs, and in
//! backward delivers for each of its inputs a gradient or, explicitly, none. The gradients of parameters and other
//! leaves go to a [`Gradients`] store that outlives the tape, so that the gradients of micro-batches accumulate.

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

/// The result of an operation's forward.
pub struct Forward {
    /// The outputs of the operation.
    pub outputs: Vec<Tensor>,
    /// Exactly the tensors that backward reads.
    pub saved: Vec<Tensor>,
}

impl Forward {
    /// The result of an operation with one output.
    pub fn one(output: Tensor, saved: Vec<Tensor>) -> Self {
        Forward {
            outputs: vec![output],
            saved,
        }
    }
}

/// The gradients of an operation's outputs; `None` for an output that nothing used.
pub type OutputGradients = [Option<Tensor>];

/// A differentiable operation.
pub trait Op {
    /// Name in errors and traces.
    fn name(&self) -> &'static str;

    /// Returns whether it runs on tensors of `device`. An operation without kernels runs only on the CPU.
    fn runs_on(&self, device: Device) -> bool {
        device == Device::Cpu
    }

    /// Returns the operation itself if programs that inspect a tape may know its type.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }

    /// Computes the outputs.
    ///
    /// # Errors
    /// Returns an error when the inputs do not fit the operation.
    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward>;

    /// Delivers to `grads` a gradient or none for every input, in any order. `saved` are the tensors that forward
    /// saved; at least one of the gradients `douts` is `Some`.
    ///
    /// # Errors
    /// Returns an error when the device fails.
    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()>;
}

/// Returns the gradient of an operation's only output. It always exists, because backward runs only for an operation
/// whose output was used.
///
/// # Panics
/// Panics when the operation has several outputs.
pub fn only(douts: &OutputGradients) -> &Tensor {
    match douts {
        [Some(dout)] => dout,
        _ => panic!("one output with a gradient, got {}", douts.len()),
    }
}

/// The destination of a variable's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Nowhere.
    Constant,
    /// To a slot of the [`Gradients`] store; with `exact`, it is f32 even if the value is bf16.
    Leaf { slot: usize, exact: bool },
    /// To output `output` of entry `entry` of the tape with this id.
    Entry {
        tape: u64,
        entry: usize,
        output: usize,
    },
}

/// A tensor and its position on the tape.
#[derive(Clone, Debug)]
pub struct Var {
    tensor: Tensor,
    source: Source,
}

impl Var {
    /// Wraps a value that gets no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Var {
            tensor,
            source: Source::Constant,
        }
    }

    /// Wraps a value whose gradient goes to slot `slot` of the [`Gradients`] store, in the value's dtype: an input to
    /// be differentiated.
    pub fn leaf(tensor: Tensor, slot: usize) -> Self {
        let source = Source::Leaf { slot, exact: false };
        Var { tensor, source }
    }

    /// Wraps a leaf whose gradient is f32 even if the value is bf16, because small terms of many micro-batches are
    /// added to it.
    pub fn parameter(tensor: Tensor, slot: usize) -> Self {
        let source = Source::Leaf { slot, exact: true };
        Var { tensor, source }
    }

    /// Returns the value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Returns the same value without a gradient.
    pub fn detached(&self) -> Self {
        Self::constant(self.tensor.clone())
    }

    /// Returns whether the variable needs a gradient.
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

    /// Creates a tape that records the operations that need a gradient.
    pub fn new() -> Self {
        Self::with(true, false)
    }

    /// Creates a tape that records nothing, for evaluation.
    pub fn without_gradients() -> Self {
        Self::with(false, false)
    }

    /// Returns whether this is the second run of a recompute segment, in which state must not change again.
    pub fn is_replaying(&self) -> bool {
        self.replaying
    }

    /// Returns whether the tape records operations.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Returns the number of recorded operations.
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Returns whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the tensors kept for backward as (operation, tensor). A shared tensor appears once for each operation
    /// that keeps it.
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
    /// Returns an error when the operation has no kernels on the inputs' device, and the errors of the operation.
    pub fn apply(&self, op: impl Op + 'static, inputs: &[&Var]) -> Result<Vec<Var>> {
        let tensors: Vec<&Tensor> = inputs.iter().map(|v| &v.tensor).collect();
        let device = op_counts::device_of(inputs);
        if !op.runs_on(device) {
            return Err(Error::invalid(
                op.name(),
                format!("an operation with kernels, or inputs on {}", Device::Cpu),
                format!("inputs on {device}"),
                "train with --device cpu, or without the option that needs it",
            ));
        }
        let forward = op.forward(&tensors)?;
        Ok(self.record_run(op, inputs, forward))
    }

    /// Records `op`, whose forward already ran with the result `forward`, if an input needs a gradient. This is for
    /// an operation that calls other code between its kernels.
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
    /// The errors of the operation.
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

    /// Computes the gradients of a scalar `loss`, multiplied by `scale`, and adds them to `store`.
    ///
    /// # Errors
    /// Returns an error when `loss` is not a real scalar, or an operation fails.
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

    /// Computes the gradients of `Σ ⟨dout, output⟩` over the pairs and adds them to `store`. The tensors that an
    /// operation saved are dropped as soon as its backward has run.
    ///
    /// # Errors
    /// Returns an error when an output was computed on another tape, an incoming gradient does not fit its output, or an
    /// operation fails.
    ///
    /// # Panics
    /// Panics when an operation does not deliver exactly one gradient or none for each of its inputs, which is a bug
    /// in the operation.
    pub fn backward_from(self, outputs: &[(&Var, Tensor)], store: &mut Gradients) -> Result<()> {
        let mut entries = self.entries.into_inner();
        let mut pending: Vec<Vec<Option<Tensor>>> =
            entries.iter().map(|e| vec![None; e.outputs]).collect();
        for (var, dout) in outputs {
            if matches!(var.source, Source::Entry { tape, .. } if tape != self.id) {
                return Err(Error::invalid(
                    "backward",
                    "an output that was computed on this tape",
                    "one of another tape",
                    "call backward on the tape that the output was computed on",
                ));
            }
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
