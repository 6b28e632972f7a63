//! Residual add: `y = a + b`, any shape. Both gradients are `dy`.

use super::rows::{self, Arithmetic};
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu;
use crate::with_real;

/// Returns `a + b` for two tensors of the same shape and dtype.
///
/// # Errors
/// Returns an error when shapes or dtypes differ.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    b.tensor()
        .expect_shape("add", "second term", a.tensor().shape())?;
    b.tensor()
        .expect_dtype("add", "second term", a.tensor().dtype())?;
    tape.apply_one(Add, &[a, b])
}

struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        if inputs[0].device() != Device::Cpu {
            return Ok(Forward::one(
                rows::arithmetic(Arithmetic::Add, inputs[0], inputs[1])?,
                vec![],
            ));
        }
        let mut sum = inputs[0].unspecified_like();
        with_real!(sum.dtype(), "add", |T| {
            cpu::add(sum.slice_mut::<T>(), inputs[0].slice(), inputs[1].slice());
            Ok(Forward::one(sum, vec![]))
        })
    }

    fn backward(
        &self,
        _saved: &[Tensor],
        douts: &OutputGradients,
        grads: &mut Grads,
    ) -> Result<()> {
        for input in 0..2 {
            grads.give(input, only(douts).clone())?;
        }
        Ok(())
    }
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("add [3, 5]", |tape, v| Ok(vec![add(tape, &v[0], &v[1])?]))
            .input("a", [3, 5])
            .input("b", [3, 5]),
        // The same value is both inputs: its two gradients are summed.
        Case::new("add to itself [70, 3]", |tape, v| {
            Ok(vec![add(tape, &v[0], &v[0])?])
        })
        .input("a", [70, 3]),
    ]
}
