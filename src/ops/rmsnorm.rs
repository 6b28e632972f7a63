//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467) of each row: `y = r x ⊙ w`,
//! `r = 1 / √(mean(x²) + ε)`.
//!
//! `x [.., D]`, `w [D]`. With `g = dy ⊙ w`: `dx = r (g − r² mean(g ⊙ x) x)`, `dw = Σ_rows r dy ⊙ x`. Backward
//! recomputes r, since it reads the row in any case.

use super::norm::{self, Kind, Norm};
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::vector::{map_over, sum_over};
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::Real;
use crate::with_real;

/// RMSNorm over the last axis of `x [.., D]`, with `weight [D]` and `eps` added to the mean square.
///
/// # Errors
/// Returns an error when the weight's shape or dtype does not fit.
pub fn rmsnorm(tape: &Tape, x: &Var, weight: &Var, eps: f64) -> Result<Var> {
    let width = x.tensor().shape().width();
    weight.tensor().expect_shape("rmsnorm", "weight", [width])?;
    weight
        .tensor()
        .expect_dtype("rmsnorm", "weight", x.tensor().dtype())?;
    tape.apply_one(RmsNorm { eps }, &[x, weight])
}

struct RmsNorm {
    eps: f64,
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rmsnorm"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, w) = (inputs[0], inputs[1]);
        let mut y = x.unspecified_like();
        if x.device() != Device::Cpu {
            norm::forward(&mut y, None, x, w, None, self.eps)?;
            return Ok(Forward::one(y, vec![x.clone(), w.clone()]));
        }
        with_real!(x.dtype(), "rmsnorm", |T| {
            reference::forward(y.slice_mut::<T>(), x.slice(), w.slice(), self.eps);
            Ok(Forward::one(y, vec![x.clone(), w.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (x, w) = (&saved[0], &saved[1]);
        let dy = only(douts);
        if x.device() != Device::Cpu {
            let (kind, eps) = (Kind::Rms, self.eps);
            return norm::answer(Norm { kind, x, w, eps }, dy, grads);
        }
        with_real!(x.dtype(), "rmsnorm", |T| {
            let mut partials = vec![];
            let mut run = |dx: &mut Tensor, accumulate| {
                partials = reference::backward(
                    dx.slice_mut::<T>(),
                    accumulate,
                    dy.slice(),
                    x.slice(),
                    w.slice(),
                    self.eps,
                );
                Ok(())
            };
            if !grads.wanted(0) {
                run(&mut x.unspecified_like(), Accumulate::Assign)?;
            }
            grads.write(0, x, run)?;
            grads.write(1, w, |dw, accumulate| {
                cpu::write_sum(dw.slice_mut::<T>(), accumulate, partials);
                Ok(())
            })
        })
    }
}

/// The operation on slices, for the CPU; a row has the width of the weight.
pub(super) mod reference {
    use super::*;

    /// Returns r of one row.
    #[inline(always)]
    fn scale<T: Real>(x: &[T], eps: f64) -> T {
        let mean = sum_over([x], |[x]| x * x) / T::of(x.len() as f64);
        (mean + T::of(eps)).sqrt().recip()
    }

    /// Computes one row of forward.
    #[inline(always)]
    pub fn normalize<T: Real>(y: &mut [T], x: &[T], w: &[T], eps: f64) {
        let r = scale(x, eps);
        map_over([y], [x, w], |[x, w], _| [x * r * w]);
    }

    /// One row of backward: writes `dx`, adds to `dw`.
    #[inline(always)]
    pub fn normalize_back<T: Real>(
        dx: &mut [T],
        dw: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        x: &[T],
        w: &[T],
        eps: f64,
    ) {
        let r = scale(x, eps);
        let gx = sum_over([dy, w, x], |[dy, w, x]| dy * w * x);
        let back = r * r * r * gx / T::of(w.len() as f64);
        map_over([dx, dw], [x, dy, w], |[x, dy, w], [dx, dw]| {
            [accumulate.onto(dx, dy * w * r - x * back), dw + dy * x * r]
        });
    }

    pub fn forward<T: Real>(y: &mut [T], x: &[T], w: &[T], eps: f64) {
        let width = w.len();
        cpu::each_row_block(y, width, |first, y| {
            let x = &x[first * width..];
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        normalize(y, x, w, eps);
                    }
                },
            );
        });
    }

    /// Writes `dx` and returns partial sums of `dw`, one per block of rows.
    pub fn backward<T: Real>(
        dx: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        x: &[T],
        w: &[T],
        eps: f64,
    ) -> Vec<Vec<T>> {
        let width = w.len();
        cpu::each_row_block(dx, width, |first, dx| {
            let (x, dy) = (&x[first * width..], &dy[first * width..]);
            let mut dw = vec![T::zero(); width];
            cpu::vectorized(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(width).zip(rows) {
                        normalize_back(dx, &mut dw, accumulate, dy, x, w, eps);
                    }
                },
            );
            dw
        })
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |shape: &[usize]| {
        let width = shape[shape.len() - 1];
        Case::new(format!("rmsnorm {shape:?}"), |tape, v| {
            Ok(vec![rmsnorm(tape, &v[0], &v[1], 1e-5)?])
        })
        .input("x", shape)
        .input("weight", [width])
    };
    let gradient_of_weight_alone = Case::new("rmsnorm of a constant [4, 3]", |tape, v| {
        Ok(vec![rmsnorm(tape, &v[0], &v[1], 1e-5)?])
    })
    .input("x", [4, 3])
    .constant()
    .input("weight", [3]);
    vec![
        case(&[1, 5]),
        case(&[67, 37]),
        case(&[5, 3, 16]),
        gradient_of_weight_alone,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_worked_by_hand() {
        // mean(x²) = (9 + 16) / 2 + 0.5 = 13 with eps 0.5, r = 1 / √13.
        let x = Var::constant(Tensor::from_slice([1, 2], &[3.0, 4.0]));
        let w = Var::constant(Tensor::from_slice([2], &[2.0, -1.0]));
        let y = rmsnorm(&Tape::new(), &x, &w, 0.5).unwrap();
        let r = 13f64.sqrt().recip();
        for (y, expected) in y.tensor().slice::<f64>().iter().zip([6.0 * r, -4.0 * r]) {
            assert!((y - expected).abs() <= 1e-15);
        }
    }

    #[test]
    fn a_weight_of_another_width_is_an_error() {
        let x = Var::constant(Tensor::from_slice([1, 2], &[3.0, 4.0]));
        let w = Var::constant(Tensor::from_slice([3], &[1.0; 3]));
        let e = rmsnorm(&Tape::new(), &x, &w, 1e-5).unwrap_err().to_string();
        assert!(e.contains("weight of shape [2], got [3]"), "{e}");
    }
}
