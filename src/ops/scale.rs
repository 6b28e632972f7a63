//! Columns scaled by a learned vector: `y = x ⊙ w`, `x [T, D]`, `w [D]`.
//!
//! `dx = dy ⊙ w`, `dw = Σ_t dy_t ⊙ x_t`.

use super::rows::{self, Arithmetic, Columns};
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate, block_rows};
use crate::tensor::dtype::Real;
use crate::with_real;

/// Returns `x [T, D]` with every row multiplied by `weight [D]`.
///
/// # Errors
/// Returns an error when widths or dtypes differ.
pub fn scale(tape: &Tape, x: &Var, weight: &Var) -> Result<Var> {
    let (x_tensor, w) = (x.tensor(), weight.tensor());
    w.expect_shape("scale", "weight", [x_tensor.shape().width()])?;
    w.expect_dtype("scale", "weight", x_tensor.dtype())?;
    tape.apply_one(Scale, &[x, weight])
}

struct Scale;

impl Op for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, w) = (inputs[0], inputs[1]);
        if x.device() != Device::Cpu {
            return Ok(Forward::one(
                rows::arithmetic(Arithmetic::Multiply, x, w)?,
                vec![x.clone(), w.clone()],
            ));
        }
        let mut y = x.unspecified_like();
        with_real!(x.dtype(), "scale", |T| {
            reference::forward(y.slice_mut::<T>(), x.slice(), w.slice());
            Ok(Forward::one(y, vec![x.clone(), w.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (x, w, dy) = (&saved[0], &saved[1], only(douts));
        if x.device() != Device::Cpu {
            grads.give(0, rows::arithmetic(Arithmetic::Multiply, dy, w)?)?;
            return grads.write(1, w, |dw, accumulate| {
                rows::column_sums(dw, accumulate, dy, Some(x), None, Columns::all(x))
            });
        }
        let mut dx = x.unspecified_like();
        with_real!(x.dtype(), "scale", |T| {
            reference::forward(dx.slice_mut::<T>(), dy.slice(), w.slice());
            grads.give(0, dx)?;
            grads.write(1, w, |dw, accumulate| {
                reference::dw(dw.slice_mut::<T>(), accumulate, dy.slice(), x.slice());
                Ok(())
            })
        })
    }
}

mod reference {
    use super::*;

    pub fn forward<T: Real>(y: &mut [T], x: &[T], w: &[T]) {
        let width = w.len();
        cpu::each_row_block(y, width, |first, y| {
            let rows = y.chunks_mut(width).zip(x[first * width..].chunks(width));
            for (y, x) in rows {
                for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                    *y = x * w;
                }
            }
        });
    }

    pub fn dw<T: Real>(dw: &mut [T], accumulate: Accumulate, dy: &[T], x: &[T]) {
        let width = dw.len();
        let rows = dy.len() / width;
        let partials = cpu::blocks(rows, block_rows(rows), |_, rows| {
            let mut sum = vec![T::zero(); width];
            let range = rows.start * width..rows.end * width;
            let pairs = dy[range.clone()].chunks(width).zip(x[range].chunks(width));
            for (dy, x) in pairs {
                for ((s, &dy), &x) in sum.iter_mut().zip(dy).zip(x) {
                    *s += dy * x;
                }
            }
            sum
        });
        cpu::write_sum(dw, accumulate, partials);
    }
}

pub(super) fn cases() -> Vec<Case> {
    [(1, 1), (5, 7), (130, 9)]
        .into_iter()
        .map(|(t, d)| {
            Case::new(format!("scale [{t}, {d}]"), |tape, v| {
                Ok(vec![scale(tape, &v[0], &v[1])?])
            })
            .input("x", [t, d])
            .input("weight", [d])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Gradients;

    #[test]
    fn two_rows_worked_by_hand() {
        let x = Var::leaf(Tensor::from_slice([2, 2], &[1.0, 2.0, 3.0, 4.0]), 0);
        let w = Var::leaf(Tensor::from_slice([2], &[10.0, 0.5]), 1);
        let tape = Tape::new();
        let y = scale(&tape, &x, &w).unwrap();
        assert_eq!(y.tensor().slice::<f64>(), [10.0, 1.0, 30.0, 2.0]);
        let mut store = Gradients::new(2);
        let dy = Tensor::from_slice([2, 2], &[1.0, -1.0, 2.0, 4.0]);
        tape.backward_from(&[(&y, dy)], &mut store).unwrap();
        assert_eq!(
            store.get(0).unwrap().slice::<f64>(),
            [10.0, -0.5, 20.0, 2.0]
        );
        // 1 · 1 + 2 · 3, −1 · 2 + 4 · 4.
        assert_eq!(store.get(1).unwrap().slice::<f64>(), [7.0, 14.0]);
    }
}
