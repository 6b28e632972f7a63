//! `sparsemixer`: experts are sampled among the likely ones, and the router's gradient is an estimate of the gradient
//! of the expected loss.
//!
//! Stage r excludes the experts X chosen in earlier stages, keeps the likely ones of the rest, `p` = softmax over
//! them, and samples one ([`sampled_gate`](crate::ops::sampled_gate)).
//!
//! v1 (2310.00811), K = 1, with a learned ω `[D]`: δ = [a likeliest or u > 1/2], h = (1 + δ) / 2, `y = h p_a ω⊙e_a`;
//! with `s = ⟨g, ω⊙e_a⟩`: `dz_j = 2 s p_a (1[j=a] − p_j)`, `dω = h p_a g⊙e_a`. v2 (2409.12136), K = 1 or 2: δ_r =
//! [a_r likeliest or u_r > 3/4], h_r = 1 or 1/3, `y = Σ_r h_r p^r e_{a_r}`,
//! `dz_j = Σ_r s_r p^r_{a_r} (1[j=a_r] − p^r_j)`, `s_r = ⟨g, e_{a_r}⟩`. Evaluation chooses the likeliest experts with
//! h = 1 and draws no random numbers.
//!
//! v1 estimates the derivative of `E_{a~p} f(p_a ω⊙e_a)`. v2 with K = 1 estimates the part of this derivative that
//! comes from the sampling probabilities, with the gate held constant. Both are unbiased for affine f; v2 with K = 2
//! is biased even then. None of them estimates the dense gradient or the gradient of deterministic TopK.

use super::{
    GradientCheck, LayerPass, OwnParameter, Phase, Router, RouterInfo, Routing, registry, within,
};
use crate::config::{ModelConfig, RouterConfig};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::add::add;
use crate::ops::dispatch::Selection;
use crate::ops::routing::{self, Score, Scores, scores};
use crate::ops::sampled_experts::{SampledExperts, Sampling, sample, sampled_gates};
use crate::ops::sampled_gate::{Choice, Draw, choose, sampled_gate};
use crate::ops::scale::scale;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;
use crate::with_real;
use serde::{Deserialize, Serialize};

pub(super) const INFO: RouterInfo = RouterInfo {
    name: "sparsemixer",
    summary: "one or two experts sampled among the likely ones, and an estimate of the gradient \
              through the sampling",
    source: "SparseMixer, 2310.00811 (v1) and 2409.12136 (v2), code microsoft/SparseMixer",
    cost: "topk, and E + 1 random numbers for each choice; v1 learns D numbers a layer",
    settings: &[
        ("version", "\"v1\" (K = 1) or \"v2\" (K = 1 or 2)"),
        (
            "epsilon",
            "an expert is excluded if its relative distance from the largest logit is above 2 epsilon",
        ),
    ],
    check: GradientCheck {
        exact: false,
        surrogate: Some(surrogate),
        ..GradientCheck::EXACT
    },
    build: registry::from_settings::<SparseMixer>,
};

/// The paper whose version is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    /// [2310.00811](https://arxiv.org/abs/2310.00811): K = 1, and a learned vector for each layer.
    V1,
    /// [2409.12136](https://arxiv.org/abs/2409.12136): K = 1 or 2.
    V2,
}

/// Settings of `sparsemixer`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SparseMixer {
    /// The paper whose version is used.
    pub version: Version,
    /// ε of the mask.
    pub epsilon: f64,
    /// Whether this is the router that [`surrogate`] returns.
    #[serde(skip)]
    surrogate: bool,
}

impl Default for SparseMixer {
    fn default() -> Self {
        SparseMixer {
            version: Version::V2,
            epsilon: 0.1,
            surrogate: false,
        }
    }
}

/// Returns, for checks, the router with the same choices and with gates `c p_a` in place of `h p_a`. The derivative
/// of its forward pass with respect to the logits equals the estimate, which does not depend on h.
///
/// # Errors
/// Returns an error when the settings are not those of `sparsemixer`.
pub fn surrogate(config: &RouterConfig) -> Result<Box<dyn Router>> {
    let router = config.settings.clone().try_into::<SparseMixer>();
    let router = router.map_err(|e| {
        Error::usage(
            "router",
            "the settings of sparsemixer",
            e.message().to_string(),
            "see `routegrad routers`",
        )
    })?;
    Ok(Box::new(SparseMixer {
        surrogate: true,
        ..router
    }))
}

impl SparseMixer {
    /// Returns c, and for samples that are not the likeliest expert the threshold of u and the h below it.
    fn constants(&self) -> (f64, f64, f64) {
        match self.version {
            Version::V1 => (2.0, 0.5, 0.5),
            Version::V2 => (1.0, 0.75, 1.0 / 3.0),
        }
    }

    /// Chooses the experts of `stages` stages; without draws, the likeliest experts.
    fn choices(&self, z: &Tensor, stages: usize, draws: Option<Draws<'_>>) -> Result<Vec<Choice>> {
        let (c, threshold, untrusted) = self.constants();
        let mut choices: Vec<Choice> = Vec::new();
        for stage in 0..stages {
            let excluded = choices.last().map(|first| &first.expert);
            let Some(draws) = &draws else {
                choices.push(choose(z, excluded, self.epsilon, Draw::Likeliest)?);
                continue;
            };
            let draw = Draw::Sampled {
                exponential: &|token, expert| (draws.exponential)(token, stage, expert),
                uniform: &|token| (draws.uniform)(token, stage),
                threshold,
                untrusted,
            };
            let mut choice = choose(z, excluded, self.epsilon, draw)?;
            if self.surrogate {
                with_real!(z.dtype(), "sparsemixer", |T| {
                    choice.factor.slice_mut::<T>().fill(T::of(c));
                    Ok(())
                })?;
            }
            choices.push(choice);
        }
        Ok(choices)
    }

    /// Returns the gates `[T, E]` of all stages.
    fn gates(&self, tape: &Tape, logits: &Var, choices: &[Choice]) -> Result<Var> {
        let (c, ..) = self.constants();
        let mut gates = sampled_gate(tape, logits, &choices[0], c)?;
        for choice in &choices[1..] {
            gates = add(tape, &gates, &sampled_gate(tape, logits, choice, c)?)?;
        }
        Ok(gates)
    }
}

/// Routing on a device with kernels, which sample all stages at once.
impl SparseMixer {
    /// The balance losses use a separate softmax, for which the product with the router's weight is computed a second
    /// time.
    fn route_on_device(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        logits: Scores,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let z = &logits.values;
        let (c, threshold, untrusted) = self.constants();
        let sampling = Sampling {
            stages: layer.top_k,
            layer: layer.layer,
            epsilon: self.epsilon,
            threshold,
            untrusted,
        };
        let draws = (layer.pass.phase != Phase::Evaluate).then(|| layer.draws_for_kernels());
        let held = layer.hold(|| {
            let mut sampled = sample(z.tensor(), sampling, draws)?;
            if self.surrogate && draws.is_some() {
                sampled.factors.slice_mut::<f32>().fill(c as f32);
            }
            let SampledExperts {
                experts,
                factors,
                kept,
                choices,
            } = sampled;
            Ok(vec![experts, factors, kept, choices])
        })?;
        let [experts, factors, kept, choices] = [0, 1, 2, 3].map(|i: usize| held[i].clone());
        let sampled = SampledExperts {
            experts,
            factors,
            kept,
            choices,
        };
        let experts = z.tensor().shape().width();
        let dispatch = layer
            .select(|| logits.chosen(Selection::of_kernel(sampled.choices.clone(), experts)))?;
        let gates = sampled_gates(tape, z, &sampled, c)?;
        let softmax = scores(tape, x, weight, Score::Softmax, routing::Choice::none())?;
        Ok(Routing::new(gates, softmax, dispatch))
    }
}

/// The random numbers of a training pass.
struct Draws<'a> {
    /// ξ of (token, stage, expert).
    exponential: &'a (dyn Fn(usize, usize, usize) -> f64 + Sync),
    /// u of (token, stage).
    uniform: &'a (dyn Fn(usize, usize) -> f64 + Sync),
}

impl Router for SparseMixer {
    fn validate(&self, model: &ModelConfig) -> Result<()> {
        let most = match self.version {
            Version::V1 => 1,
            Version::V2 => 2,
        };
        if model.top_k > most {
            return Err(Error::usage(
                "model.top_k",
                format!("at most {most} for this version of sparsemixer"),
                model.top_k.to_string(),
                "lower model.top_k, or set router.version = \"v2\" for 2",
            ));
        }
        within("epsilon", self.epsilon, 0.0, None)
    }

    fn parameters(&self, model: &ModelConfig) -> Vec<OwnParameter> {
        match self.version {
            Version::V1 => vec![OwnParameter {
                name: "omega",
                length: model.hidden,
                start: 1.0,
            }],
            Version::V2 => vec![],
        }
    }

    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let scores = scores(tape, x, weight, Score::Logits, routing::Choice::none())?;
        if x.tensor().device() != Device::Cpu {
            return self.route_on_device(tape, x, weight, scores, layer);
        }
        let logits = scores.values.clone();
        let (z, stages) = (logits.tensor(), layer.top_k);
        // Each token has a block of random numbers; in it, each stage has E numbers ξ and then one u.
        let (stream, first, experts) = (layer.draws(), layer.pass.first_token, z.shape().width());
        let index = |token: usize, stage: usize, i: usize| {
            let block = (first + token as u64) * stages as u64 + stage as u64;
            block * (experts as u64 + 1) + i as u64
        };
        let draws = Draws {
            exponential: &|t, stage, i| stream.exponential(index(t, stage, i)),
            uniform: &|t, stage| f64::from(stream.uniform(index(t, stage, experts))),
        };
        let draws = (layer.pass.phase != Phase::Evaluate).then_some(draws);
        let held = layer.hold(|| {
            let choices = self.choices(z, stages, draws)?.into_iter();
            Ok(choices.flat_map(|c| [c.expert, c.factor, c.kept]).collect())
        })?;
        let choices: Vec<Choice> = held
            .chunks(3)
            .map(|c| Choice {
                expert: c[0].clone(),
                factor: c[1].clone(),
                kept: c[2].clone(),
            })
            .collect();
        let dispatch = layer.select(|| scores.chosen(selection(z, &choices)?))?;
        let gates = self.gates(tape, &logits, &choices)?;
        let scores = Scores::of_logits(tape, logits, Score::Softmax, routing::Choice::none())?;
        Ok(Routing::new(gates, scores, dispatch))
    }

    fn output(&self, tape: &Tape, y: Var, own: &[Var]) -> Result<Var> {
        match own {
            [omega] => scale(tape, &y, omega),
            _ => Ok(y),
        }
    }

    fn kept_score_tensors(&self) -> usize {
        2
    }

    /// Version 1 keeps the output before it is multiplied by ω.
    fn kept_numbers_per_token(&self, model: &ModelConfig) -> usize {
        match self.version {
            Version::V1 => model.hidden,
            Version::V2 => 0,
        }
    }
}

/// Returns the experts of all stages, ascending for each token.
fn selection(z: &Tensor, choices: &[Choice]) -> Result<Selection> {
    Selection::new(z.shape().rows(), z.shape().width(), |token, chosen| {
        let first = chosen.len();
        chosen.extend(choices.iter().map(|c| c.expert.slice::<i32>()[token]));
        chosen[first..].sort_unstable();
    })
}

#[cfg(test)]
mod tests;
