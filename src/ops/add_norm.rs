//! The residual add and the norm after it: `s = x + y`, `n = norm(s)`, Both are outputs: s continues the residual
//! stream, and n is the input of the next layer.
//!
//! On the CPU it is `add`, then `rmsnorm` or `layernorm`. On a device with kernels, one kernel computes both, and one
//! kernel computes the backward pass: with the gradients `ds` of s and `dn` of n, `dx = dy = ds + normᵀ(dn)`. The
//! kernel rounds s before it normalises it, so the result has the same bytes as the two operations run one after the
//! other.

use super::add::add;
use super::layernorm::layernorm;
use super::norm::{self, Kind, Norm, Skip};
use super::rmsnorm::rmsnorm;
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var};
use crate::tensor::Tensor;

/// Returns `x + y` and its norm: LayerNorm if there is a bias, else RMSNorm. `x` and `y` are `[.., D]`, `weight` and
/// `bias` are `[D]`; both results are `[.., D]`.
///
/// # Errors
/// Returns an error when shapes or dtypes do not fit.
pub fn add_norm(
    tape: &Tape,
    x: &Var,
    y: &Var,
    weight: &Var,
    bias: Option<&Var>,
    eps: f64,
) -> Result<(Var, Var)> {
    if x.tensor().device() == Device::Cpu {
        let sum = add(tape, x, y)?;
        let normed = match bias {
            Some(bias) => layernorm(tape, &sum, weight, bias, eps)?,
            None => rmsnorm(tape, &sum, weight, eps)?,
        };
        return Ok((sum, normed));
    }
    let (like, width) = (x.tensor(), x.tensor().shape().width());
    y.tensor()
        .expect_shape("add_norm", "second term", like.shape())?;
    y.tensor()
        .expect_dtype("add_norm", "second term", like.dtype())?;
    for (what, v) in [("weight", Some(weight)), ("bias", bias)] {
        let Some(v) = v else { continue };
        v.tensor().expect_shape("add_norm", what, [width])?;
        v.tensor().expect_dtype("add_norm", what, like.dtype())?;
    }
    let inputs: Vec<&Var> = [x, y, weight].into_iter().chain(bias).collect();
    let kind = match bias {
        Some(_) => Kind::Layer,
        None => Kind::Rms,
    };
    let mut outputs = tape.apply(AddNorm { kind, eps }, &inputs)?.into_iter();
    match (outputs.next(), outputs.next()) {
        (Some(sum), Some(normed)) => Ok((sum, normed)),
        _ => unreachable!("two outputs"),
    }
}

struct AddNorm {
    kind: Kind,
    eps: f64,
}

impl Op for AddNorm {
    fn name(&self) -> &'static str {
        "add_norm"
    }

    fn runs_on(&self, device: Device) -> bool {
        device != Device::Cpu
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, y, w) = (inputs[0], inputs[1], inputs[2]);
        let (mut sum, mut normed) = (x.unspecified_like(), x.unspecified_like());
        let bias = inputs.get(3).copied();
        norm::forward(&mut normed, Some((&mut sum, y)), x, w, bias, self.eps)?;
        Ok(Forward {
            saved: vec![sum.clone(), w.clone()],
            outputs: vec![sum, normed],
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let [x, w] = saved else {
            unreachable!("sum and weight are kept")
        };
        let (kind, eps) = (self.kind, self.eps);
        let gradient = match (&douts[0], &douts[1]) {
            (Some(ds), None) => {
                grads.none(2);
                if kind == Kind::Layer {
                    grads.none(3);
                }
                ds.clone()
            }
            (ds, Some(dn)) => {
                let mut gradient = x.unspecified_like();
                let skip = ds.as_ref().map_or(Skip::None, Skip::Tensor);
                let norm = Norm { kind, x, w, eps };
                let partials = norm.backward(&mut gradient, skip, dn)?;
                partials.answer(2, w, grads)?;
                gradient
            }
            (None, None) => unreachable!("an output has a gradient"),
        };
        grads.give(0, gradient.clone())?;
        grads.give(1, gradient)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |rows: usize, width: usize, with_bias: bool| {
        let name = format!("add_norm [{rows}, {width}], bias {with_bias}");
        let case = Case::new(name, move |tape, v| {
            let (sum, normed) = add_norm(tape, &v[0], &v[1], &v[2], v.get(3), 1e-5)?;
            Ok(vec![sum, normed])
        });
        let case = case
            .input("x", [rows, width])
            .input("y", [rows, width])
            .input("weight", [width]);
        if with_bias {
            case.input("bias", [width])
        } else {
            case
        }
    };
    vec![case(1, 5, false), case(67, 37, false), case(9, 8, true)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_worked_by_hand() {
        // s = (3, 4); mean(s²) = 12.5, plus eps 0.5: r = 1 / √13.
        let var = |v: &[f64]| Var::constant(Tensor::from_slice([1, 2], v));
        let w = Var::constant(Tensor::from_slice([2], &[2.0, -1.0]));
        let (x, y) = (var(&[1.0, 5.0]), var(&[2.0, -1.0]));
        let (sum, normed) = add_norm(&Tape::new(), &x, &y, &w, None, 0.5).unwrap();
        assert_eq!(sum.tensor().slice::<f64>(), [3.0, 4.0]);
        let r = 13f64.sqrt().recip();
        for (n, expected) in normed
            .tensor()
            .slice::<f64>()
            .iter()
            .zip([6.0 * r, -4.0 * r])
        {
            assert!((n - expected).abs() <= 1e-15);
        }
    }
}
