//! AdamW with decoupled weight decay, and the norm of the gradient.
//!
//! With gradient g, step t from 1: `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
//! `w ← w (1 − η λ) − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)` (Loshchilov and Hutter, 1711.05101).
//! λ applies to matrices alone, not to norms, biases and the embedding.
//!
//! Where the gradients are on a device with kernels, both run there (`kernels/adamw.cu`).

use crate::config::TrainConfig;
use crate::cpu::vectorized;
use crate::device::{Device, stream};
use crate::dtype::{DType, Real};
use crate::error::Result;
use crate::launch;
use crate::model::Parameter;
use crate::tape::Gradients;
use crate::tensor::Tensor;
use crate::with_real;
use rayon::prelude::*;

/// Numbers that one thread works on at a time.
const BLOCK: usize = 1 << 14;

/// The optimizer and its moments.
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    steps: u64,
    moments: Vec<Moments>,
}

/// First and second moment of one parameter's gradient.
pub struct Moments {
    pub first: Tensor,
    pub second: Tensor,
}

/// The scalars of one update, the same for every number.
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
    /// Factor of the gradient: clipping.
    gradient: f64,
}

impl Coefficients {
    /// In the order and the dtype of `kernels/adamw.cu`.
    fn tensor(self) -> Tensor {
        let Coefficients {
            beta1,
            beta2,
            rate,
            second_scale,
            eps,
            keep,
            gradient,
        } = self;
        let all = [beta1, beta2, rate, second_scale, eps, keep, gradient];
        Tensor::from_slice([7], &all.map(|x| x as f32))
    }
}

impl AdamW {
    /// An optimizer that has made no step, its moments zero.
    pub fn new(config: &TrainConfig, parameters: &[Parameter]) -> Self {
        let zeros =
            |p: &Parameter| Tensor::zeros(p.value.device(), p.value.dtype(), p.value.shape());
        AdamW {
            betas: config.betas,
            eps: config.eps,
            weight_decay: config.weight_decay,
            steps: 0,
            moments: parameters
                .iter()
                .map(|p| Moments {
                    first: zeros(p),
                    second: zeros(p),
                })
                .collect(),
        }
    }

    /// Updates made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The moments, in the order of the parameters.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// When the moments do not fit the parameters.
    pub fn restore(&mut self, steps: u64, moments: Vec<Moments>) -> Result<()> {
        for (own, new) in self.moments.iter().zip(&moments) {
            for (own, new) in [(&own.first, &new.first), (&own.second, &new.second)] {
                new.expect_shape("checkpoint", "optimizer moment", own.shape())?;
                new.expect_dtype("checkpoint", "optimizer moment", own.dtype())?;
            }
        }
        assert_eq!(self.moments.len(), moments.len(), "two moments a parameter");
        (self.steps, self.moments) = (steps, moments);
        Ok(())
    }

    /// One update at learning rate `rate`, the gradient multiplied by `scale` first. A parameter
    /// without a gradient counts as one whose gradient is 0.
    ///
    /// # Errors
    /// When a dtype is not real.
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
        // Copied to a device once, not for every parameter.
        let for_kernels = coefficients.map(Coefficients::tensor);
        for (i, (p, moments)) in parameters.iter_mut().zip(&mut self.moments).enumerate() {
            let zeros;
            let gradient = match gradients.get(i) {
                Some(g) => g,
                None => {
                    zeros = Tensor::zeros(p.value.device(), p.value.dtype(), p.value.shape());
                    &zeros
                }
            };
            let decays = usize::from(p.decays);
            let (m, v) = (&mut moments.first, &mut moments.second);
            if gradient.device() != Device::Cpu {
                kernels::update(&mut p.value, m, v, gradient, &for_kernels[decays])?;
                continue;
            }
            with_real!(p.value.dtype(), "adamw", |T| {
                reference::update::<T>(
                    p.value.slice_mut(),
                    m.slice_mut(),
                    v.slice_mut(),
                    gradient.slice(),
                    coefficients[decays],
                );
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// √(Σ g²) over every gradient, summed in f64 in a fixed order.
///
/// # Errors
/// When a dtype is not real.
pub fn gradient_norm(gradients: &Gradients, parameters: usize) -> Result<f64> {
    let mut squares = 0.0;
    let (on_cpu, on_device): (Vec<&Tensor>, Vec<&Tensor>) = (0..parameters)
        .filter_map(|i| gradients.get(i))
        .partition(|g| g.device() == Device::Cpu);
    if !on_device.is_empty() {
        squares += kernels::sum_of_squares(&on_device)?;
    }
    for g in on_cpu {
        squares += with_real!(g.dtype(), "gradient_norm", |T| {
            Ok(reference::sum_of_squares(g.slice::<T>()))
        })?;
    }
    Ok(squares.sqrt())
}

/// `kernels/adamw.cu`. Everything is f32.
mod kernels {
    use super::*;

    pub fn update(
        w: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        gradient: &Tensor,
        coefficients: &Tensor,
    ) -> Result<()> {
        gradient.expect_dtype("adamw", "gradient", DType::F32)?;
        gradient.expect_shape("adamw", "gradient", w.shape())?;
        let launchers = gradient.device().launchers()?;
        // SAFETY: the tensors have the same number of elements.
        unsafe {
            launch!(
                launchers,
                adamw_update(
                    w.pointer_mut(),
                    m.pointer_mut(),
                    v.pointer_mut(),
                    gradient.pointer(),
                    coefficients.pointer(),
                    gradient.elements() as i64,
                    stream(),
                )
            )
        }
    }

    /// Σ g² over all of them.
    pub fn sum_of_squares(gradients: &[&Tensor]) -> Result<f64> {
        let device = gradients[0].device();
        let launchers = device.launchers()?;
        let mut counts = Vec::new();
        for g in gradients {
            g.expect_dtype("gradient_norm", "gradient", DType::F32)?;
            let mut parts = 0u64;
            // SAFETY: it writes one number.
            unsafe { launch!(launchers, square_parts(&mut parts, g.elements() as i64)) }?;
            counts.push(parts as usize);
        }
        let mut parts = Tensor::unspecified(device, DType::F64, [counts.iter().sum()]);
        let mut at = parts.pointer_mut::<f64>();
        for (g, count) in gradients.iter().zip(counts) {
            // SAFETY: `at` leaves room for the parts of this gradient and those after it.
            unsafe {
                launch!(
                    launchers,
                    square_sums(at, g.pointer(), g.elements() as i64, stream())
                )?;
                at = at.add(count);
            }
        }
        Ok(parts.slice::<f64>().iter().sum())
    }
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

    /// Sixteen interleaved partial sums a block in `T`, blocks in f64.
    pub fn sum_of_squares<T: Real>(g: &[T]) -> f64 {
        const LANES: usize = 16;
        let partials: Vec<f64> = g
            .par_chunks(BLOCK)
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
            .collect();
        partials.into_iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use crate::tape::{Tape, Var};

    fn parameter(value: f64, decays: bool) -> Parameter {
        Parameter {
            name: "w".into(),
            value: Tensor::from_slice([1], &[value]),
            parts: vec![],
            decays,
            exact: false,
        }
    }

    /// A store whose leaf 0 has gradient `g`: that of `g · x` for a product with a constant.
    fn gradient(g: f64) -> Gradients {
        let mut store = Gradients::new(1);
        let tape = Tape::new();
        let x = Var::leaf(Tensor::from_slice([1], &[0.0]), 0);
        let y = crate::ops::add::add(&tape, &x, &Var::constant(Tensor::from_slice([1], &[0.0])))
            .unwrap();
        tape.backward_from(&[(&y, Tensor::from_slice([1], &[g]))], &mut store)
            .unwrap();
        store
    }

    #[test]
    fn two_updates_worked_by_hand() {
        let mut config = Config::load(&Layers::preset("tiny"), &|_| Ok(()))
            .unwrap()
            .train;
        (config.betas, config.eps, config.weight_decay) = ([0.5, 0.75], 0.0, 0.1);
        let mut parameters = [parameter(1.0, true)];
        let mut adam = AdamW::new(&config, &parameters);
        // t = 1: m = 1, v = 1; m / (1 − 1/2) = 2, v / (1 − 3/4) = 4: w = 1 · 0.99 − 0.1 · 2 / 2.
        adam.update(&mut parameters, &gradient(2.0), 0.1, 1.0)
            .unwrap();
        approx::assert_relative_eq!(parameters[0].value.slice::<f64>()[0], 0.89, epsilon = 1e-15);
        // t = 2, g = −4 · 0.5: m = 0.5 − 1 = −0.5, v = 0.75 + 1 = 1.75.
        // m / (3/4) = −2/3, v / (7/16) = 4: w = 0.89 · 0.99 + 0.1 · (2/3) / 2.
        adam.update(&mut parameters, &gradient(-4.0), 0.1, 0.5)
            .unwrap();
        let expected = 0.89 * 0.99 + 0.1 / 3.0;
        approx::assert_relative_eq!(
            parameters[0].value.slice::<f64>()[0],
            expected,
            epsilon = 1e-15
        );
    }

    #[test]
    fn only_parameters_that_decay_decay() {
        let config = Config::load(&Layers::preset("tiny"), &|_| Ok(()))
            .unwrap()
            .train;
        let mut parameters = [parameter(1.0, false)];
        let mut adam = AdamW::new(&config, &parameters);
        adam.update(&mut parameters, &gradient(0.0), 0.1, 1.0)
            .unwrap();
        assert_eq!(parameters[0].value.slice::<f64>(), [1.0]);
    }

    #[test]
    fn the_gradient_norm_is_the_root_of_the_sum_of_squares() {
        assert_eq!(gradient_norm(&gradient(-3.0), 1).unwrap(), 3.0);
        let long: Vec<f64> = (0..100_003).map(|i| (i % 10) as f64).collect();
        let exact: f64 = long.iter().map(|x| x * x).sum();
        approx::assert_relative_eq!(reference::sum_of_squares(&long), exact, epsilon = 1e-12);
    }
}
