//! Scores of the experts for every token, the choice of experts, and the inputs of the balance losses: the first part
//! of a MoE layer in one operation.
//!
//! `z = x Wᵀ`, `p = score(z) [T, E]`; A = the K largest of `p + bias` (of equal values, the lower expert); the batch
//! means `P_i = mean_t p_ti` and `mean_t logsumexp(z_t)²`. On the CPU it is a composition of the operations of
//! [`router`] and [`balance`]. On a device with kernels it is one operation, whose backward gets dp, dP and the
//! z-loss's gradient together: with `d = dp + dP / T`, softmax
//! `dz_j = p_j (d_j − Σ_i p_i d_i) + dl (2 / T) logsumexp(z) p_j`; then `dx = dz W`, `dW = dzᵀ x`. It keeps x and p,
//! 2·T·D + 4·T·E bytes, and for the z-loss logsumexp.

use super::balance;
use super::dispatch::Selection;
use super::router::{self, NonFinite, TopK};
use super::scores::{first_non_finite, positive, shares, sigmoid};
use crate::device::Device;
use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::bindings::{
    ROUTEGRAD_SCORE_LOGITS, ROUTEGRAD_SCORE_RELU, ROUTEGRAD_SCORE_SIGMOID, ROUTEGRAD_SCORE_SOFTMAX,
    routegrad_score,
};
use crate::kernels::router::{RouterForward, RouterStatistics, partials};
use crate::kernels::router_backward::{RouterBackward, RouterWeightGradient, workspace};
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;
use crate::with_real;
use serde::{Deserialize, Serialize};
use std::cell::OnceCell;
use std::rc::Rc;

/// The function that computes the scores of a row from its logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// The logits themselves.
    Logits,
    /// `softmax(z)` over all experts.
    Softmax,
    /// `1 / (1 + e^−z)`.
    Sigmoid,
    /// `max(z, 0)`.
    Relu,
}

/// How experts are chosen for a token: the `top_k` of largest score; of equal scores, the lower expert.
pub struct Choice {
    /// K.
    pub top_k: usize,
    /// `[E]`, added to the scores only for the choice.
    pub bias: Option<Tensor>,
}

impl Choice {
    /// Chooses the `k` experts of largest score.
    pub fn top_k(k: usize) -> Self {
        Choice {
            top_k: k,
            bias: None,
        }
    }

    /// No choice here: the router chooses in another way.
    pub fn none() -> Self {
        Self::top_k(0)
    }
}

/// The scores of one batch.
pub struct Scores {
    /// `[T, E]`.
    pub values: Var,
    score: Score,
    origin: Origin,
}

/// The source of the choice and of the balance losses.
enum Origin {
    /// The CPU, which computes them from the scores and the logits `[T, E]` when they are requested.
    Logits { z: Var, choice: Choice },
    /// A kernel, which computed them together with the scores.
    Kernel(Box<Found>),
}

/// The results of the router's kernels.
struct Found {
    /// Empty if there is no choice; its flag for non-finite logits is still valid.
    chosen: TopK,
    /// `[E]`.
    mean: Var,
    /// `mean_t logsumexp(z_t)²`.
    lse_square: Var,
    /// `logsumexp(z_t) [T]`, and the place where the operation keeps it once the z-loss was requested.
    lse: Tensor,
    kept_lse: Rc<OnceCell<Tensor>>,
    /// `[2 E + 2]`; the last element is the mean entropy of the softmax of a row, in nats.
    statistics: Tensor,
}

/// Entropy of the scores divided by their sum, summed over the tokens, in nats.
pub enum Entropy {
    /// The sum, computed on the CPU.
    Sum(f64),
    /// The result of the kernel `router_statistics`.
    OfKernel(Tensor),
    /// The entropy of these scores `[T, E]`, in device memory, not yet computed.
    OfShares(Tensor),
}

/// Returns the scores of `x [T, D]` with the router weight `[E, D]`. On devices with kernels they are f32.
///
/// # Errors
/// Returns an error when widths or dtypes differ, or `choice` requests more experts than exist.
pub fn scores(tape: &Tape, x: &Var, weight: &Var, score: Score, choice: Choice) -> Result<Scores> {
    if x.tensor().device() == Device::Cpu {
        let z = router::logits(tape, x, weight)?;
        return Scores::of_logits(tape, z, score, choice);
    }
    let run = Router::run(x.tensor(), weight.tensor(), score, &choice)?;
    let kept_lse = Rc::new(OnceCell::new());
    let op = Router {
        score,
        lse: kept_lse.clone(),
    };
    let outputs = tape.record_run(op, &[x, weight], run.forward);
    let Ok([values, mean, lse_square]) = <[Var; 3]>::try_from(outputs) else {
        unreachable!("the router has three outputs")
    };
    Ok(Scores {
        values,
        score,
        origin: Origin::Kernel(Box::new(Found {
            chosen: run.chosen,
            mean,
            lse_square,
            lse: run.lse,
            kept_lse,
            statistics: run.statistics,
        })),
    })
}

impl Scores {
    /// Returns the scores of logits `z [T, E]` that were computed before.
    ///
    /// # Errors
    /// Returns an error when `z` is not a matrix.
    pub fn of_logits(tape: &Tape, z: Var, score: Score, choice: Choice) -> Result<Self> {
        Ok(Scores {
            values: match score {
                // The positive part is taken on the selection, which a replay keeps fixed.
                Score::Logits | Score::Relu => z.clone(),
                Score::Softmax => router::softmax(tape, &z)?,
                Score::Sigmoid => sigmoid(tape, &z)?,
            },
            score,
            origin: Origin::Logits { z, choice },
        })
    }

    /// Returns the experts of largest score of each token, according to the [`Choice`].
    ///
    /// # Errors
    /// Returns an error when the choice requests no expert, or more experts than exist.
    pub fn choose(&self) -> Result<TopK> {
        match &self.origin {
            Origin::Kernel(found) => Ok(found.chosen.clone()),
            Origin::Logits { choice, .. } => {
                let values = self.values.tensor();
                self.chosen(match &choice.bias {
                    None => router::top_k(values, choice.top_k)?,
                    Some(bias) => router::top_k(&shifted(values, bias)?, choice.top_k)?,
                })
            }
        }
    }

    /// Returns every expert for every token.
    ///
    /// # Errors
    /// Returns an error when the logits are not real.
    pub fn all(&self) -> Result<TopK> {
        let shape = self.values.tensor().shape();
        self.chosen(Selection::all(shape[0], shape[1]))
    }

    /// Returns `selection`, together with the first token whose logits contain a NaN or an infinity.
    ///
    /// # Errors
    /// Returns an error when the logits are not real.
    pub fn chosen(&self, selection: Selection) -> Result<TopK> {
        Ok(TopK {
            selection,
            non_finite: match &self.origin {
                Origin::Logits { z, .. } => NonFinite::At(first_non_finite(z.tensor())?),
                Origin::Kernel(found) => found.chosen.non_finite.clone(),
            },
        })
    }

    /// Returns the experts of positive score: any number per token.
    ///
    /// # Errors
    /// Returns an error when the scores are not real.
    pub fn positive(&self) -> Result<TopK> {
        let values = self.values.tensor();
        self.chosen(match &self.origin {
            Origin::Logits { .. } => positive(values)?,
            Origin::Kernel(_) => Selection::positive_of_kernel(values.clone()),
        })
    }

    /// Returns `E Σ_i f_i P_i`, a scalar without its coefficient; see [`balance::auxiliary_loss`].
    ///
    /// # Errors
    /// Returns an error when `fractions` does not have one entry per expert.
    pub fn auxiliary_loss(&self, tape: &Tape, fractions: &Tensor) -> Result<Var> {
        match &self.origin {
            Origin::Logits { .. } => balance::auxiliary_loss(tape, &self.values, fractions),
            Origin::Kernel(found) => balance::auxiliary_loss(tape, &found.mean, fractions),
        }
    }

    /// Returns `mean_t logsumexp(z_t)²`, a scalar without its coefficient.
    ///
    /// # Errors
    /// Returns an error when the logits are not real.
    pub fn z_loss(&self, tape: &Tape) -> Result<Var> {
        match &self.origin {
            Origin::Logits { z, .. } => balance::z_loss(tape, z),
            Origin::Kernel(found) => {
                found.kept_lse.get_or_init(|| found.lse.clone());
                Ok(found.lse_square.clone())
            }
        }
    }

    /// Returns the entropy of the scores.
    ///
    /// # Errors
    /// Returns an error when the scores are not real.
    pub fn entropy(&self) -> Result<Entropy> {
        let values = self.values.tensor();
        Ok(match (&self.origin, self.score) {
            (Origin::Kernel(found), Score::Softmax) => Entropy::OfKernel(found.statistics.clone()),
            (Origin::Kernel(_), _) => Entropy::OfShares(values.clone()),
            (_, Score::Softmax) => Entropy::Sum(router::entropy(values)?),
            _ => Entropy::Sum(router::entropy(&shares(values)?)?),
        })
    }
}

/// Adds `bias [E]` to every row of `scores [T, E]`.
fn shifted(scores: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let mut sum = scores.clone();
    with_real!(scores.dtype(), "scores", |T| {
        let bias = bias.slice::<T>();
        for row in sum.slice_mut::<T>().chunks_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(s, &b)| *s += b);
        }
        Ok(sum)
    })
}

/// The kernels of `kernels/router.cu` and `kernels/router_backward.cu`.
struct Router {
    score: Score,
    /// `logsumexp(z) [T]`, kept only if the z-loss needs it.
    lse: Rc<OnceCell<Tensor>>,
}

struct Run {
    forward: Forward,
    chosen: TopK,
    lse: Tensor,
    statistics: Tensor,
}

impl Router {
    fn run(x: &Tensor, w: &Tensor, score: Score, choice: &Choice) -> Result<Run> {
        let top_k = choice.top_k;
        let (tokens, hidden, experts) = (x.shape().rows(), x.shape().width(), w.shape()[0]);
        x.expect_dtype("router", "x", DType::Bf16)?;
        w.expect_dtype("router", "weight", DType::F32)?;
        w.expect_shape("router", "weight", [experts, hidden])?;
        let (device, stream) = (x.device(), Stream::of(x.device())?);
        let floats = partials(stream.launchers(), tokens, experts)?;
        let new = |dtype, shape: &[usize]| Tensor::unspecified(device, dtype, shape);
        let mut values = new(DType::F32, &[tokens, experts]);
        let mut lse = new(DType::F32, &[tokens]);
        let mut choices = new(DType::I32, &[tokens, top_k]);
        let mut partials = new(DType::F32, &[floats]);
        let mut statistics = new(DType::F32, &[2 * experts + 2]);
        let mut bad = Tensor::constant(device, [1], &[i32::MAX]);
        let forward = RouterForward {
            scores: values.output()?,
            log_sum_exp: lse.output()?,
            choices: Some(choices.output()?),
            partials: partials.output()?,
            first_non_finite: bad.output()?,
            x: x.input()?,
            w: w.input()?,
            selection_bias: choice.bias.as_ref().map(Tensor::input).transpose()?,
            tokens,
            experts,
            hidden,
            choices_per_token: top_k,
            score: score.kernel(),
        };
        forward.launch(&stream)?;
        let sums = RouterStatistics {
            statistics: statistics.output()?,
            partials: partials.input()?,
            tokens,
            experts,
        };
        sums.launch(&stream)?;
        let chosen = TopK {
            selection: Selection::of_kernel(choices, experts),
            non_finite: NonFinite::OfKernel(bad),
        };
        let outputs = vec![
            values.clone(),
            statistics.part(0, [experts])?,
            statistics.part(2 * experts, Shape::from([]))?,
        ];
        Ok(Run {
            forward: Forward {
                outputs,
                saved: vec![x.clone(), w.clone(), values],
            },
            chosen,
            lse,
            statistics,
        })
    }
}

impl Score {
    fn kernel(self) -> routegrad_score {
        match self {
            Score::Logits => ROUTEGRAD_SCORE_LOGITS,
            Score::Softmax => ROUTEGRAD_SCORE_SOFTMAX,
            Score::Sigmoid => ROUTEGRAD_SCORE_SIGMOID,
            Score::Relu => ROUTEGRAD_SCORE_RELU,
        }
    }
}

impl Op for Router {
    fn name(&self) -> &'static str {
        "router"
    }

    fn runs_on(&self, device: Device) -> bool {
        device != Device::Cpu
    }

    fn forward(&self, _inputs: &[&Tensor]) -> Result<Forward> {
        unreachable!("the router runs before it is recorded")
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let [x, w, values] = saved else {
            unreachable!("the router keeps three tensors")
        };
        let (device, stream) = (x.device(), Stream::of(x.device())?);
        let (tokens, hidden, experts) = (x.shape().rows(), x.shape().width(), w.shape()[0]);
        let floats = workspace(stream.launchers(), tokens, experts, hidden)?;
        let mut partials = Tensor::unspecified(device, DType::F32, [floats]);
        let mut dz = values.unspecified_like();
        let given = |i: usize| douts[i].as_ref().map(Tensor::input::<f32>).transpose();
        let mut backward = |dx: &mut Tensor, accumulate: Accumulate| {
            let kernel = RouterBackward {
                dx: dx.output()?,
                dz: dz.output()?,
                dw_partials: partials.output()?,
                scores: values.input()?,
                log_sum_exp: self.lse.get().map(Tensor::input).transpose()?,
                dscores: given(0)?,
                dmean: given(1)?,
                dlse2: given(2)?,
                x: x.input()?,
                w: w.input()?,
                tokens,
                experts,
                hidden,
                score: self.score.kernel(),
                accumulate: accumulate == Accumulate::Add,
            };
            kernel.launch(&stream)
        };
        if grads.wanted(0) {
            grads.write(0, x, backward)?;
        } else {
            grads.none(0);
            backward(&mut x.unspecified_like(), Accumulate::Assign)?;
        }
        grads.write(1, w, |dw, accumulate| {
            let kernel = RouterWeightGradient {
                dw: dw.output()?,
                dw_partials: partials.input()?,
                tokens,
                experts,
                hidden,
                accumulate: accumulate == Accumulate::Add,
            };
            kernel.launch(&stream)
        })
    }
}
