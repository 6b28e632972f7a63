//! Output head and cross-entropy in one operation: `loss = Σ_t (logsumexp(z_t) − z_t[target_t]) / n`, `z = x Wᵀ`.
//!
//! `x [T, D]`, `W [V, D]`, `targets [T]` (i32), and the denominator `n` (T for the mean). With
//! `dz = (softmax(z) − onehot(target)) / n`: `dx = dz W`, `dW = dzᵀ x`.
//!
//! Logits exist for one chunk of tokens at a time. If a gradient is needed, forward computes it while the logits
//! exist: this takes three products, whereas computing the logits again in backward would take four. Backward then
//! only multiplies by the incoming scalar.
//!
//! On a device with kernels (`kernels/cross_entropy.cu`, `kernels/grouped_gemm.cu`) x and W are bf16,
//! logits and losses f32, dx bf16 and dW f32.

pub(super) mod reference;

use super::linear::kernels as product;
use super::tokens;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::{DType, Real};
use crate::with_real;

/// Upper bound of the number of tokens whose logits exist at a time; for V = 128,256 the logits take 1 GB. With twice
/// as many, the product that computes them took 16% longer on an H200.
pub(crate) const LOGIT_TOKENS: usize = 2048;
/// Number of tokens for which the gradients of the logits exist at a time on a device with kernels. It is chosen so
/// that the product for dx `[T, D]` has a tile for nearly every multiprocessor, and is a multiple of a tile's 128 rows, so
/// that each chunk of an array with a number per token begins at an aligned address.
pub(crate) fn gradient_tokens(hidden: usize) -> usize {
    let most = ((1 << 22) / hidden.max(1)).clamp(LOGIT_TOKENS, 4 * LOGIT_TOKENS);
    most / 128 * 128
}
/// Upper bound of the number of logits that exist at a time on the CPU. One token always has all its V logits.
pub(crate) const LOGITS: usize = 1 << 24;

/// Returns the cross-entropy in nats of the logits `x Wᵀ` against `targets`, summed over the tokens and divided by
/// `denominator`: a scalar. `x` is `[T, D]`, `weight` is `[V, D]`, `targets` holds T i32 numbers.
///
/// # Errors
/// Returns an error when shapes or dtypes do not fit, or a target is not in the vocabulary (the error names target
/// and position).
pub fn cross_entropy(
    tape: &Tape,
    x: &Var,
    weight: &Var,
    targets: &Tensor,
    denominator: f64,
) -> Result<Var> {
    check(x.tensor(), weight.tensor(), targets)?;
    let op = CrossEntropy {
        targets: targets.clone(),
        denominator,
        gradients: tape.is_recording() && (x.needs_gradient() || weight.needs_gradient()),
    };
    tape.apply_one(op, &[x, weight])
}

/// Returns the cross-entropy in nats of each token, `[T]`, without a gradient: for evaluation.
///
/// # Errors
/// The errors of [`cross_entropy`].
pub fn token_losses(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    check(x, weight, targets)?;
    if x.device() != Device::Cpu {
        return kernels::losses(x, weight, targets, None);
    }
    let mut losses = Tensor::unspecified(x.device(), x.dtype(), [x.shape()[0]]);
    with_real!(x.dtype(), "cross_entropy", |T| {
        let head = reference::Head {
            x: x.slice::<T>(),
            weight: weight.slice(),
            targets: targets.slice(),
            width: x.shape()[1],
        };
        head.losses(losses.slice_mut(), None);
        Ok(losses)
    })
}

fn check(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<()> {
    let (x_shape, w_shape) = (x.shape(), weight.shape());
    if x_shape.len() != 2 || w_shape.len() != 2 || x_shape[1] != w_shape[1] {
        return Err(Error::invalid(
            "cross_entropy",
            "x [tokens, width] and a weight [vocabulary, width]",
            format!("{x_shape} and {w_shape}"),
            "pass the final hidden states and the output head",
        ));
    }
    if w_shape.elements() == 0 {
        return Err(Error::invalid(
            "cross_entropy",
            "a vocabulary and a width above 0",
            w_shape.to_string(),
            "pass the final hidden states and the output head",
        ));
    }
    weight.expect_dtype("cross_entropy", "weight", x.dtype())?;
    if targets.elements() != x_shape[0] {
        return Err(Error::invalid(
            "cross_entropy",
            format!("{} targets, one for each token", x_shape[0]),
            format!("shape {}", targets.shape()),
            "pass the token that follows each input token",
        ));
    }
    tokens::check("cross_entropy", "target", targets, w_shape[0])
}

struct CrossEntropy {
    targets: Tensor,
    denominator: f64,
    /// Whether backward will run.
    gradients: bool,
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, weight) = (inputs[0], inputs[1]);
        if x.device() != Device::Cpu {
            return kernels::forward(x, weight, self);
        }
        with_real!(x.dtype(), "cross_entropy", |T| {
            let head = reference::Head {
                x: x.slice::<T>(),
                weight: weight.slice(),
                targets: self.targets.slice(),
                width: x.shape()[1],
            };
            let mut losses = cpu::Scratch::<T>::new(x.shape()[0]);
            let mut saved = vec![];
            if self.gradients {
                let (mut dx, mut dweight) = (x.unspecified_like(), weight.unspecified_like());
                let gradient = reference::Gradient {
                    dx: dx.slice_mut(),
                    dweight: dweight.slice_mut(),
                    factor: T::of(self.denominator.recip()),
                };
                head.losses(&mut losses, Some(gradient));
                saved = vec![dx, dweight];
            } else {
                head.losses(&mut losses, None);
            }
            let sum: f64 = losses.iter().map(|&l| l.f64()).sum();
            let mut loss = Tensor::unspecified(Device::Cpu, x.dtype(), []);
            loss.slice_mut()[0] = T::of(sum / self.denominator);
            Ok(Forward::one(loss, saved))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let dloss = only(douts);
        if dloss.device() != Device::Cpu {
            return kernels::backward(saved, dloss, grads);
        }
        with_real!(dloss.dtype(), "cross_entropy", |T| {
            let factor = dloss.slice::<T>()[0];
            for (input, gradient) in saved.iter().enumerate() {
                grads.write(input, gradient, |dst, accumulate| {
                    let width = gradient.shape().width();
                    let gradient = gradient.slice();
                    reference::scaled(dst.slice_mut(), accumulate, gradient, factor, width);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }
}

/// The operation on a device with kernels, one chunk of tokens at a time.
mod kernels {
    use super::*;
    use crate::kernels::Stream;
    use crate::kernels::cross_entropy::{
        CrossEntropyMean, CrossEntropyRows, GradientScale, HeadLogits, statistics,
    };
    use crate::kernels::launchers::TILE_AUTO;

    /// The destinations of the gradients, and the factor of every loss.
    pub struct Gradient<'a> {
        pub dx: &'a mut Tensor,      // [T, D] bf16
        pub dweight: &'a mut Tensor, // [V, D] f32
        pub factor: f32,
    }

    pub fn forward(x: &Tensor, weight: &Tensor, op: &CrossEntropy) -> Result<Forward> {
        let factor = op.denominator.recip() as f32;
        let mut gradients = op.gradients.then(|| {
            let dweight = Tensor::unspecified(x.device(), DType::F32, weight.shape());
            [x.unspecified_like(), dweight]
        });
        let gradient = gradients.as_mut().map(|[dx, dweight]| Gradient {
            dx,
            dweight,
            factor,
        });
        let losses = losses(x, weight, &op.targets, gradient)?;
        let mut loss = Tensor::unspecified(x.device(), DType::F32, []);
        let mean = CrossEntropyMean {
            loss: loss.output()?,
            losses: losses.input()?,
            tokens: losses.elements(),
            factor,
        };
        mean.launch(&Stream::of(x.device())?)?;
        Ok(Forward::one(
            loss,
            gradients.into_iter().flatten().collect(),
        ))
    }

    /// Each token's loss, `[T]` f32.
    pub fn losses(
        x: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
        mut gradient: Option<Gradient<'_>>,
    ) -> Result<Tensor> {
        x.expect_dtype("cross_entropy", "x", DType::Bf16)?;
        let (device, stream) = (x.device(), Stream::of(x.device())?);
        let (tokens, [vocabulary, width]) = (x.shape()[0], [weight.shape()[0], weight.shape()[1]]);
        let targets = targets.on(device);
        let mut losses = Tensor::unspecified(device, DType::F32, [tokens]);
        let chunk = match gradient {
            Some(_) => gradient_tokens(width).min(tokens),
            None => LOGIT_TOKENS.min(tokens),
        };
        let at_once = LOGIT_TOKENS.min(tokens);
        let mut logits = Tensor::unspecified(device, DType::F32, [at_once, vocabulary]);
        let of_rows = [at_once, statistics(vocabulary), 2];
        let mut statistics = Tensor::unspecified(device, DType::F32, of_rows);
        let mut dlogits = gradient
            .is_some()
            .then(|| Tensor::unspecified(device, DType::Bf16, [chunk, vocabulary]));
        for first in (0..tokens).step_by(chunk) {
            let rows = chunk.min(tokens - first);
            for part in (0..rows).step_by(at_once) {
                let (first, tokens) = (first + part, at_once.min(rows - part));
                let logits_of_part = HeadLogits {
                    logits: logits.output()?,
                    statistics: statistics.output()?,
                    x: x.input()?.from_element(first * width),
                    w: weight.input()?,
                    tokens,
                    vocabulary,
                    hidden: width,
                    tile: TILE_AUTO,
                };
                logits_of_part.launch(&stream)?;
                let dlogits = dlogits.as_mut().map(Tensor::output).transpose()?;
                let loss_of_rows = CrossEntropyRows {
                    losses: losses.output()?.from_element(first),
                    dlogits: dlogits.map(|all| all.from_element(part * vocabulary)),
                    logits: logits.input()?,
                    statistics: Some(statistics.input()?),
                    targets: targets.input()?.from_element(first),
                    tokens,
                    vocabulary,
                    factor: gradient.as_ref().map_or(0.0, |g| g.factor),
                };
                loss_of_rows.launch(&stream)?;
            }
            if let (Some(g), Some(dlogits)) = (&mut gradient, &dlogits) {
                let accumulate = match first {
                    0 => Accumulate::Assign,
                    _ => Accumulate::Add,
                };
                let dx = g.dx.output()?.from_element(first * width);
                product::input_gradient_of(dx, dlogits.input()?, weight, rows)?;
                let (dlogits, x) = (dlogits.input()?, x.input()?.from_element(first * width));
                product::weight_gradient_of(g.dweight, accumulate, dlogits, x, rows, None)?;
            }
        }
        Ok(losses)
    }

    /// Multiplies the gradients that forward saved by the incoming gradient.
    pub fn backward(saved: &[Tensor], dloss: &Tensor, grads: &mut Grads) -> Result<()> {
        for (input, gradient) in saved.iter().enumerate() {
            grads.write(input, gradient, |out, accumulate| {
                out.expect_dtype("cross_entropy", "a gradient", gradient.dtype())?;
                let kernel = GradientScale {
                    out: out.output()?,
                    input: gradient.input()?,
                    factor: dloss.input()?,
                    elements: gradient.elements(),
                    bf16_elements: gradient.dtype() == DType::Bf16,
                    accumulate: accumulate == Accumulate::Add,
                };
                kernel.launch(&Stream::of(gradient.device())?)
            })?;
        }
        Ok(())
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |tokens: usize, width: usize, vocabulary: usize| {
        let name = format!("cross_entropy [{tokens}, {width}], vocabulary {vocabulary}");
        let targets: Vec<i32> = (0..tokens).map(|t| (t * t % vocabulary) as i32).collect();
        let targets = Tensor::from_slice([tokens], &targets);
        Case::new(name, move |tape, v| {
            let loss = cross_entropy(tape, &v[0], &v[1], &targets, tokens as f64 + 0.5)?;
            Ok(vec![loss])
        })
        .input("x", [tokens, width])
        .input("weight", [vocabulary, width])
    };
    vec![
        case(1, 3, 1),
        case(1, 3, 5),
        case(37, 6, 19),
        case(2050, 2, 3), // two chunks
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Gradients;

    #[test]
    fn loss_and_gradient_worked_by_hand() {
        // x = 1, W = (ln 3, 0): probabilities (3/4, 1/4). Targets 0 and 1: the losses are ln(4/3)
        // and ln 4. Over n = 2, dz is (−1/8, 1/8) and (3/8, −3/8);
        // dx = dz · W = (−ln 3 / 8, 3 ln 3 / 8), dW = (2/8, −2/8).
        let ln3 = 3f64.ln();
        let x = Var::leaf(Tensor::from_slice([2, 1], &[1.0, 1.0]), 0);
        let w = Var::leaf(Tensor::from_slice([2, 1], &[ln3, 0.0]), 1);
        let targets = Tensor::from_slice([2], &[0, 1]);
        let tape = Tape::new();
        let loss = cross_entropy(&tape, &x, &w, &targets, 2.0).unwrap();
        let (first, second) = ((4f64 / 3.0).ln(), 4f64.ln());
        let value = loss.tensor().item().unwrap();
        assert!((value - (first + second) / 2.0).abs() <= 1e-15);
        let mut store = Gradients::new(2);
        tape.backward(&loss, 8.0, &mut store).unwrap();
        for (leaf, expected) in [(0, [-ln3, 3.0 * ln3]), (1, [2.0, -2.0])] {
            let found = store.get(leaf).unwrap().slice::<f64>();
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() <= 1e-14, "{a} for {b}");
            }
        }
        let each = token_losses(x.tensor(), w.tensor(), &targets).unwrap();
        for (a, b) in each.slice::<f64>().iter().zip([first, second]) {
            assert!((a - b).abs() <= 1e-15);
        }
    }

    #[test]
    fn every_chunk_of_tokens_begins_at_an_aligned_address() {
        for hidden in (8..=8192).step_by(8) {
            let chunk = gradient_tokens(hidden);
            assert!(
                chunk >= LOGIT_TOKENS && chunk % 128 == 0,
                "{hidden}: {chunk}"
            );
        }
        assert_eq!([512, 1024, 2048].map(gradient_tokens), [8192, 4096, 2048]);
    }

    #[test]
    fn logits_far_apart_stay_finite() {
        let x = Tensor::from_slice([1, 1], &[1f32]);
        let w = Tensor::from_slice([2, 1], &[3e4f32, -3e4]);
        let targets = Tensor::from_slice([1], &[1]);
        let loss = token_losses(&x, &w, &targets).unwrap();
        assert_eq!(loss.slice::<f32>(), [6e4]);
    }

    #[test]
    fn a_nan_input_makes_the_loss_nan() {
        let x = Tensor::from_slice([1, 1], &[f32::NAN]);
        let w = Tensor::from_slice([2, 1], &[1f32, 2.0]);
        let loss = token_losses(&x, &w, &Tensor::from_slice([1], &[1])).unwrap();
        assert!(loss.slice::<f32>()[0].is_nan());
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_named_with_its_position() {
        let x = Tensor::from_slice([2, 1], &[1.0, 1.0]);
        let w = Tensor::from_slice([3, 1], &[0.0; 3]);
        let e = token_losses(&x, &w, &Tensor::from_slice([2], &[2, 3])).unwrap_err();
        assert!(e.to_string().contains("got 3 at position 1"), "{e}");
    }

    #[test]
    fn too_few_targets_are_an_error() {
        let x = Tensor::from_slice([2, 1], &[1.0, 1.0]);
        let w = Tensor::from_slice([3, 1], &[0.0; 3]);
        let e = token_losses(&x, &w, &Tensor::from_slice([1], &[2])).unwrap_err();
        assert!(e.to_string().contains("2 targets"), "{e}");
    }
}
