//! LayerNorm (Ba et al., arXiv 1607.06450) of each row: `y = x̂ ⊙ w + b`, `x̂ = r (x − mean(x))`,
//! `r = 1 / √(var(x) + ε)`, the variance divided by D.
//!
//! `x [.., D]`, `w [D]`, `b [D]`. With `g = dy ⊙ w`: `dx = r (g − mean(g) − mean(g ⊙ x̂) x̂)`, `dw = Σ_rows dy ⊙ x̂`,
//! `db = Σ_rows dy`. Backward recomputes the mean and r.

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

/// LayerNorm over the last axis of `x [.., D]`, with `weight [D]`, `bias [D]` and `eps` added to the
/// variance.
///
/// # Errors
/// Returns an error when shapes or dtypes of weight and bias do not fit.
pub fn layernorm(tape: &Tape, x: &Var, weight: &Var, bias: &Var, eps: f64) -> Result<Var> {
    let width = x.tensor().shape().width();
    for (what, v) in [("weight", weight), ("bias", bias)] {
        v.tensor().expect_shape("layernorm", what, [width])?;
        v.tensor()
            .expect_dtype("layernorm", what, x.tensor().dtype())?;
    }
    tape.apply_one(LayerNorm { eps }, &[x, weight, bias])
}

struct LayerNorm {
    eps: f64,
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        "layernorm"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, w, b) = (inputs[0], inputs[1], inputs[2]);
        let mut y = x.unspecified_like();
        if x.device() != Device::Cpu {
            norm::forward(&mut y, None, x, w, Some(b), self.eps)?;
            return Ok(Forward::one(y, vec![x.clone(), w.clone()]));
        }
        with_real!(x.dtype(), "layernorm", |T| {
            let y_slice = y.slice_mut::<T>();
            reference::forward(y_slice, x.slice(), w.slice(), b.slice(), self.eps);
            Ok(Forward::one(y, vec![x.clone(), w.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (x, w) = (&saved[0], &saved[1]);
        let dy = only(douts);
        if x.device() != Device::Cpu {
            let (kind, eps) = (Kind::Layer, self.eps);
            return norm::answer(Norm { kind, x, w, eps }, dy, grads);
        }
        with_real!(x.dtype(), "layernorm", |T| {
            let (mut dweight, mut dbias) = (vec![], vec![]);
            let mut run = |dx: &mut Tensor, accumulate| {
                (dweight, dbias) = reference::backward(
                    dx.slice_mut::<T>(),
                    accumulate,
                    dy.slice(),
                    x.slice(),
                    w.slice(),
                    self.eps,
                )
                .into_iter()
                .unzip();
                Ok(())
            };
            if !grads.wanted(0) {
                run(&mut x.unspecified_like(), Accumulate::Assign)?;
            }
            grads.write(0, x, run)?;
            for (input, partials) in [(1, dweight), (2, dbias)] {
                grads.write(input, w, |dst, accumulate| {
                    cpu::write_sum(dst.slice_mut::<T>(), accumulate, partials);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }
}

/// The operation on slices, for the CPU; a row has the width of the weight.
pub(super) mod reference {
    use super::*;

    /// Returns mean(x) and r.
    #[inline(always)]
    fn statistics<T: Real>(x: &[T], eps: f64) -> (T, T) {
        let n = T::of(x.len() as f64);
        let mean = sum_over([x], |[x]| x) / n;
        let variance = sum_over([x], |[x]| (x - mean) * (x - mean)) / n;
        (mean, (variance + T::of(eps)).sqrt().recip())
    }

    pub fn forward<T: Real>(y: &mut [T], x: &[T], w: &[T], b: &[T], eps: f64) {
        let width = w.len();
        cpu::each_row_block(y, width, |first, y| {
            let x = &x[first * width..];
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        let (mean, r) = statistics(x, eps);
                        map_over([y], [x, w, b], |[x, w, b], _| [(x - mean) * r * w + b]);
                    }
                },
            );
        });
    }

    /// Writes `dx` and returns partial sums of `dw` and `db`, one pair per block of rows.
    pub fn backward<T: Real>(
        dx: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        x: &[T],
        w: &[T],
        eps: f64,
    ) -> Vec<(Vec<T>, Vec<T>)> {
        let width = w.len();
        let n = T::of(width as f64);
        cpu::each_row_block(dx, width, |first, dx| {
            let (x, dy) = (&x[first * width..], &dy[first * width..]);
            let (mut dw, mut db) = (vec![T::zero(); width], vec![T::zero(); width]);
            cpu::vectorized(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(width).zip(rows) {
                        let (mean, r) = statistics(x, eps);
                        let g = sum_over([dy, w], |[dy, w]| dy * w) / n;
                        let gx = sum_over([dy, w, x], |[dy, w, x]| dy * w * (x - mean)) * r / n;
                        let outputs = [dx, &mut dw, &mut db];
                        map_over(outputs, [x, dy, w], |[x, dy, w], [dx, dw, db]| {
                            let normal = (x - mean) * r;
                            [
                                accumulate.onto(dx, (dy * w - g - normal * gx) * r),
                                dw + dy * normal,
                                db + dy,
                            ]
                        });
                    }
                },
            );
            (dw, db)
        })
    }
}

pub(super) fn cases() -> Vec<Case> {
    let run = |tape: &Tape, v: &[Var]| Ok(vec![layernorm(tape, &v[0], &v[1], &v[2], 1e-5)?]);
    let case = |shape: &[usize]| {
        let width = shape[shape.len() - 1];
        Case::new(format!("layernorm {shape:?}"), run)
            .input("x", shape)
            .input("weight", [width])
            .input("bias", [width])
    };
    let gradient_of_weights_alone = Case::new("layernorm of a constant [4, 3]", run)
        .input("x", [4, 3])
        .constant()
        .input("weight", [3])
        .input("bias", [3]);
    vec![
        case(&[1, 5]),
        case(&[67, 37]),
        case(&[5, 3, 16]),
        gradient_of_weights_alone,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_worked_by_hand() {
        // mean 5, variance (4 + 4) / 2 = 4, plus eps 5: r = 1/3; x̂ = (−2/3, 2/3).
        let x = Var::constant(Tensor::from_slice([1, 2], &[3.0, 7.0]));
        let w = Var::constant(Tensor::from_slice([2], &[3.0, 6.0]));
        let b = Var::constant(Tensor::from_slice([2], &[0.5, 1.0]));
        let y = layernorm(&Tape::new(), &x, &w, &b, 5.0).unwrap();
        for (y, expected) in y.tensor().slice::<f64>().iter().zip([-1.5, 5.0]) {
            assert!((y - expected).abs() <= 1e-15);
        }
    }

    #[test]
    fn a_bias_of_another_width_is_an_error() {
        let x = Var::constant(Tensor::from_slice([1, 2], &[3.0, 4.0]));
        let (w, b) = (
            Tensor::from_slice([2], &[1.0; 2]),
            Tensor::from_slice([3], &[1.0; 3]),
        );
        let e = layernorm(&Tape::new(), &x, &Var::constant(w), &Var::constant(b), 1e-5);
        let e = e.unwrap_err().to_string();
        assert!(e.contains("bias of shape [2], got [3]"), "{e}");
    }
}
