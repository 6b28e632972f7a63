//! The auxiliary load-balancing loss, the z-loss, and their sum with the cross-entropy.
//!
//! Switch loss of a layer: `E Σ_i f_i P_i`, `f [E]` the share of routed slots (a constant), `P_i` the mean of
//! `p [T, E]` over the tokens; 1 when balanced. `dp_ti = E f_i / T`, so that before the softmax
//! `dz_j = (E / T) p_j (f_j − Σ_i p_i f_i)` (Switch Transformer, 2101.03961, eq. 4). z-loss:
//! `mean_t logsumexp(z_t)²`, `dz_j = (2 / T) logsumexp(z) p_j` (ST-MoE, 2202.08906, eq. 5).
//!
//! On a device with kernels (`kernels/balance.cu`) the router computes the means `P [E]` and the mean logsumexp².
//! Fractions and coefficients are in device memory.

use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;

/// Returns `E Σ_i f_i mean_t(p_ti)`, a scalar without the coefficient. `p` is `[T, E]`, or its mean over tokens
/// `[E]`; `fractions [E]` are the f_i.
///
/// # Errors
/// Returns an error when `fractions` does not have one entry per expert.
pub fn auxiliary_loss(tape: &Tape, p: &Var, fractions: &Tensor) -> Result<Var> {
    let mut shape = p.tensor().shape().to_vec();
    shape.pop();
    shape.push(fractions.elements());
    p.tensor()
        .expect_shape("auxiliary_loss", "probabilities", &shape[..])?;
    tape.apply_one(
        AuxiliaryLoss {
            fractions: fractions.clone(),
        },
        &[p],
    )
}

/// Returns `mean_t logsumexp(z_t)²` of `z [T, E]`, a scalar without the coefficient.
///
/// # Errors
/// Returns an error when `z` is not real.
pub fn z_loss(tape: &Tape, z: &Var) -> Result<Var> {
    tape.apply_one(ZLoss, &[z])
}

/// Returns `Σ_k c_k s_k` for scalars s_k and coefficients c_k: the total loss.
///
/// # Errors
/// Returns an error when a term is not a real scalar.
pub fn weighted_sum(tape: &Tape, terms: &[(&Var, f64)]) -> Result<Var> {
    let (vars, coefficients): (Vec<&Var>, Vec<f64>) = terms.iter().copied().unzip();
    tape.apply_one(WeightedSum { coefficients }, &vars)
}

struct AuxiliaryLoss {
    /// `[E]`: f64 on the CPU, f32 if kernels counted them.
    fractions: Tensor,
}

impl Op for AuxiliaryLoss {
    fn name(&self) -> &'static str {
        "auxiliary_loss"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let p = inputs[0];
        if p.device() != Device::Cpu {
            let fractions = match self.fractions.device() {
                Device::Cpu => kernels::numbers(self.fractions.slice(), p.device()),
                _ => self.fractions.clone(),
            };
            return Ok(Forward::one(
                kernels::auxiliary_loss(p, &fractions)?,
                vec![fractions],
            ));
        }
        let fractions = self.fractions.slice::<f64>();
        with_real!(p.dtype(), "auxiliary_loss", |T| {
            let mut mean = vec![0.0; fractions.len()];
            for row in p.slice::<T>().chunks(mean.len()) {
                mean.iter_mut().zip(row).for_each(|(m, &p)| *m += p.f64());
            }
            let sum: f64 = mean.iter().zip(fractions).map(|(m, f)| m * f).sum();
            let loss = Tensor::scalar(T::of(
                fractions.len() as f64 * sum / p.shape().rows() as f64,
            ));
            Ok(Forward::one(loss, vec![p.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (p, dloss) = (&saved[0], only(douts));
        if dloss.device() != Device::Cpu {
            return grads.give(0, kernels::auxiliary_loss_backward(dloss, &saved[0])?);
        }
        let mut dp = p.unspecified_like();
        let tokens = p.shape().rows() as f64;
        let fractions = self.fractions.slice::<f64>();
        let scale = dloss.item()? * fractions.len() as f64 / tokens;
        with_real!(p.dtype(), "auxiliary_loss", |T| {
            let row: Vec<T> = fractions.iter().map(|f| T::of(scale * f)).collect();
            dp.slice_mut::<T>()
                .chunks_mut(row.len())
                .for_each(|dp| dp.copy_from_slice(&row));
            grads.give(0, dp)
        })
    }
}

struct ZLoss;

impl Op for ZLoss {
    fn name(&self) -> &'static str {
        "z_loss"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let z = inputs[0];
        with_real!(z.dtype(), "z_loss", |T| {
            let squares: f64 = z
                .slice::<T>()
                .chunks(z.shape().width())
                .map(|row| log_sum_exp(row).f64().powi(2))
                .sum();
            let loss = Tensor::scalar(T::of(squares / z.shape().rows() as f64));
            Ok(Forward::one(loss, vec![z.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (z, dloss) = (&saved[0], only(douts));
        let mut dz = z.unspecified_like();
        let scale = 2.0 * dloss.item()? / z.shape().rows() as f64;
        let width = z.shape().width();
        with_real!(z.dtype(), "z_loss", |T| {
            let rows = dz
                .slice_mut::<T>()
                .chunks_mut(width)
                .zip(z.slice::<T>().chunks(width));
            for (dz, z) in rows {
                let lse = log_sum_exp(z);
                for (dz, &z) in dz.iter_mut().zip(z) {
                    *dz = T::of(scale) * lse * (z - lse).exp();
                }
            }
            grads.give(0, dz)
        })
    }
}

/// `ln Σ e^{z_j}`, computed relative to the maximum so that it does not overflow.
fn log_sum_exp<T: Real>(z: &[T]) -> T {
    let max = z.iter().fold(T::neg_infinity(), |m, &x| m.max(x));
    max + z.iter().map(|&x| (x - max).exp()).sum::<T>().ln()
}

struct WeightedSum {
    coefficients: Vec<f64>,
}

impl Op for WeightedSum {
    fn name(&self) -> &'static str {
        "weighted_sum"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let device = inputs[0].device();
        if device != Device::Cpu {
            let values: Vec<f32> = self.coefficients.iter().map(|&c| c as f32).collect();
            let coefficients = Tensor::constant(device, [values.len()], &values);
            return Ok(Forward::one(
                kernels::weighted_sum(inputs, &coefficients)?,
                vec![coefficients],
            ));
        }
        let mut sum = 0.0;
        for (term, c) in inputs.iter().zip(&self.coefficients) {
            sum += c * term.item()?;
        }
        with_real!(inputs[0].dtype(), "weighted_sum", |T| {
            Ok(Forward::one(Tensor::scalar(T::of(sum)), vec![]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let dout = only(douts);
        if let [coefficients] = saved {
            let dterms = kernels::weighted_sum_backward(dout, coefficients)?;
            let mut dterms = dterms.into_iter().enumerate();
            return dterms.try_for_each(|(i, d)| grads.give(i, d));
        }
        for (i, c) in self.coefficients.iter().enumerate() {
            let scaled = c * dout.item()?;
            with_real!(dout.dtype(), "weighted_sum", |T| {
                grads.give(i, Tensor::scalar(T::of(scaled)))
            })?;
        }
        Ok(())
    }
}

/// The operations on a device with kernels.
mod kernels {
    use super::*;
    use crate::kernels::argument::{InList, OutList};
    use crate::kernels::{Stream, balance};

    /// The values in f32, in the memory of `device`.
    pub fn numbers(values: &[f64], device: Device) -> Tensor {
        let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        Tensor::from_slice([values.len()], &values).on(device)
    }

    fn scalar(device: Device) -> Tensor {
        Tensor::unspecified(device, DType::F32, [])
    }

    pub fn auxiliary_loss(mean: &Tensor, fractions: &Tensor) -> Result<Tensor> {
        let mut loss = scalar(mean.device());
        mean.expect_dtype("auxiliary_loss", "mean probabilities", DType::F32)?;
        mean.expect_shape("auxiliary_loss", "mean probabilities", fractions.shape())?;
        let kernel = balance::AuxiliaryLoss {
            loss: loss.output()?,
            mean: mean.input()?,
            fractions: fractions.input()?,
            experts: fractions.elements(),
        };
        kernel.launch(&Stream::of(mean.device())?)?;
        Ok(loss)
    }

    pub fn auxiliary_loss_backward(dloss: &Tensor, fractions: &Tensor) -> Result<Tensor> {
        dloss.expect_dtype("auxiliary_loss", "the loss's gradient", DType::F32)?;
        let mut dmean = fractions.unspecified_like();
        let kernel = balance::AuxiliaryLossBackward {
            dmean: dmean.output()?,
            dloss: dloss.input()?,
            fractions: fractions.input()?,
            experts: fractions.elements(),
        };
        kernel.launch(&Stream::of(dloss.device())?)?;
        Ok(dmean)
    }

    pub fn weighted_sum(terms: &[&Tensor], coefficients: &Tensor) -> Result<Tensor> {
        let mut out = scalar(coefficients.device());
        for term in terms {
            term.expect_dtype("weighted_sum", "a term", DType::F32)?;
            term.expect_shape("weighted_sum", "a term", [])?;
        }
        let inputs: InList<f32> = terms.iter().map(|t| t.input()).collect::<Result<_>>()?;
        let kernel = balance::WeightedSum {
            out: out.output()?,
            terms: &inputs,
            coefficients: coefficients.input()?,
            count: terms.len(),
        };
        kernel.launch(&Stream::of(coefficients.device())?)?;
        Ok(out)
    }

    pub fn weighted_sum_backward(dout: &Tensor, coefficients: &Tensor) -> Result<Vec<Tensor>> {
        dout.expect_dtype("weighted_sum", "the sum's gradient", DType::F32)?;
        let count = coefficients.elements();
        let mut dterms: Vec<Tensor> = (0..count).map(|_| scalar(dout.device())).collect();
        let outputs: OutList<f32> = dterms
            .iter_mut()
            .map(Tensor::output)
            .collect::<Result<_>>()?;
        let kernel = balance::WeightedSumBackward {
            dterms: &outputs,
            dout: dout.input()?,
            coefficients: coefficients.input()?,
            count,
        };
        kernel.launch(&Stream::of(dout.device())?)?;
        Ok(dterms)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let fractions = Tensor::from_slice([4], &[0.5, 0.125, 0.25, 0.125]);
    vec![
        Case::new("auxiliary_loss after the softmax [6, 4]", move |tape, v| {
            let p = super::router::softmax(tape, &v[0])?;
            Ok(vec![auxiliary_loss(tape, &p, &fractions)?])
        })
        .input("z", [6, 4]),
        Case::new("z_loss [5, 3]", |tape, v| Ok(vec![z_loss(tape, &v[0])?])).input("z", [5, 3]),
        Case::new("weighted_sum of 2 losses", |tape, v| {
            Ok(vec![weighted_sum(tape, &[(&v[0], 1.0), (&v[1], -0.25)])?])
        })
        .input("a", [1])
        .input("b", [1]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(v: Var) -> f64 {
        v.tensor().item().unwrap()
    }

    fn of<const E: usize>(fractions: [f64; E]) -> Tensor {
        Tensor::from_slice([E], &fractions)
    }

    #[test]
    fn the_auxiliary_loss_is_one_when_balanced_and_worked_by_hand() {
        let tape = Tape::new();
        let p = Var::constant(Tensor::from_slice([2, 4], &[0.25; 8]));
        assert_eq!(
            value(auxiliary_loss(&tape, &p, &of([0.25; 4])).unwrap()),
            1.0
        );
        // P = (0.75, 0.25), f = (1, 0): 2 · 0.75.
        let p = Var::constant(Tensor::from_slice([2, 2], &[0.5, 0.5, 1.0, 0.0]));
        assert_eq!(
            value(auxiliary_loss(&tape, &p, &of([1.0, 0.0])).unwrap()),
            1.5
        );
    }

    #[test]
    fn the_z_loss_worked_by_hand() {
        // logsumexp(0, 0) = ln 2, logsumexp(1000, -1000) = 1000: no overflow.
        let z = Var::constant(Tensor::from_slice([2, 2], &[0.0, 0.0, 1000.0, -1000.0]));
        let expected = (2f64.ln().powi(2) + 1e6) / 2.0;
        approx::assert_relative_eq!(value(z_loss(&Tape::new(), &z).unwrap()), expected);
    }
}
