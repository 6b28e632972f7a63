//! AdamW with decoupled weight decay, and the norm of the gradient.
//!
//! With gradient g, step t from 1: `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
//! `w ← w (1 − η λ) − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)` (Loshchilov and Hutter, 1711.05101). λ applies only
//! to matrices, not to norms, biases and the embedding. Moments have the weights' precision, or are bf16 rounded
//! stochastically (`rounding`).
//!
//! On a device with kernels, [`DeviceStep`] does both in device memory.

mod device;
mod device_shards;
mod rounding;
mod shards;

pub use device::{DeviceStep, Outcome, Settings};
pub use device_shards::reduce;
pub use shards::{BUCKET, Shards};

use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::model::{Parameter, Places};
use crate::tape::Gradients;
use crate::tensor::Tensor;
use crate::tensor::cpu::vectorized;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use rayon::prelude::*;
use std::borrow::Cow;

/// Number of elements that one thread processes at a time.
const BLOCK: usize = 1 << 14;

/// The optimizer and its moments.
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    steps: u64,
    moments: Vec<Moments>,
    bf16_moments: bool,
    shards: Shards,
}

/// First and second moment of one parameter's gradient; with several shards, only for this rank's share.
pub struct Moments {
    /// m, the moving average of the gradient.
    pub first: Tensor,
    /// v, the moving average of its square.
    pub second: Tensor,
}

/// The scalars of one update, the same for all elements.
#[derive(Clone, Copy)]
struct Coefficients {
    beta1: f64,
    beta2: f64,
    /// η / (1 − β₁ᵗ).
    rate: f64,
    /// 1 / (1 − β₂ᵗ).
    second_scale: f64,
    eps: f64,
    /// 1 − η λ, or 1.
    keep: f64,
    /// Factor of the gradient, for clipping.
    gradient: f64,
}

impl AdamW {
    /// Creates an optimizer that has made no step; its moments are zero.
    pub fn new(config: &TrainConfig, parameters: &[Parameter]) -> Self {
        Self::sharded(config, parameters, Shards::new(parameters, 0, 1))
    }

    /// Creates an optimizer for one rank's share of the parameters.
    pub fn sharded(config: &TrainConfig, parameters: &[Parameter], shards: Shards) -> Self {
        let zeros = |i: usize, p: &Parameter| {
            let dtype = match config.bf16_moments {
                true => DType::Bf16,
                false => p.value.dtype(),
            };
            match shards.is_whole() {
                true => Tensor::zeros(p.value.device(), dtype, p.value.shape()),
                false => Tensor::zeros(p.value.device(), dtype, [shards.own(i).len()]),
            }
        };
        let moments = parameters.iter().enumerate().map(|(i, p)| Moments {
            first: zeros(i, p),
            second: zeros(i, p),
        });
        AdamW {
            betas: config.betas,
            eps: config.eps,
            weight_decay: config.weight_decay,
            steps: 0,
            bf16_moments: config.bf16_moments,
            moments: moments.collect(),
            shards,
        }
    }

    /// Returns the shares that define which elements of each parameter this optimizer updates.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// Returns the number of updates made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Returns the moments, in the order of the parameters.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// Returns an error when the moments do not fit the parameters.
    pub fn restore(&mut self, steps: u64, moments: Vec<Moments>) -> Result<()> {
        assert_eq!(self.moments.len(), moments.len(), "two moments a parameter");
        for (own, new) in self.moments.iter_mut().zip(moments) {
            for (own, new) in [(&mut own.first, new.first), (&mut own.second, new.second)] {
                new.expect_shape("checkpoint", "optimizer moment", own.shape())?;
                new.expect_dtype("checkpoint", "optimizer moment", own.dtype())?;
                *own = new.on(own.device());
            }
        }
        self.steps = steps;
        Ok(())
    }

    /// Returns the settings of a step on a device with kernels.
    pub fn settings(&self, rate: f64, clip: f64) -> Settings {
        Settings {
            rate,
            clip,
            beta1: self.betas[0],
            beta2: self.betas[1],
            eps: self.eps,
            weight_decay: self.weight_decay,
        }
    }

    /// Makes one update on the CPU at learning rate `rate`. The gradient is first multiplied by `scale`. A parameter
    /// without a gradient is treated as if its gradient were 0. With several shards, only this rank's share changes.
    ///
    /// # Errors
    /// Returns an error when a dtype is not real.
    pub fn update(
        &mut self,
        parameters: &mut [Parameter],
        gradients: &Gradients,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        self.steps += 1;
        let t = self.steps as f64;
        let [beta1, beta2] = self.betas;
        let coefficients = |decays: bool| Coefficients {
            beta1,
            beta2,
            rate: rate / (1.0 - beta1.powf(t)),
            second_scale: 1.0 / (1.0 - beta2.powf(t)),
            eps: self.eps,
            keep: if decays {
                1.0 - rate * self.weight_decay
            } else {
                1.0
            },
            gradient: scale,
        };
        let coefficients = [false, true].map(coefficients);
        for (i, (p, moments)) in parameters.iter_mut().zip(&mut self.moments).enumerate() {
            let coefficients = coefficients[usize::from(p.decays)];
            let w = on_cpu(p)?;
            let zeros = || Cow::Owned(Tensor::zeros(w.device(), w.dtype(), w.shape()));
            let gradient = gradients.get(i).map_or_else(zeros, Cow::Borrowed);
            let own = self.shards.own(i);
            if own.is_empty() {
                continue;
            }
            let mut update = |m: &mut Tensor, v: &mut Tensor| {
                with_real!(w.dtype(), "adamw", |T| {
                    let (w, g) = (
                        &mut w.slice_mut()[own.clone()],
                        &gradient.slice()[own.clone()],
                    );
                    reference::update::<T>(w, m.slice_mut(), v.slice_mut(), g, coefficients);
                    Ok(())
                })
            };
            if self.bf16_moments {
                let [mut m, mut v] = [&moments.first, &moments.second].map(Tensor::widened);
                update(&mut m, &mut v)?;
                rounding::store(moments, [&m, &v], self.steps, i, own.start);
            } else {
                update(&mut moments.first, &mut moments.second)?;
            }
        }
        Ok(())
    }
}

/// Returns the tensor of a parameter on the CPU.
fn on_cpu(parameter: &mut Parameter) -> Result<&mut Tensor> {
    match parameter.value.places() {
        Places::Whole(value) => Ok(value),
        Places::Split(_) => Err(Error::invalid(
            "adamw",
            "parameters of the CPU",
            format!("`{}` in two halves", parameter.name),
            "this is a bug: the CPU optimizer cannot update parameters of a device with kernels",
        )),
    }
}

/// Returns √(Σ g²) over all gradients on the CPU, summed in f64 in a fixed order.
///
/// # Errors
/// Returns an error when a dtype is not real.
pub fn gradient_norm(gradients: &Gradients, parameters: usize) -> Result<f64> {
    let mut squares = 0.0;
    for g in (0..parameters).filter_map(|i| gradients.get(i)) {
        squares += with_real!(g.dtype(), "gradient_norm", |T| {
            Ok(reference::sum_of_squares(g.slice::<T>()))
        })?;
    }
    Ok(squares.sqrt())
}

mod reference {
    use super::*;

    pub fn update<T: Real>(w: &mut [T], m: &mut [T], v: &mut [T], g: &[T], c: Coefficients) {
        let one = T::one();
        let (beta1, beta2) = (T::of(c.beta1), T::of(c.beta2));
        let (rate, second_scale, eps) = (T::of(c.rate), T::of(c.second_scale), T::of(c.eps));
        let (keep, scale) = (T::of(c.keep), T::of(c.gradient));
        let chunks = w.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK));
        let chunks = chunks.zip(v.par_chunks_mut(BLOCK)).zip(g.par_chunks(BLOCK));
        chunks.for_each(|(((w, m), v), g)| {
            vectorized(
                #[inline(always)]
                || {
                    for (((w, m), v), &g) in w.iter_mut().zip(m).zip(v).zip(g) {
                        let g = g * scale;
                        *m = beta1 * *m + (one - beta1) * g;
                        *v = beta2 * *v + (one - beta2) * (g * g);
                        *w = keep * *w - rate * *m / ((*v * second_scale).sqrt() + eps);
                    }
                },
            );
        });
    }

    /// Returns the sum of squares: the sums of the blocks, added in order.
    pub fn sum_of_squares<T: Real>(g: &[T]) -> f64 {
        partial_squares(g).into_iter().sum()
    }

    /// Returns the sum of squares of each block in f64, computed from sixteen interleaved partial sums in `T`.
    pub fn partial_squares<T: Real>(g: &[T]) -> Vec<f64> {
        const LANES: usize = 16;
        g.par_chunks(BLOCK)
            .map(|g| {
                vectorized(
                    #[inline(always)]
                    || {
                        let mut lanes = [T::zero(); LANES];
                        let whole = g.chunks_exact(LANES);
                        let rest: T = whole.remainder().iter().map(|&x| x * x).sum();
                        for chunk in whole {
                            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                                *lane += x * x;
                            }
                        }
                        lanes.into_iter().map(Real::f64).sum::<f64>() + rest.f64()
                    },
                )
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::device::Device;
    use crate::model::Weight;
    use crate::tape::{Tape, Var};

    fn parameter(value: f64, decays: bool) -> Parameter {
        Parameter {
            name: "w".into(),
            value: Weight::new(Tensor::from_slice([1], &[value]), Device::Cpu, false),
            parts: vec![],
            decays,
        }
    }

    /// A store whose leaf 0 has gradient `g`: that of `g · x` for a product with a constant.
    fn gradient(g: f64) -> Gradients {
        let mut store = Gradients::new(1);
        let tape = Tape::new();
        let of = |value: f64| Tensor::from_slice([1], &[value]);
        let (x, zero) = (Var::leaf(of(0.0), 0), Var::constant(of(0.0)));
        let y = crate::ops::add::add(&tape, &x, &zero).unwrap();
        tape.backward_from(&[(&y, of(g))], &mut store).unwrap();
        store
    }

    #[test]
    fn two_updates_worked_by_hand() {
        let mut config = Config::tiny(&[]).train;
        (config.betas, config.eps, config.weight_decay) = ([0.5, 0.75], 0.0, 0.1);
        let mut parameters = [parameter(1.0, true)];
        let mut adam = AdamW::new(&config, &parameters);
        let mut update = |g: f64, scale: f64, expected: f64| {
            adam.update(&mut parameters, &gradient(g), 0.1, scale)
                .unwrap();
            let found = parameters[0].value.whole().slice::<f64>()[0];
            approx::assert_relative_eq!(found, expected, epsilon = 1e-15);
        };
        // t = 1: m = 1, v = 1; m / (1 − 1/2) = 2, v / (1 − 3/4) = 4: w = 1 · 0.99 − 0.1 · 2 / 2.
        update(2.0, 1.0, 0.89);
        // t = 2, g = −4 · 0.5: m = 0.5 − 1 = −0.5, v = 0.75 + 1 = 1.75.
        // m / (3/4) = −2/3, v / (7/16) = 4: w = 0.89 · 0.99 + 0.1 · (2/3) / 2.
        update(-4.0, 0.5, 0.89 * 0.99 + 0.1 / 3.0);
    }

    #[test]
    fn only_parameters_that_decay_decay() {
        let config = Config::tiny(&[]).train;
        let mut parameters = [parameter(1.0, false)];
        let mut adam = AdamW::new(&config, &parameters);
        adam.update(&mut parameters, &gradient(0.0), 0.1, 1.0)
            .unwrap();
        assert_eq!(parameters[0].value.whole().slice::<f64>(), [1.0]);
    }

    #[test]
    fn the_gradient_norm_is_the_root_of_the_sum_of_squares() {
        assert_eq!(gradient_norm(&gradient(-3.0), 1).unwrap(), 3.0);
        let long: Vec<f64> = (0..100_003).map(|i| (i % 10) as f64).collect();
        let exact: f64 = long.iter().map(|x| x * x).sum();
        approx::assert_relative_eq!(reference::sum_of_squares(&long), exact, epsilon = 1e-12);
    }
}
