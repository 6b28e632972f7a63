//! Linear map of rows: `y = x Wᵀ + b`.
//!
//! `x [R, I]`, `W [O, I]` (one row per output, as checkpoints hold it), `b [O]` or none, `y [R, O]`.
//! `dx = dy W`, `dW = dyᵀ x`, `db = Σ_r dy_r`.
//!
//! On a device with kernels it is the dense case of `kernels/grouped_gemm.cu`: one group, no offsets. A
//! bias is added to what the product left in bf16 (`kernels/rows.cu`).

use super::rows::{self, Columns};
use crate::device::{Device, stream};
use crate::error::{Error, Result};
use crate::kernels::launchers::{Launchers, TILE_AUTO};
use crate::launch;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate, Mat};
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use std::ffi::c_void;
use std::ptr::null;

/// `x Wᵀ + b` for `x` of shape `[.., I]`; the result has shape `[.., O]`.
///
/// # Errors
/// When widths or dtypes differ.
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
        Ok(Forward {
            outputs: vec![y],
            saved,
        })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
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

/// `kernels/grouped_gemm.cu` with one group. Tensors are bf16, but a weight's gradient is f32.
pub(super) mod kernels {
    use super::*;

    /// Gives the gradients of x and W, the first two inputs.
    ///
    /// # Errors
    /// As [`forward`].
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
    /// When a dtype or a width is not one of the kernel's.
    pub fn forward(y: &mut Tensor, x: &Tensor, w: &Tensor) -> Result<()> {
        let rows = x.shape().rows() as i64;
        let (outputs, inputs) = (w.shape()[0] as i32, w.shape()[1] as i32);
        for (what, t) in [("x", x), ("weight", w)] {
            t.expect_dtype("linear", what, DType::Bf16)?;
        }
        // SAFETY: the tensors have the shapes that grouped_gemm.cu's header names.
        unsafe {
            launch!(
                x.device().launchers()?,
                grouped_gemm_forward(
                    y.pointer_mut(),
                    x.pointer(),
                    w.pointer(),
                    null(),
                    null(),
                    rows,
                    rows,
                    1,
                    outputs,
                    inputs,
                    TILE_AUTO,
                    stream(),
                )
            )
        }
    }

    /// `dx = dy W`.
    ///
    /// # Errors
    /// As [`forward`].
    pub fn input_gradient(dx: &mut Tensor, dy: &Tensor, w: &Tensor) -> Result<()> {
        dy.expect_dtype("linear", "the gradient of y", DType::Bf16)?;
        let (launchers, rows) = (w.device().launchers()?, dy.shape().rows() as i64);
        // SAFETY: the tensors have the shapes that grouped_gemm.cu's header names.
        unsafe { input_gradient_of(launchers, dx.pointer_mut(), dy.pointer(), w, rows) }
    }

    /// [`input_gradient`] of so many rows from these places on.
    ///
    /// # Safety
    /// dx and dy are bf16 arrays of `rows` rows, as wide as w's inputs and outputs.
    pub unsafe fn input_gradient_of(
        launchers: &Launchers,
        dx: *mut c_void,
        dy: *const c_void,
        w: &Tensor,
        rows: i64,
    ) -> Result<()> {
        let (outputs, inputs) = (w.shape()[0] as i32, w.shape()[1] as i32);
        // SAFETY: as the caller says.
        unsafe {
            launch!(
                launchers,
                grouped_gemm_input_gradient(
                    dx,
                    dy,
                    w.pointer(),
                    null(),
                    null(),
                    rows,
                    rows,
                    1,
                    outputs,
                    inputs,
                    TILE_AUTO,
                    stream(),
                )
            )
        }
    }

    /// `dW (+)= dyᵀ x`, rows in order.
    ///
    /// # Errors
    /// As [`forward`].
    pub fn weight_gradient(
        dw: &mut Tensor,
        accumulate: Accumulate,
        dy: &Tensor,
        x: &Tensor,
    ) -> Result<()> {
        let (launchers, rows) = (x.device().launchers()?, dy.shape().rows() as i64);
        let parts = parts(rows as usize, dw.shape()[0], dw.shape()[1]);
        if parts > 1 {
            return in_parts(dw, accumulate, dy, x, parts);
        }
        // SAFETY: the tensors have the shapes that grouped_gemm.cu's header names.
        unsafe {
            let (dy, x) = (dy.pointer(), x.pointer());
            weight_gradient_of(launchers, dw, accumulate, dy, x, rows, None)
        }
    }

    /// Parts that the rows of a weight gradient `[outputs, inputs]` are cut into, so that its tiles (of
    /// 128 x 256) fill the 132 multiprocessors of an H200. A part has 1024 rows or more. The same on every
    /// device, since it decides the order of a sum.
    fn parts(rows: usize, outputs: usize, inputs: usize) -> usize {
        let tiles = outputs.div_ceil(128) * inputs.div_ceil(256);
        (132 / tiles).min(rows / 1024).max(1)
    }

    /// [`weight_gradient`]: the rows as groups of a product of their own, whose results are summed.
    fn in_parts(
        dw: &mut Tensor,
        accumulate: Accumulate,
        dy: &Tensor,
        x: &Tensor,
        parts: usize,
    ) -> Result<()> {
        dw.expect_dtype("linear", "the weight's gradient", DType::F32)?;
        let (device, rows) = (x.device(), dy.shape().rows());
        let launchers = device.launchers()?;
        let [outputs, inputs] = [0, 1].map(|i| dw.shape()[i]);
        // Whole k-tiles of 64 rows, but for the last.
        let height = rows.div_ceil(parts).div_ceil(64) * 64;
        let offsets: Vec<i32> = (0..=parts).map(|p| (p * height).min(rows) as i32).collect();
        let offsets = Tensor::constant(device, [parts + 1], &offsets);
        let mut each = Tensor::unspecified(device, DType::F32, [parts, outputs, inputs]);
        // SAFETY: the tensors have the shapes that grouped_gemm.cu's header names.
        unsafe {
            let (dy, x) = (dy.pointer(), x.pointer());
            weight_gradient_of(
                launchers,
                &mut each,
                Accumulate::Assign,
                dy,
                x,
                rows as i64,
                Some(&offsets),
            )?;
            launch!(
                launchers,
                sum_parts(
                    dw.pointer_mut(),
                    each.pointer(),
                    parts as i32,
                    dw.elements() as i64,
                    (accumulate == Accumulate::Add).into(),
                    stream(),
                )
            )
        }
    }

    /// [`weight_gradient`] of so many rows from these places on; with offsets `[G + 1]`, dw is `[G, outputs, inputs]`, a
    /// matrix for each group of rows.
    ///
    /// # Safety
    /// dy and x are bf16 arrays of `rows` rows, as wide as dw's outputs and inputs; the offsets end at most there.
    pub unsafe fn weight_gradient_of(
        launchers: &Launchers,
        dw: &mut Tensor,
        accumulate: Accumulate,
        dy: *const c_void,
        x: *const c_void,
        rows: i64,
        offsets: Option<&Tensor>,
    ) -> Result<()> {
        dw.expect_dtype("linear", "the weight's gradient", DType::F32)?;
        let (groups, outputs, inputs) = match *dw.shape() {
            [groups, outputs, inputs] => (groups, outputs, inputs),
            _ => (1, dw.shape()[0], dw.shape()[1]),
        };
        // SAFETY: as the caller says.
        unsafe {
            launch!(
                launchers,
                grouped_gemm_weight_gradient(
                    dw.pointer_mut(),
                    dy,
                    x,
                    offsets.map_or(null(), Tensor::pointer),
                    null(),
                    null(),
                    rows,
                    rows,
                    rows,
                    groups as i32,
                    outputs as i32,
                    inputs as i32,
                    (accumulate == Accumulate::Add).into(),
                    TILE_AUTO,
                    stream(),
                )
            )
        }
    }
}

/// The mathematics on plain slices; `inputs` is I, the width of `x`.
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
