//! Rows multiplied by a sigmoid gate of their token: `y_t = σ(⟨x_t, w⟩) v_t`; the gate of a shared expert.
//!
//! `x [T, D]`, `w [1, D]`, `v [T, D]`. With `g_t = σ(⟨x_t, w⟩)`: `dv_t = g_t dy_t`,
//! `ds_t = g_t (1 − g_t) ⟨dy_t, v_t⟩`, `dx_t = ds_t w`, `dw = Σ_t ds_t x_t`.
//!
//! On the CPU it is `linear`, then [`sigmoid_gate`](super::sigmoid_gate). On a device with kernels
//! (`kernels/rows.cu`) it is one operation, which keeps x, v and one number per row.

use super::linear::linear;
use super::rows::{self, Columns};
use super::sigmoid_gate::sigmoid_gate;
use crate::device::Device;
use crate::error::Result;
use crate::kernels::{self, GatedRowsBackward, Stream};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;

/// Returns the rows of `v [T, D]`, each multiplied by σ of the inner product of its row of `x [T, D]` with
/// `weight [1, D]`.
///
/// # Errors
/// Returns an error when shapes or dtypes do not fit.
pub fn gated_rows(tape: &Tape, x: &Var, weight: &Var, v: &Var) -> Result<Var> {
    if x.tensor().device() == Device::Cpu {
        let scores = linear(tape, x, weight, None)?;
        return sigmoid_gate(tape, &scores, v);
    }
    let (like, width) = (x.tensor(), x.tensor().shape().width());
    weight
        .tensor()
        .expect_shape("gated_rows", "weight", [1, width])?;
    v.tensor().expect_shape("gated_rows", "v", like.shape())?;
    for (what, var) in [("x", x), ("weight", weight), ("v", v)] {
        var.tensor().expect_dtype("gated_rows", what, DType::Bf16)?;
    }
    tape.apply_one(GatedRows, &[x, weight, v])
}

struct GatedRows;

impl Op for GatedRows {
    fn name(&self) -> &'static str {
        "gated_rows"
    }

    fn runs_on(&self, device: Device) -> bool {
        device != Device::Cpu
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, w, v) = (inputs[0], inputs[1], inputs[2]);
        let mut y = v.unspecified_like();
        let mut gates = Tensor::unspecified(x.device(), DType::F32, [x.shape().rows()]);
        kernels::GatedRows {
            y: y.output()?,
            gates: gates.output()?,
            x: x.input()?,
            w: w.input()?,
            v: v.input()?,
            rows: x.shape().rows(),
            width: x.shape().width(),
        }
        .launch(&Stream::of(x.device())?)?;
        Ok(Forward::one(
            y,
            vec![x.clone(), w.clone(), v.clone(), gates],
        ))
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let [x, w, v, gates] = saved else {
            unreachable!("four tensors are kept")
        };
        let dy = only(douts);
        let (mut dv, mut dscores) = (v.unspecified_like(), gates.unspecified_like());
        let mut backward = |dx: &mut Tensor, accumulate: Accumulate| {
            GatedRowsBackward {
                dx: dx.output()?,
                dv: dv.output()?,
                dscores: dscores.output()?,
                dy: dy.input()?,
                gates: gates.input()?,
                v: v.input()?,
                w: w.input()?,
                rows: x.shape().rows(),
                width: x.shape().width(),
                accumulate: accumulate == Accumulate::Add,
            }
            .launch(&Stream::of(x.device())?)
        };
        if grads.wanted(0) {
            grads.write(0, x, backward)?;
        } else {
            grads.none(0);
            backward(&mut x.unspecified_like(), Accumulate::Assign)?;
        }
        grads.give(2, dv)?;
        grads.write(1, w, |dw, accumulate| {
            rows::column_sums(dw, accumulate, x, None, Some(&dscores), Columns::all(x))
        })
    }
}

pub(super) fn cases() -> Vec<Case> {
    [(1, 1), (5, 3), (70, 37)]
        .map(|(tokens, width)| {
            Case::new(format!("gated_rows [{tokens}, {width}]"), |tape, v| {
                Ok(vec![gated_rows(tape, &v[0], &v[1], &v[2])?])
            })
            .input("x", [tokens, width])
            .input("weight", [1, width])
            .input("v", [tokens, width])
        })
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_worked_by_hand() {
        // ⟨x, w⟩ = 0 and ln 3, so that the gates are 1/2 and 3/4.
        let var =
            |shape: [usize; 2], values: &[f64]| Var::constant(Tensor::from_slice(shape, values));
        let x = var([2, 2], &[1.0, 1.0, 3f64.ln(), 0.0]);
        let y = gated_rows(
            &Tape::new(),
            &x,
            &var([1, 2], &[1.0, -1.0]),
            &var([2, 2], &[2.0, -4.0, 8.0, 0.0]),
        )
        .unwrap();
        for (y, expected) in y.tensor().slice::<f64>().iter().zip([1.0, -2.0, 6.0, 0.0]) {
            assert!((y - expected).abs() <= 1e-14);
        }
    }
}
