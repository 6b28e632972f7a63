//! Scores of the experts for every token, the choice among them, and what the balance losses see:
//! the front of a MoE layer in one operation.
//!
//! `z = x Wᵀ`, `p = score(z) [T, E]`; A = the K largest of `p + bias`, ties to the lower expert;
//! the batch means `P_i = mean_t p_ti` and `mean_t logsumexp(z_t)²`. On the CPU it is a composition of
//! the operations of [`router`] and [`balance`]. On a device with
//! kernels it is one operation, whose backward gets dp, dP and the z-loss's gradient together: with
//! `d = dp + dP / T`, softmax `dz_j = p_j (d_j − Σ_i p_i d_i) + dl (2 / T) logsumexp(z) p_j`;
//! then `dx = dz W`, `dW = dzᵀ x`. It keeps x and p, 2·T·D + 4·T·E bytes, and for the z-loss logsumexp.

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
use crate::tape::{Forward, Grads, Op, Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;
use crate::with_real;
use serde::{Deserialize, Serialize};
use std::cell::OnceCell;
use std::rc::Rc;

/// The function from a row's logits to its scores.
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

/// Which experts of a token are chosen: the `top_k` of largest score, ties to the lower expert.
pub struct Choice {
    /// K.
    pub top_k: usize,
    /// `[E]`, added to the scores for the choice alone.
    pub bias: Option<Tensor>,
}

impl Choice {
    /// The `k` of largest score.
    pub fn top_k(k: usize) -> Self {
        Choice {
            top_k: k,
            bias: None,
        }
    }

    /// None: the router chooses in another way.
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

/// Where the choice and the balance losses come from.
enum Origin {
    /// The CPU: from the scores and the logits `[T, E]`, when asked.
    Logits { z: Var, choice: Choice },
    /// A kernel found them with the scores.
    Kernel(Box<Found>),
}

/// What the router's kernels found.
struct Found {
    /// Empty without a choice, but its flag stands.
    chosen: TopK,
    /// `[E]`.
    mean: Var,
    /// `mean_t logsumexp(z_t)²`.
    lse_square: Var,
    /// `logsumexp(z_t) [T]`, and where the operation keeps it once the z-loss was asked for.
    lse: Tensor,
    kept_lse: Rc<OnceCell<Tensor>>,
    /// `[2 E + 2]`: they end with the mean entropy of a row, in nats, of the softmax.
    statistics: Tensor,
}

/// Entropy of the scores, as shares of their sum, summed over the tokens, in nats.
pub enum Entropy {
    /// The sum, computed on the CPU.
    Sum(f64),
    /// What `router_statistics` gave.
    OfKernel(Tensor),
    /// That of these scores `[T, E]`, in device memory.
    OfShares(Tensor),
}

/// Scores of `x [T, D]` with the router weight `[E, D]`, in f32 on devices with kernels.
///
/// # Errors
/// When widths or dtypes differ, or more experts are to be chosen than there are.
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
    /// Scores of logits `[T, E]` that are there already.
    ///
    /// # Errors
    /// When `z` is not a matrix.
    pub fn of_logits(tape: &Tape, z: Var, score: Score, choice: Choice) -> Result<Self> {
        Ok(Scores {
            values: match score {
                // The positive part is taken on the selection, which a replay holds.
                Score::Logits | Score::Relu => z.clone(),
                Score::Softmax => router::softmax(tape, &z)?,
                Score::Sigmoid => sigmoid(tape, &z)?,
            },
            score,
            origin: Origin::Logits { z, choice },
        })
    }

    /// The experts of largest score of each token, as the choice says.
    ///
    /// # Errors
    /// When there are fewer experts than to be chosen, or none is to be.
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

    /// Every expert for every token.
    ///
    /// # Errors
    /// When the logits are not real.
    pub fn all(&self) -> Result<TopK> {
        let shape = self.values.tensor().shape();
        self.chosen(Selection::all(shape[0], shape[1]))
    }

    /// A selection with the first token whose logits hold a NaN or an infinity.
    ///
    /// # Errors
    /// When the logits are not real.
    pub fn chosen(&self, selection: Selection) -> Result<TopK> {
        Ok(TopK {
            selection,
            non_finite: match &self.origin {
                Origin::Logits { z, .. } => NonFinite::At(first_non_finite(z.tensor())?),
                Origin::Kernel(found) => found.chosen.non_finite.clone(),
            },
        })
    }

    /// The experts of positive score, any number for each token.
    ///
    /// # Errors
    /// When the scores are not real.
    pub fn positive(&self) -> Result<TopK> {
        let values = self.values.tensor();
        self.chosen(match &self.origin {
            Origin::Logits { .. } => positive(values)?,
            Origin::Kernel(_) => Selection::positive_of_kernel(values.clone()),
        })
    }

    /// `E Σ_i f_i P_i`, a scalar, without its coefficient; see [`balance::auxiliary_loss`].
    ///
    /// # Errors
    /// When `fractions` has not one entry per expert.
    pub fn auxiliary_loss(&self, tape: &Tape, fractions: &Tensor) -> Result<Var> {
        match &self.origin {
            Origin::Logits { .. } => balance::auxiliary_loss(tape, &self.values, fractions),
            Origin::Kernel(found) => balance::auxiliary_loss(tape, &found.mean, fractions),
        }
    }

    /// `mean_t logsumexp(z_t)²`, a scalar, without its coefficient.
    ///
    /// # Errors
    /// When the logits are not real.
    pub fn z_loss(&self, tape: &Tape) -> Result<Var> {
        match &self.origin {
            Origin::Logits { z, .. } => balance::z_loss(tape, z),
            Origin::Kernel(found) => {
                found.kept_lse.get_or_init(|| found.lse.clone());
                Ok(found.lse_square.clone())
            }
        }
    }

    /// Entropy of the scores.
    ///
    /// # Errors
    /// When the scores are not real.
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

/// Every row of `scores [T, E]` plus `bias [E]`.
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
    /// `logsumexp(z) [T]`, kept for the z-loss alone.
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

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
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
