//! A gate for each row: `y_t = σ(s_t) x_t`; it scales the output of a shared expert.
//!
//! `s [T, 1]`, `x [T, D]`. `dx_t = σ(s_t) dy_t`, `ds_t = σ(s_t) (1 − σ(s_t)) ⟨dy_t, x_t⟩`.

use crate::error::{Error, Result};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::vector::{sigmoid, sum_over};
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::Real;
use crate::with_real;

/// Returns the rows of `x [T, D]`, each multiplied by σ of its score in `scores [T, 1]`.
///
/// # Errors
/// Returns an error when shapes or dtypes do not fit.
pub fn sigmoid_gate(tape: &Tape, scores: &Var, x: &Var) -> Result<Var> {
    let shape = x.tensor().shape();
    if shape.len() != 2 {
        return Err(Error::invalid(
            "sigmoid_gate",
            "x [tokens, width]",
            shape.to_string(),
            "pass a matrix",
        ));
    }
    let scores_tensor = scores.tensor();
    scores_tensor.expect_shape("sigmoid_gate", "scores", [shape[0], 1])?;
    scores_tensor.expect_dtype("sigmoid_gate", "scores", x.tensor().dtype())?;
    tape.apply_one(SigmoidGate, &[scores, x])
}

struct SigmoidGate;

impl Op for SigmoidGate {
    fn name(&self) -> &'static str {
        "sigmoid_gate"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (s, x) = (inputs[0], inputs[1]);
        let mut y = x.unspecified_like();
        with_real!(x.dtype(), "sigmoid_gate", |T| {
            let (width, y_slice) = (x.shape().width(), y.slice_mut::<T>());
            reference::scaled(y_slice, Accumulate::Assign, s.slice(), x.slice(), width);
            Ok(Forward::one(y, vec![s.clone(), x.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (s, x) = (&saved[0], &saved[1]);
        let dy = only(douts);
        let width = x.shape().width();
        with_real!(x.dtype(), "sigmoid_gate", |T| {
            grads.write(0, s, |ds, accumulate| {
                let ds = ds.slice_mut::<T>();
                reference::ds(ds, accumulate, dy.slice(), s.slice(), x.slice(), width);
                Ok(())
            })?;
            grads.write(1, x, |dx, accumulate| {
                let dx = dx.slice_mut::<T>();
                reference::scaled(dx, accumulate, s.slice(), dy.slice(), width);
                Ok(())
            })
        })
    }
}

/// The operation on slices, for the CPU; `width` is D.
pub(super) mod reference {
    use super::*;

    /// Writes the rows of `x` multiplied by σ(s): used for forward, and for `dx` from `dy`.
    pub fn scaled<T: Real>(y: &mut [T], accumulate: Accumulate, s: &[T], x: &[T], width: usize) {
        cpu::each_row_block(y, width, |first, y| {
            let (s, x) = (&s[first..], &x[first * width..]);
            cpu::vectorized(
                #[inline(always)]
                || {
                    let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((y, x), &s) in rows.zip(s) {
                        let gate = sigmoid(s);
                        for (y, &x) in y.iter_mut().zip(x) {
                            *y = accumulate.onto(*y, gate * x);
                        }
                    }
                },
            );
        });
    }

    pub fn ds<T: Real>(
        ds: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        s: &[T],
        x: &[T],
        width: usize,
    ) {
        cpu::each_row_block(ds, 1, |first, ds| {
            let inputs = s[first..].iter().enumerate();
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (ds, (i, &s)) in ds.iter_mut().zip(inputs) {
                        let row = (first + i) * width..(first + i + 1) * width;
                        let dot = sum_over([&dy[row.clone()], &x[row]], |[dy, x]| dy * x);
                        let gate = sigmoid(s);
                        *ds = accumulate.onto(*ds, gate * (T::one() - gate) * dot);
                    }
                },
            );
        });
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |tokens: usize, width: usize| {
        Case::new(format!("sigmoid_gate [{tokens}, {width}]"), |tape, v| {
            Ok(vec![sigmoid_gate(tape, &v[0], &v[1])?])
        })
        .input("scores", [tokens, 1])
        .input("x", [tokens, width])
    };
    vec![case(1, 1), case(5, 3), case(70, 37)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_worked_by_hand() {
        // σ(0) = 1/2, σ(ln 3) = 3/4.
        let s = Var::constant(Tensor::from_slice([2, 1], &[0.0, 3f64.ln()]));
        let x = Var::constant(Tensor::from_slice([2, 2], &[2.0, -4.0, 8.0, 0.0]));
        let y = sigmoid_gate(&Tape::new(), &s, &x).unwrap();
        for (y, expected) in y.tensor().slice::<f64>().iter().zip([1.0, -2.0, 6.0, 0.0]) {
            assert!((y - expected).abs() <= 1e-15);
        }
    }

    #[test]
    fn one_score_for_two_rows_is_an_error() {
        let s = Var::constant(Tensor::from_slice([1, 1], &[0.0]));
        let x = Var::constant(Tensor::from_slice([2, 2], &[0.0; 4]));
        let e = sigmoid_gate(&Tape::new(), &s, &x).unwrap_err().to_string();
        assert!(e.contains("scores of shape [2, 1], got [1, 1]"), "{e}");
    }
}
