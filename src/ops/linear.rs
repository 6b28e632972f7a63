//! Linear map of rows: `y = x Wᵀ + b`.
//!
//! `x [R, I]`, `W [O, I]` (one row per output, the layout of checkpoints), `b [O]` or none, `y [R, O]`. `dx = dy W`,
//! `dW = dyᵀ x`, `db = Σ_r dy_r`.
//!
//! On a device with kernels it is the dense case of `kernels/grouped_gemm.cu`: one group, no offsets. A bias is added
//! to the product after it was rounded to bf16 (`kernels/rows.cu`).

use super::rows::{self, Columns};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::launchers::TILE_AUTO;
use crate::kernels::{
    GroupedGemmForward, GroupedGemmInputGradient, GroupedGemmWeightGradient, In, Out, Stream,
    SumParts,
};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate, Mat};
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use half::bf16;

/// Returns `x Wᵀ + b` of shape `[.., O]` for `x` of shape `[.., I]`.
///
/// # Errors
/// Returns an error when widths or dtypes differ.
pub fn linear(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    let (x_shape, w_shape) = (x.tensor().shape(), weight.tensor().shape());
    if w_shape.len() != 2 || x_shape.width() != w_shape[1] {
        return Err(Error::invalid(
            "linear",
            "x [.., inputs] and a weight [outputs, inputs]",
            format!("{x_shape} and {w_shape}"),
            "pass tensors whose last extents are equal",
        ));
    }
    weight
        .tensor()
        .expect_dtype("linear", "weight", x.tensor().dtype())?;
    let mut inputs = vec![x, weight];
    if let Some(bias) = bias {
        bias.tensor().expect_shape("linear", "bias", [w_shape[0]])?;
        bias.tensor()
            .expect_dtype("linear", "bias", x.tensor().dtype())?;
        inputs.push(bias);
    }
    tape.apply_one(Linear, &inputs)
}

struct Linear;

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, w) = (inputs[0], inputs[1]);
        let mut extents = x.shape().to_vec();
        if let Some(width) = extents.last_mut() {
            *width = w.shape()[0];
        }
        let mut y = Tensor::unspecified(x.device(), x.dtype(), extents.as_slice());
        let saved = inputs.iter().map(|&t| t.clone()).collect();
        if x.device() != Device::Cpu {
            kernels::forward(&mut y, x, w)?;
            if let Some(bias) = inputs.get(2) {
                rows::add_to(&mut y, bias)?;
            }
            let outputs = vec![y];
            return Ok(Forward { outputs, saved });
        }
        with_real!(x.dtype(), "linear", |T| {
            let bias = inputs.get(2).map(|b| b.slice::<T>());
            reference::forward(y.slice_mut::<T>(), x.slice(), w.slice(), bias, w.shape()[1]);
            Ok(())
        })?;
        Ok(Forward::one(y, saved))
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (x, w) = (&saved[0], &saved[1]);
        let dy = only(douts);
        if x.device() != Device::Cpu {
            kernels::backward(grads, x, w, dy)?;
            if let Some(bias) = saved.get(2) {
                grads.write(2, bias, |db, accumulate| {
                    rows::column_sums(db, accumulate, dy, None, None, Columns::all(dy))
                })?;
            }
            return Ok(());
        }
        with_real!(x.dtype(), "linear", |T| {
            let (inputs, outputs) = (w.shape()[1], w.shape()[0]);
            grads.write(0, x, |dx, accumulate| {
                reference::dx(
                    dx.slice_mut::<T>(),
                    accumulate,
                    dy.slice(),
                    w.slice(),
                    inputs,
                );
                Ok(())
            })?;
            grads.write(1, w, |dw, accumulate| {
                reference::dw(
                    dw.slice_mut::<T>(),
                    accumulate,
                    dy.slice(),
                    x.slice(),
                    inputs,
                );
                Ok(())
            })?;
            if let Some(bias) = saved.get(2) {
                grads.write(2, bias, |db, accumulate| {
                    reference::db(db.slice_mut::<T>(), accumulate, dy.slice(), outputs);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }
}

/// `kernels/grouped_gemm.cu` with one group. All tensors are bf16, except the gradient of a weight, which is f32.
pub(super) mod kernels {
    use super::*;

    /// Computes the gradients of x and W, the first two inputs.
    ///
    /// # Errors
    /// The same errors as [`forward`].
    pub fn backward(grads: &mut Grads, x: &Tensor, w: &Tensor, dy: &Tensor) -> Result<()> {
        if grads.wanted(0) {
            let mut dx = x.unspecified_like();
            input_gradient(&mut dx, dy, w)?;
            grads.give(0, dx)?;
        } else {
            grads.none(0);
        }
        grads.write(1, w, |dw, accumulate| {
            weight_gradient(dw, accumulate, dy, x)
        })
    }

    /// `y = x Wᵀ`.
    ///
    /// # Errors
    /// Returns an error when the kernel does not support a dtype or a width.
    pub fn forward(y: &mut Tensor, x: &Tensor, w: &Tensor) -> Result<()> {
        let rows = x.shape().rows();
        for (what, t) in [("x", x), ("weight", w)] {
            t.expect_dtype("linear", what, DType::Bf16)?;
        }
        GroupedGemmForward {
            out: y.output()?,
            x: x.input()?,
            w: w.input()?,
            offsets: None,
            row_token: None,
            rows,
            x_rows: rows,
            experts: 1,
            n: w.shape()[0],
            k: w.shape()[1],
            tile: TILE_AUTO,
        }
        .launch(&Stream::of(x.device())?)
    }

    /// `dx = dy W`.
    ///
    /// # Errors
    /// The same errors as [`forward`].
    pub fn input_gradient(dx: &mut Tensor, dy: &Tensor, w: &Tensor) -> Result<()> {
        dy.expect_dtype("linear", "the gradient of y", DType::Bf16)?;
        input_gradient_of(dx.output()?, dy.input()?, w, dy.shape().rows())
    }

    /// [`input_gradient`] with the number of rows given.
    ///
    /// # Errors
    /// The same errors as [`forward`].
    pub fn input_gradient_of(
        dx: Out<'_, bf16>,
        dy: In<'_, bf16>,
        w: &Tensor,
        rows: usize,
    ) -> Result<()> {
        GroupedGemmInputGradient {
            dx,
            dout: dy,
            w: w.input()?,
            offsets: None,
            row_token: None,
            rows,
            dout_rows: rows,
            experts: 1,
            n: w.shape()[0],
            k: w.shape()[1],
            tile: TILE_AUTO,
        }
        .launch(&Stream::of(w.device())?)
    }

    /// `dW (+)= dyᵀ x`, rows in order.
    ///
    /// # Errors
    /// The same errors as [`forward`].
    pub fn weight_gradient(
        dw: &mut Tensor,
        accumulate: Accumulate,
        dy: &Tensor,
        x: &Tensor,
    ) -> Result<()> {
        let rows = dy.shape().rows();
        let parts = GroupedGemmWeightGradient::parts(rows, dw.shape()[0], dw.shape()[1]);
        if parts > 1 {
            return in_parts(dw, accumulate, dy, x, parts);
        }
        weight_gradient_of(dw, accumulate, dy.input()?, x.input()?, rows, None)
    }

    /// [`weight_gradient`] computed in parts: the rows are divided into groups, each group has its own product, and
    /// the products are summed.
    fn in_parts(
        dw: &mut Tensor,
        accumulate: Accumulate,
        dy: &Tensor,
        x: &Tensor,
        parts: usize,
    ) -> Result<()> {
        dw.expect_dtype("linear", "the weight's gradient", DType::F32)?;
        let (device, rows) = (x.device(), dy.shape().rows());
        let [outputs, inputs] = [0, 1].map(|i| dw.shape()[i]);
        let offsets = GroupedGemmWeightGradient::part_offsets(rows, parts);
        let offsets = Tensor::constant(device, [parts + 1], &offsets);
        let mut each = Tensor::unspecified(device, DType::F32, [parts, outputs, inputs]);
        let assign = Accumulate::Assign;
        weight_gradient_of(
            &mut each,
            assign,
            dy.input()?,
            x.input()?,
            rows,
            Some(&offsets),
        )?;
        let elements = dw.elements();
        SumParts {
            out: dw.output()?,
            parts: each.input()?,
            count: parts,
            elements,
            accumulate: accumulate == Accumulate::Add,
        }
        .launch(&Stream::of(device)?)
    }

    /// [`weight_gradient`] with the number of rows given. With offsets `[G + 1]`, dw is `[G, outputs, inputs]`, one
    /// matrix per group of rows.
    ///
    /// # Errors
    /// The same errors as [`forward`].
    pub fn weight_gradient_of(
        dw: &mut Tensor,
        accumulate: Accumulate,
        dy: In<'_, bf16>,
        x: In<'_, bf16>,
        rows: usize,
        offsets: Option<&Tensor>,
    ) -> Result<()> {
        dw.expect_dtype("linear", "the weight's gradient", DType::F32)?;
        let (groups, outputs, inputs) = match *dw.shape() {
            [groups, outputs, inputs] => (groups, outputs, inputs),
            _ => (1, dw.shape()[0], dw.shape()[1]),
        };
        let stream = Stream::of(dw.device())?;
        GroupedGemmWeightGradient {
            dw: dw.output()?,
            dout: dy,
            x,
            offsets: offsets.map(Tensor::input).transpose()?,
            dout_row_token: None,
            x_row_token: None,
            rows,
            dout_rows: rows,
            x_rows: rows,
            experts: groups,
            n: outputs,
            k: inputs,
            accumulate: accumulate == Accumulate::Add,
            tile: TILE_AUTO,
        }
        .launch(&stream)
    }
}

/// The operation on slices, for the CPU; `inputs` is I, the width of `x`.
pub(super) mod reference {
    use super::*;

    pub fn forward<T: Real>(y: &mut [T], x: &[T], w: &[T], bias: Option<&[T]>, inputs: usize) {
        let (rows, outputs) = (x.len() / inputs, w.len() / inputs);
        let weight = Mat::new(w, outputs, inputs).t();
        cpu::matmul(y, Accumulate::Assign, Mat::new(x, rows, inputs), weight);
        if let Some(bias) = bias {
            cpu::each_row_block(y, outputs, |_, rows| {
                for row in rows.chunks_mut(outputs) {
                    for (y, &b) in row.iter_mut().zip(bias) {
                        *y += b;
                    }
                }
            });
        }
    }

    pub fn dx<T: Real>(dx: &mut [T], accumulate: Accumulate, dy: &[T], w: &[T], inputs: usize) {
        let (rows, outputs) = (dx.len() / inputs, w.len() / inputs);
        cpu::matmul(
            dx,
            accumulate,
            Mat::new(dy, rows, outputs),
            Mat::new(w, outputs, inputs),
        );
    }

    pub fn dw<T: Real>(dw: &mut [T], accumulate: Accumulate, dy: &[T], x: &[T], inputs: usize) {
        let (rows, outputs) = (x.len() / inputs, dw.len() / inputs);
        cpu::matmul_over_inner(
            dw,
            accumulate,
            Mat::new(dy, rows, outputs).t(),
            Mat::new(x, rows, inputs),
        );
    }

    pub fn db<T: Real>(db: &mut [T], accumulate: Accumulate, dy: &[T], outputs: usize) {
        const BLOCK: usize = 256;
        let partials = cpu::blocks(dy.len() / outputs, BLOCK, |_, rows| {
            let mut sum = vec![T::zero(); outputs];
            for row in dy[rows.start * outputs..rows.end * outputs].chunks(outputs) {
                for (s, &d) in sum.iter_mut().zip(row) {
                    *s += d;
                }
            }
            sum
        });
        if accumulate == Accumulate::Assign {
            db.fill(T::zero());
        }
        for (d, s) in db.iter_mut().zip(cpu::sum_in_order(partials)) {
            *d += s;
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let plain = |r: usize, i: usize, o: usize| {
        Case::new(format!("linear [{r}, {i}] to {o}"), |tape, v| {
            Ok(vec![linear(tape, &v[0], &v[1], None)?])
        })
        .input("x", [r, i])
        .input("weight", [o, i])
    };
    let biased = Case::new("linear [2, 9, 6] to 5, bias", |tape, v| {
        Ok(vec![linear(tape, &v[0], &v[1], Some(&v[2]))?])
    })
    .input("x", [2, 9, 6])
    .input("weight", [5, 6])
    .input("bias", [5]);
    vec![plain(1, 3, 2), plain(67, 8, 13), plain(300, 5, 1), biased]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_worked_by_hand() {
        let x = Var::constant(Tensor::from_slice([1, 2], &[1.0, 2.0]));
        let w = Var::constant(Tensor::from_slice([3, 2], &[1.0, 0.0, 0.0, 1.0, 3.0, 4.0]));
        let b = Var::constant(Tensor::from_slice([3], &[0.5, 0.0, -1.0]));
        let y = linear(&Tape::new(), &x, &w, Some(&b)).unwrap();
        assert_eq!(y.tensor().slice::<f64>(), [1.5, 2.0, 10.0]);
    }

    #[test]
    fn widths_that_differ_are_an_error() {
        let x = Var::constant(Tensor::from_slice([1, 2], &[1.0, 2.0]));
        let e = linear(
            &Tape::new(),
            &x,
            &Var::constant(Tensor::from_slice([1, 3], &[0.0; 3])),
            None,
        );
        assert!(e.unwrap_err().to_string().contains("[1, 2] and [1, 3]"));
    }
}
