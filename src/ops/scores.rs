//! Scores of the experts other than the softmax: the sigmoid, and the positive part.
//!
//! `σ = 1 / (1 + e^−z)`, backward `dz = σ (1 − σ) dσ`. Positive part: `w = z` on the selection A of the experts with
//! `z > 0`, 0 off A; backward `dz = dw` on A, 0 off A and at 0. For a fixed A the positive part is linear. All
//! tensors are `[T, E]`.

use super::dispatch::{Dispatch, Selection};
use super::gates::Selected;
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::vector::sigmoid as sigmoid_of;
use crate::tensor::dtype::Real;
use crate::with_real;
use std::rc::Rc;

/// Returns `σ(z)`, elementwise.
///
/// # Errors
/// Returns an error when `z` is not real.
pub fn sigmoid(tape: &Tape, z: &Var) -> Result<Var> {
    tape.apply_one(Sigmoid, &[z])
}

/// Returns the experts whose score in `z [T, E]` is positive: any number per token.
///
/// # Errors
/// Returns an error when `z` is not real.
pub fn positive(z: &Tensor) -> Result<Selection> {
    let (tokens, experts) = (z.shape().rows(), z.shape().width());
    with_real!(z.dtype(), "scores", |T| Selection::positive::<T>(
        z.slice(),
        tokens,
        experts
    ))
}

/// Returns `z [T, E]` on the selection and 0 elsewhere.
///
/// # Errors
/// Returns an error when `z` does not fit the selection.
pub fn on_selection(tape: &Tape, z: &Var, dispatch: &Rc<Dispatch>) -> Result<Var> {
    let selection = dispatch.selection();
    let shape = [selection.num_tokens(), selection.num_experts()];
    z.tensor().expect_shape("scores", "logits", shape)?;
    let dispatch = dispatch.clone();
    tape.apply_one(OnSelection { dispatch }, &[z])
}

/// Returns the first row of `z [T, E]` that contains a NaN or an infinity, if any.
///
/// # Errors
/// Returns an error when `z` is not real.
pub fn first_non_finite(z: &Tensor) -> Result<Option<usize>> {
    let width = z.shape().width();
    with_real!(z.dtype(), "scores", |T| Ok(z
        .slice::<T>()
        .chunks(width)
        .position(|row| !row.iter().all(|x| x.is_finite()))))
}

/// Returns the positive part of each row of `scores [T, E]` divided by its sum, without a gradient: distributions for
/// statistics. A row without positive scores becomes zeros.
///
/// # Errors
/// Returns an error when `scores` is not real.
pub fn shares(scores: &Tensor) -> Result<Tensor> {
    let mut out = scores.clone();
    let width = scores.shape().width();
    with_real!(scores.dtype(), "scores", |T| {
        for row in out.slice_mut::<T>().chunks_mut(width) {
            row.iter_mut().for_each(|x| *x = x.max(T::of(0.0)));
            let sum: T = row.iter().copied().sum();
            if sum > 0.0 {
                row.iter_mut().for_each(|x| *x /= sum);
            }
        }
        Ok(out)
    })
}

struct Sigmoid;

impl Op for Sigmoid {
    fn name(&self) -> &'static str {
        "sigmoid"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let mut s = inputs[0].unspecified_like();
        with_real!(s.dtype(), "scores", |T| {
            let pairs = s.slice_mut::<T>().iter_mut().zip(inputs[0].slice::<T>());
            pairs.for_each(|(s, &z)| *s = sigmoid_of(z));
            Ok(Forward::one(s.clone(), vec![s]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (s, ds) = (&saved[0], only(douts));
        let mut dz = s.unspecified_like();
        with_real!(s.dtype(), "scores", |T| {
            let given = s.slice::<T>().iter().zip(ds.slice::<T>());
            for (dz, (&s, &ds)) in dz.slice_mut::<T>().iter_mut().zip(given) {
                *dz = s * (T::of(1.0) - s) * ds;
            }
            grads.give(0, dz)
        })
    }
}

struct OnSelection {
    dispatch: Rc<Dispatch>,
}

impl OnSelection {
    /// Returns `x` on the selection and 0 elsewhere, for forward and backward.
    fn masked(&self, x: &Tensor) -> Result<Tensor> {
        if x.device() != Device::Cpu {
            let gates = Selected {
                renormalize: false,
                through: false,
            };
            return gates.forward(x, &self.dispatch);
        }
        let selection = self.dispatch.selection();
        let mut out = Tensor::zeros(x.device(), x.dtype(), x.shape());
        let width = x.shape().width();
        with_real!(x.dtype(), "scores", |T| {
            let (to, from) = (out.slice_mut::<T>(), x.slice::<T>());
            for t in 0..selection.num_tokens() {
                for &e in selection.experts(t) {
                    let at = t * width + e as usize;
                    to[at] = from[at];
                }
            }
            Ok(out)
        })
    }
}

impl Op for OnSelection {
    fn name(&self) -> &'static str {
        "positive part"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        Ok(Forward::one(self.masked(inputs[0])?, vec![]))
    }

    fn backward(
        &self,
        _saved: &[Tensor],
        douts: &OutputGradients,
        grads: &mut Grads,
    ) -> Result<()> {
        grads.give(0, self.masked(only(douts))?)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let sizes = [(1, 1), (5, 7), (130, 8)];
    let sigmoids = sizes.map(|(t, e)| {
        Case::new(format!("sigmoid [{t}, {e}]"), |tape, v| {
            Ok(vec![sigmoid(tape, &v[0])?])
        })
        .input("z", [t, e])
    });
    let parts = [(1, 4, 2, false), (23, 7, 2, true), (9, 3, 3, false)].map(|(t, e, k, skip)| {
        let dispatch = Rc::new(Dispatch::new(super::dispatch::scattered(t, e, k, skip)));
        Case::new(
            format!("scores on a selection [{t}, {e}]"),
            move |tape, v| Ok(vec![on_selection(tape, &v[0], &dispatch)?]),
        )
        .input("z", [t, e])
    });
    sigmoids.into_iter().chain(parts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_experts_is_positive_and_zero_is_not() {
        let z = Tensor::from_slice([3, 3], &[1.0, 0.0, 2.0, -1.0, -0.0, 0.0, 1.0, 1.0, 1.0]);
        let found = positive(&z).unwrap();
        let chosen: Vec<&[i32]> = (0..3).map(|t| found.experts(t)).collect();
        assert_eq!(chosen, [&[0, 2][..], &[], &[0, 1, 2]]);
    }

    #[test]
    fn non_finite_logits_are_flagged_before_the_sigmoid_makes_them_finite() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let z = Tensor::from_slice([2, 2], &[1.0, 2.0, bad, 0.0]);
            assert_eq!(first_non_finite(&z).unwrap(), Some(1));
        }
    }

    #[test]
    fn shares_sum_to_one_and_a_row_of_zeros_stays() {
        let shares = shares(&Tensor::from_slice([2, 2], &[1.0, 3.0, 0.0, 0.0])).unwrap();
        assert_eq!(shares.slice::<f64>(), [0.25, 0.75, 0.0, 0.0]);
    }
}
