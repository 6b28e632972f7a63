//! Storage of gradients, and the interface through which an operation delivers them.
//!
//! Accumulation follows one rule: the first consumer of a value assigns its gradient, and later consumers add to it.
//! The tape decides which of the two applies and passes it to the operation as [`Accumulate`].

use super::Source;
use crate::device::Device;
use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::cross_entropy::GradientScale;
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::DType;
use crate::with_real;

/// Gradients of leaves, kept from one backward pass to the next.
#[derive(Default)]
pub struct Gradients {
    slots: Vec<Slot>,
}

#[derive(Default)]
struct Slot {
    tensor: Option<Tensor>,
    /// Whether the tensor holds a gradient, or only memory to reuse.
    written: bool,
}

impl Gradients {
    /// Creates a store for leaves `0 .. leaves`.
    pub fn new(leaves: usize) -> Self {
        Gradients {
            slots: (0..leaves).map(|_| Slot::default()).collect(),
        }
    }

    /// Returns the gradient of a leaf; `None` if no gradient flowed to it since the last [`reset`](Self::reset).
    pub fn get(&self, leaf: usize) -> Option<&Tensor> {
        let slot = self.slots.get(leaf)?;
        slot.tensor.as_ref().filter(|_| slot.written)
    }

    /// Returns the gradient of a leaf for modification in place (clipping, sums over ranks).
    pub fn get_mut(&mut self, leaf: usize) -> Option<&mut Tensor> {
        let slot = self.slots.get_mut(leaf)?;
        let written = slot.written;
        slot.tensor.as_mut().filter(|_| written)
    }

    /// Returns the gradient of a leaf for modification in place. If no gradient flowed to it, it is the result of
    /// `zeros`.
    pub fn get_or(&mut self, leaf: usize, zeros: impl FnOnce() -> Tensor) -> &mut Tensor {
        let slot = &mut self.slots[leaf];
        let gradient = slot.tensor.take().filter(|_| slot.written);
        slot.written = true;
        slot.tensor.insert(gradient.unwrap_or_else(zeros))
    }

    /// Appends `leaves` slots and returns the index of the first.
    pub(super) fn extend(&mut self, leaves: usize) -> usize {
        let first = self.slots.len();
        self.slots.resize_with(first + leaves, Slot::default);
        first
    }

    /// Removes the slots from `first` to the end and returns the gradients in them.
    pub(super) fn shrink(&mut self, first: usize) -> Vec<Option<Tensor>> {
        let slots = self.slots.split_off(first);
        slots
            .into_iter()
            .map(|s| s.tensor.filter(|_| s.written))
            .collect()
    }

    /// Clears all gradients but keeps their memory.
    pub fn reset(&mut self) {
        for slot in &mut self.slots {
            slot.written = false;
        }
    }
}

/// The destinations of the gradients of one operation's inputs.
pub struct Grads<'a> {
    sources: &'a [Source],
    pending: &'a mut [Vec<Option<Tensor>>],
    store: &'a mut Gradients,
    answered: Vec<bool>,
}

impl<'a> Grads<'a> {
    pub(super) fn new(
        sources: &'a [Source],
        pending: &'a mut [Vec<Option<Tensor>>],
        store: &'a mut Gradients,
    ) -> Self {
        Grads {
            sources,
            pending,
            store,
            answered: vec![false; sources.len()],
        }
    }

    /// Returns whether input `input` needs a gradient. If not, the operation should not compute it.
    pub fn wanted(&self, input: usize) -> bool {
        self.sources[input] != Source::Constant
    }

    /// Returns the dtype of the gradient of an input whose value has dtype `value`: the dtype of the value, but f32
    /// for a bf16 parameter, because many small terms are added to its gradient.
    pub fn dtype(&self, input: usize, value: DType) -> DType {
        match (self.sources[input], value) {
            (Source::Leaf { exact: true, .. }, DType::Bf16) => DType::F32,
            _ => value,
        }
    }

    /// Declares that no gradient flows to input `input`.
    pub fn none(&mut self, input: usize) {
        self.answer(input);
    }

    /// Delivers a gradient that is already computed.
    ///
    /// # Errors
    /// Returns an error when an earlier gradient of the same value has another shape or dtype.
    pub fn give(&mut self, input: usize, gradient: Tensor) -> Result<()> {
        self.answer(input);
        match self.earlier(input) {
            None => self.put(input, gradient),
            Some(mut sum) => {
                add(&mut sum, &gradient)?;
                self.put(input, sum);
            }
        }
        Ok(())
    }

    /// Lets `f` write the gradient of input `input`, a tensor like the value `like` (but see [`dtype`](Self::dtype)),
    /// in place. `f` gets the destination and whether to assign or to add. It is not called if the input needs no
    /// gradient.
    ///
    /// # Errors
    /// The errors of `f`.
    pub fn write(
        &mut self,
        input: usize,
        like: &Tensor,
        f: impl FnOnce(&mut Tensor, Accumulate) -> Result<()>,
    ) -> Result<()> {
        self.answer(input);
        if !self.wanted(input) {
            return Ok(());
        }
        let (mut destination, accumulate) = match self.earlier(input) {
            Some(sum) => (sum, Accumulate::Add),
            None => (self.spare(input, like), Accumulate::Assign),
        };
        f(&mut destination, accumulate)?;
        self.put(input, destination);
        Ok(())
    }

    /// Returns the store of leaves, for an operation that runs backward on an inner tape.
    pub(super) fn store(&mut self) -> &mut Gradients {
        self.store
    }

    fn answer(&mut self, input: usize) {
        assert!(
            !self.answered[input],
            "backward delivered two gradients for input {input}"
        );
        self.answered[input] = true;
    }

    /// Removes and returns the gradient delivered so far.
    fn earlier(&mut self, input: usize) -> Option<Tensor> {
        match self.sources[input] {
            Source::Constant => None,
            Source::Entry { entry, output, .. } => self.pending[entry][output].take(),
            Source::Leaf { slot, .. } => {
                let slot = &mut self.store.slots[slot];
                if slot.written {
                    slot.tensor.take()
                } else {
                    None
                }
            }
        }
    }

    /// Returns memory for a first gradient, reused from the last step if possible.
    fn spare(&mut self, input: usize, like: &Tensor) -> Tensor {
        let kept = match self.sources[input] {
            Source::Leaf { slot, .. } => self.store.slots[slot].tensor.take(),
            _ => None,
        };
        let dtype = self.dtype(input, like.dtype());
        kept.filter(|t| t.shape() == like.shape() && t.dtype() == dtype)
            .unwrap_or_else(|| Tensor::unspecified(like.device(), dtype, like.shape()))
    }

    fn put(&mut self, input: usize, gradient: Tensor) {
        match self.sources[input] {
            Source::Constant => {}
            Source::Entry { entry, output, .. } => self.pending[entry][output] = Some(gradient),
            Source::Leaf { slot, .. } => {
                self.store.slots[slot] = Slot {
                    tensor: Some(gradient),
                    written: true,
                };
            }
        }
    }

    pub(super) fn finish(self, op: &str) {
        for (input, answered) in self.answered.iter().enumerate() {
            assert!(
                answered,
                "{op}: backward delivered neither a gradient nor `none` for input {input}"
            );
        }
    }
}

fn add(sum: &mut Tensor, term: &Tensor) -> Result<()> {
    term.expect_shape("backward", "a further gradient", sum.shape())?;
    term.expect_dtype("backward", "a further gradient", sum.dtype())?;
    if sum.device() != Device::Cpu {
        return add_on_device(sum, term);
    }
    with_real!(sum.dtype(), "backward", |T| {
        cpu::add_assign(sum.slice_mut::<T>(), term.slice::<T>());
        Ok(())
    })
}

/// `sum += term` by the kernel of `kernels/cross_entropy.cu` that scales gradients.
fn add_on_device(sum: &mut Tensor, term: &Tensor) -> Result<()> {
    // The kernel processes eight elements at a time and may pass the tensor's end.
    let elements = sum.elements().next_multiple_of(8);
    let one = Tensor::constant(sum.device(), [1], &[1f32]);
    let bf16_elements = sum.dtype() == DType::Bf16;
    let stream = Stream::of(sum.device())?;
    let kernel = GradientScale {
        out: sum.padded_output(),
        input: term.padded_input(),
        factor: one.input()?,
        elements,
        bf16_elements,
        accumulate: true,
    };
    kernel.launch(&stream)
}
