//! SwiGLU (Shazeer, arXiv 2002.05202): `y = silu(gate) ⊙ up`, `silu(z) = z σ(z)`.
//!
//! `x [R, 2F]` holds gate, then up, in each row: one projection computes both. `y [R, F]`.
//! `dgate = dy ⊙ up ⊙ σ (1 + gate (1 − σ))`, `dup = dy ⊙ gate σ`, σ = σ(gate), computed again.
//!
//! On a device with kernels: `kernels/swiglu.cu`. There, only dense layers use this operation; the kernels of the
//! experts' projections include SwiGLU.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::{Stream, SwigluBackward, SwigluForward};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::vector::{map_over, sigmoid};
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use std::ops::Range;

/// Returns SwiGLU of `x [R, 2F]`, gate first, as `[R, F]`; R may be 0.
///
/// # Errors
/// Returns an error when `x` is not a matrix of even width.
pub fn swiglu(tape: &Tape, x: &Var) -> Result<Var> {
    let shape = x.tensor().shape();
    if shape.len() != 2 || shape.width() % 2 != 0 {
        return Err(Error::invalid(
            "swiglu",
            "x [rows, 2 * width], gate then up in each row",
            shape.to_string(),
            "pass the output of the fused gate and up projection",
        ));
    }
    tape.apply_one(SwiGlu, &[x])
}

struct SwiGlu;

impl Op for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let x = inputs[0];
        let (rows, width) = (x.shape()[0], x.shape()[1] / 2);
        let mut y = Tensor::unspecified(x.device(), x.dtype(), [rows, width]);
        if x.device() != Device::Cpu {
            kernels::forward(&mut y, x)?;
            return Ok(Forward::one(y, vec![x.clone()]));
        }
        with_real!(x.dtype(), "swiglu", |T| {
            reference::forward(y.slice_mut::<T>(), x.slice(), width);
            Ok(Forward::one(y, vec![x.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let dy = only(douts);
        let x = &saved[0];
        if x.device() != Device::Cpu {
            let mut dx = x.unspecified_like();
            kernels::backward(&mut dx, dy, x)?;
            return grads.give(0, dx);
        }
        with_real!(x.dtype(), "swiglu", |T| grads.write(
            0,
            x,
            |dx, accumulate| {
                let width = dy.shape().width();
                reference::dx(
                    dx.slice_mut::<T>(),
                    accumulate,
                    dy.slice(),
                    x.slice(),
                    width,
                );
                Ok(())
            }
        ))
    }
}

/// `kernels/swiglu.cu`; tensors are bf16.
mod kernels {
    use super::*;

    pub fn forward(y: &mut Tensor, x: &Tensor) -> Result<()> {
        x.expect_dtype("swiglu", "x", DType::Bf16)?;
        let (rows, ffn) = (y.shape().rows(), y.shape().width());
        SwigluForward {
            a: y.output()?,
            h: x.input()?,
            rows,
            ffn,
        }
        .launch(&Stream::of(x.device())?)
    }

    pub fn backward(dx: &mut Tensor, dy: &Tensor, x: &Tensor) -> Result<()> {
        dy.expect_dtype("swiglu", "the gradient of y", DType::Bf16)?;
        SwigluBackward {
            dh: dx.output()?,
            da: dy.input()?,
            h: x.input()?,
            rows: dy.shape().rows(),
            ffn: dy.shape().width(),
        }
        .launch(&Stream::of(x.device())?)
    }
}

/// The operation on slices, for the CPU; `width` is F.
pub(super) mod reference {
    use super::*;

    pub fn forward<T: Real>(y: &mut [T], x: &[T], width: usize) {
        cpu::each_row_block(y, width, |first, y| {
            forward_columns(y, &x[first * 2 * width..], width, 0..width);
        });
    }

    /// Writes some columns of the rows of `y [R, F]`.
    pub fn forward_columns<T: Real>(y: &mut [T], x: &[T], width: usize, columns: Range<usize>) {
        cpu::vectorized(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
                    let (gate, up) = x.split_at(width);
                    map_over(
                        [&mut y[columns.clone()]],
                        [&gate[columns.clone()], &up[columns.clone()]],
                        |[gate, up], _| [gate * sigmoid(gate) * up],
                    );
                }
            },
        );
    }

    pub fn dx<T: Real>(dx: &mut [T], accumulate: Accumulate, dy: &[T], x: &[T], width: usize) {
        cpu::each_row_block(dx, 2 * width, |first, dx| {
            let (x, dy) = (&x[first * 2 * width..], &dy[first * width..]);
            dx_columns(dx, accumulate, dy, x, width, 0..width);
        });
    }

    /// Writes the parts of dx that belong to some columns of gate and up. `dy` holds the gradients of these columns
    /// only.
    pub fn dx_columns<T: Real>(
        dx: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        x: &[T],
        width: usize,
        columns: Range<usize>,
    ) {
        let x = x.chunks_exact(2 * width);
        let rows = dx.chunks_exact_mut(2 * width).zip(x);
        cpu::vectorized(
            #[inline(always)]
            || {
                for ((dx, x), dy) in rows.zip(dy.chunks_exact(columns.len())) {
                    let (dgate, dup) = dx.split_at_mut(width);
                    let (gate, up) = x.split_at(width);
                    let outputs = [&mut dgate[columns.clone()], &mut dup[columns.clone()]];
                    let inputs = [&gate[columns.clone()], &up[columns.clone()], dy];
                    map_over(outputs, inputs, |[gate, up, dy], old| {
                        let s = sigmoid(gate);
                        let slope = s * (T::one() + gate * (T::one() - s));
                        let dgate = accumulate.onto(old[0], dy * up * slope);
                        [dgate, accumulate.onto(old[1], dy * gate * s)]
                    });
                }
            },
        );
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |rows: usize, width: usize| {
        Case::new(format!("swiglu [{rows}, {}]", 2 * width), |tape, v| {
            Ok(vec![swiglu(tape, &v[0])?])
        })
        .input("x", [rows, 2 * width])
    };
    vec![case(1, 1), case(3, 7), case(70, 37), case(0, 4)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_comes_first_and_is_the_one_that_is_squashed() {
        // gate (ln 3, 0), up (2, 5): σ(ln 3) = 3/4, so y = (ln 3 · 3/4 · 2, 0).
        let ln3 = 3f64.ln();
        let x = Var::constant(Tensor::from_slice([1, 4], &[ln3, 0.0, 2.0, 5.0]));
        let y = swiglu(&Tape::new(), &x).unwrap();
        let y = y.tensor().slice::<f64>();
        assert!((y[0] - 1.5 * ln3).abs() <= 1e-15);
        assert_eq!(y[1], 0.0);
    }

    #[test]
    fn an_odd_width_is_an_error() {
        let x = Var::constant(Tensor::from_slice([1, 3], &[0.0; 3]));
        let e = swiglu(&Tape::new(), &x).unwrap_err().to_string();
        assert!(e.contains("[1, 3]"), "{e}");
    }
}
