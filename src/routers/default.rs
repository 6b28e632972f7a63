//! `default`: Default MoE. TopK routing in which a moving average of its outputs replaces the output of every expert
//! that did not run. The router therefore learns about all experts from every token.
//!
//! `y = Σ_A p_i e_i(x) + Σ_{i∉A} p_i ê_i` (2504.12463, eq. 11); with `v_i = e_i(x)` on A, `v_i = ê_i` off A, and
//! `s_i = ⟨g, v_i⟩`: `dz_j = p_j (s_j − Σ_all p_i s_i)`. ê is a constant in backward. It is updated before use:
//! `ê_i ← β ê_i + (1 − β) m_i` (eq. 10), where m_i is the mean of e_i over the tokens that chose i. With n
//! micro-batches, each micro-batch updates with β^(1/n), so that β applies per optimizer step.
//!
//! With `renormalize` the gates are `q_i = p_i / Σ_A p` for all i; ê is still weighted by p.
//!
//! With `source = "sampled"` (ours), m_i is the mean over a few tokens that did *not* choose i, drawn by their
//! probabilities. The expert runs on these tokens only for this mean. These are the outputs that ê approximates; the
//! mean over the tokens that chose i differs from it, because the router sends tokens to the experts that suit them.
//!
//! `shrink` (ours) uses c ê in place of ê, in output and gradient. c is a constant or, with "running", the
//! least-squares factor: the ratio of moving averages of `Σ_i w_i ⟨ê_i, m_i⟩` and `Σ_i w_i ‖ê_i‖²`, where m_i are
//! sampled means and w_i is the sum of the probabilities of expert i over the tokens that did not choose it. This c
//! makes c ê the best approximation if g has no preferred direction.

use super::topk::TopK;
use super::{
    GradientCheck, LayerPass, Phase, Router, RouterInfo, Routing, StateTensor, chosen_by_kernel,
    registry, within,
};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::dist::at;
use crate::error::{Error, Result};
use crate::ops::combine::Defaults;
use crate::ops::expert_mean::{ExpertSums, Weighting, scaled};
use crate::ops::renormalize::renormalize_all;
use crate::ops::routing::{Choice, Score, scores};
use crate::ops::sampled_outputs::{SampledRows, Sampling, sample};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::tensor::random::{Purpose, Stream};
use crate::with_real;
use serde::{Deserialize, Serialize};

pub(crate) const INFO: RouterInfo = RouterInfo {
    name: "default",
    summary: "topk, and a moving average of its outputs for every expert that did not run: \
              a dense gradient for the router",
    source: "Default MoE, 2504.12463",
    cost: "topk, 2 passes over the layer's output, E · D numbers a layer",
    settings: &[
        (
            "beta",
            "decay of the moving average per optimizer step, from 0 to below 1",
        ),
        (
            "weighted",
            "whether tokens are weighted by their probability",
        ),
        (
            "weight_norm",
            "divisor of the weighted mean: \"sum_p\" or \"count\"",
        ),
        (
            "init_std",
            "initial standard deviation of the vectors; 0 for zeros",
        ),
        (
            "pass_forward",
            "whether the vectors enter the output; otherwise they enter only the router's gradient",
        ),
        ("use_at_evaluation", "whether evaluation uses the vectors"),
        (
            "renormalize",
            "whether all weights are divided by the sum of the weights of the chosen experts",
        ),
        (
            "source",
            "tokens whose outputs are averaged: \"chosen\" (those that chose the expert) or \"sampled\" (some that did not)",
        ),
        (
            "samples",
            "number of tokens drawn for each expert and optimizer step, if tokens are drawn",
        ),
        (
            "shrink",
            "factor by which the vectors are multiplied when used: a number >= 0, or \"running\" (least squares)",
        ),
    ],
    check: GradientCheck {
        // This makes the vectors large enough for the check to detect an error in their terms.
        set: &["router.init_std=2"],
        ..GradientCheck::EXACT
    },
    build: registry::from_settings::<DefaultMoe>,
};

/// The name of ê `[E, D]` in state and checkpoints.
pub const VECTORS: &str = "default_vectors";

/// How the weighted mean is normalised; the paper says only that it is weighted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightNorm {
    /// By the sum of the probabilities.
    SumP,
    /// By the number of tokens.
    Count,
}

/// The tokens whose outputs default vectors average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The tokens that chose the expert.
    Chosen,
    /// A few tokens that did not choose the expert, drawn by their probabilities.
    Sampled,
}

/// The name of the running sums of `shrink` `[2]`: numerator and denominator.
pub const SHRINK: &str = "shrink_sums";
/// Upper bound of the running factor: early in training the denominator is small and the ratio is unreliable.
const MOST: f64 = 2.0;

/// The factor by which default vectors are multiplied when they are used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number from 0 up, or \"running\"")]
pub enum Shrink {
    /// The same factor in every step.
    Constant(f64),
    /// Estimated from the drawn tokens: `shrink = "running"`.
    Running(Running),
}

/// The value `"running"` of `shrink`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Running {
    /// `"running"`.
    Running,
}

/// Settings of `default`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DefaultMoe {
    /// Decay of the moving average per optimizer step, in [0, 1).
    pub beta: f64,
    /// Whether tokens are weighted by their probability; otherwise all weights are equal.
    pub weighted: bool,
    /// What a weighted mean is divided by: "sum_p" or "count".
    pub weight_norm: WeightNorm,
    /// Standard deviation of the vectors at the start; 0 starts at zero.
    pub init_std: f64,
    /// Whether default vectors enter the layer's output; otherwise they enter only the router's gradient.
    pub pass_forward: bool,
    /// Whether evaluation uses default vectors.
    pub use_at_evaluation: bool,
    /// Whether all gates are divided by the sum of the gates of the chosen experts.
    pub renormalize: bool,
    /// The tokens whose outputs default vectors average: "chosen" or "sampled".
    pub source: Source,
    /// Number of tokens drawn for each expert and optimizer step if tokens are drawn; below 2^16.
    pub samples: usize,
    /// The factor by which the vectors are multiplied when they are used: a number, or "running".
    pub shrink: Shrink,
}

impl Default for DefaultMoe {
    fn default() -> Self {
        DefaultMoe {
            beta: 0.9,
            weighted: true,
            weight_norm: WeightNorm::SumP,
            init_std: 0.0,
            pass_forward: true,
            use_at_evaluation: true,
            renormalize: false,
            source: Source::Chosen,
            samples: 16,
            shrink: Shrink::Constant(1.0),
        }
    }
}

impl DefaultMoe {
    /// Moves ê towards the mean given by `sums` over all ranks, with β raised to the power `share`.
    fn update(&self, sums: &ExpertSums, share: f64, layer: &mut LayerPass<'_>) -> Result<()> {
        sums.update(layer.state_mut(VECTORS), self.beta.powf(share))
    }

    /// Updates the sums of the running factor from the sampled means and from ê before its update.
    fn update_shrink(
        &self,
        sums: &ExpertSums,
        drawn: &SampledRows,
        layer: &mut LayerPass<'_>,
    ) -> Result<()> {
        let vectors = layer.state(VECTORS).clone();
        let mut means = vectors.clone();
        sums.update(&mut means, 0.0)?;
        let width = vectors.shape().width();
        let (vectors, means) = (vectors.to_f64()?, means.to_f64()?);
        let total: f64 = drawn.mass.iter().sum();
        let mut terms = [0.0; 2];
        let experts = vectors.chunks(width).zip(means.chunks(width));
        for ((vector, mean), mass) in experts.zip(&drawn.mass) {
            for (v, m) in vector.iter().zip(mean) {
                terms[0] += mass / total * v * m;
                terms[1] += mass / total * v * v;
            }
        }
        let (state, beta) = (layer.state_mut(SHRINK), self.beta.powf(drawn.share));
        let sums = state.to_f64()?;
        with_real!(state.dtype(), "default", |T| {
            let to = state.slice_mut::<T>().iter_mut().zip(sums).zip(terms);
            to.for_each(|((to, sum), term)| *to = T::of(beta * sum + (1.0 - beta) * term));
            Ok::<(), Error>(())
        })?;
        if state.device() != Device::Cpu {
            // The kernel that commits a step has only the device address, so the values must be in device memory.
            state.pointer_mut::<f32>();
        }
        Ok(())
    }

    /// Returns the factor on the vectors.
    fn scale(&self, layer: &LayerPass<'_>) -> Result<f64> {
        Ok(match self.shrink {
            Shrink::Constant(scale) => scale,
            Shrink::Running(_) => match layer.state(SHRINK).to_f64()?[..] {
                [along, square] if square > 0.0 => (along / square).clamp(0.0, MOST),
                _ => 1.0,
            },
        })
    }

    /// Whether tokens are drawn.
    fn draws(&self) -> bool {
        self.source == Source::Sampled || matches!(self.shrink, Shrink::Running(_))
    }

    /// Rejects settings that sampling does not support.
    fn can_sample(&self) -> Result<()> {
        if !self.draws() {
            return Ok(());
        }
        if !(1..1 << 16).contains(&self.samples) {
            return Err(Error::usage(
                "router.samples",
                "a whole number from 1 to 65535",
                self.samples.to_string(),
                "change it with --set router.samples=…",
            ));
        }
        let counts = self.weighted && self.weight_norm == WeightNorm::Count;
        if counts && self.source == Source::Sampled {
            return Err(Error::usage(
                "router.weight_norm",
                "\"sum_p\" with router.source = \"sampled\": drawing by probability gives the mean over their sum",
                "\"count\"",
                "leave router.weight_norm out",
            ));
        }
        Ok(())
    }
}

impl Router for DefaultMoe {
    fn validate(&self, _model: &ModelConfig) -> Result<()> {
        within("beta", self.beta, 0.0, Some(1.0))?;
        within("init_std", self.init_std, 0.0, None)?;
        if let Shrink::Constant(scale) = self.shrink {
            within("shrink", scale, 0.0, None)?;
        }
        self.can_sample()
    }

    fn validate_device(&self, model: &ModelConfig, device: Device) -> Result<()> {
        chosen_by_kernel(model, device)?;
        if device == Device::Cpu || !self.renormalize {
            return Ok(());
        }
        Err(Error::usage(
            "router.renormalize",
            "false on a device with kernels: default renormalises only on the CPU",
            format!("true with train.device = \"{device}\""),
            "set train.device = \"cpu\", or leave router.renormalize out",
        ))
    }

    fn initial_state(&self, model: &ModelConfig, layer: usize, seed: u64) -> Vec<StateTensor> {
        let mut start = Tensor::zeros(Device::Cpu, DType::F64, [model.num_experts, model.hidden]);
        if self.init_std > 0.0 {
            let stream = Stream::new(seed, Purpose::DefaultVectors, 0, layer);
            stream.fill_normal(start.slice_mut::<f64>(), self.init_std);
        }
        let mut state = vec![StateTensor {
            name: VECTORS,
            start,
        }];
        if matches!(self.shrink, Shrink::Running(_)) {
            state.push(StateTensor {
                name: SHRINK,
                start: Tensor::zeros(Device::Cpu, DType::F64, [2]),
            });
        }
        state
    }

    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let choice = Choice::top_k(layer.top_k);
        let scores = scores(tape, x, weight, Score::Softmax, choice)?;
        let mut routing = Routing::by_scores(scores, layer)?;
        if self.renormalize {
            let p = routing.gates;
            routing.gates = renormalize_all(tape, &p, &routing.dispatch)?;
            routing.sum_weights = Some(p);
        }
        Ok(routing)
    }

    fn kept_score_tensors(&self) -> usize {
        1 + usize::from(self.renormalize)
    }

    fn weighting(&self) -> Option<Weighting> {
        match (self.source, self.weighted, self.weight_norm) {
            (Source::Sampled, _, _) => None,
            (_, false, _) => Some(Weighting::Plain),
            (_, true, WeightNorm::SumP) => Some(Weighting::BySumOfProbabilities),
            (_, true, WeightNorm::Count) => Some(Weighting::ByCount),
        }
    }

    fn samples(&self, routing: &Routing, layer: &mut LayerPass<'_>) -> Result<Option<SampledRows>> {
        if !self.draws() {
            return Ok(None);
        }
        let chosen = routing.chosen().selection();
        let index = layer.micro_batch(chosen.num_tokens());
        at(layer.dist, || {
            format!("samples of MoE layer {}", layer.layer)
        });
        let sampling = Sampling {
            stream: layer.draws_for(Purpose::DefaultSamples),
            per_step: self.samples,
            samples: Sampling::share(self.samples, index, layer.pass.micro_batches),
            weighted: self.weighted,
            dist: layer.dist,
        };
        sample(routing.scores.values.tensor(), chosen, &sampling)
    }

    fn learn_from_samples(
        &self,
        sums: ExpertSums,
        drawn: &SampledRows,
        layer: &mut LayerPass<'_>,
    ) -> Result<()> {
        at(layer.dist, || {
            format!("samples of MoE layer {}", layer.layer)
        });
        let sums = layer.sums_of_all_ranks(sums)?;
        // This uses ê before the update, which does not depend on these samples.
        if matches!(self.shrink, Shrink::Running(_)) {
            self.update_shrink(&sums, drawn, layer)?;
        }
        match self.source {
            Source::Sampled => self.update(&sums, drawn.share, layer),
            Source::Chosen => Ok(()),
        }
    }

    fn sampled_rows_per_step(&self, model: &ModelConfig) -> usize {
        match self.draws() {
            true => self.samples * model.num_experts,
            false => 0,
        }
    }

    fn defaults(
        &self,
        sums: Option<ExpertSums>,
        layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        if let Some(sums) = sums {
            at(layer.dist, || format!("ê of MoE layer {}", layer.layer));
            let sums = layer.sums_of_all_ranks(sums)?;
            self.update(&sums, 1.0 / layer.pass.micro_batches as f64, layer)?;
        }
        let evaluating = layer.pass.phase == Phase::Evaluate;
        if evaluating && !(self.use_at_evaluation && self.pass_forward) {
            return Ok(None);
        }
        let vectors = match self.scale(layer)? {
            1.0 => layer.state(VECTORS).clone(),
            scale => {
                let running = matches!(self.shrink, Shrink::Running(_));
                scaled(layer.state(VECTORS), scale, running)?
            }
        };
        Ok(Some(Defaults {
            vectors,
            in_forward: self.pass_forward,
        }))
    }

    fn evaluation_reads(&self, _name: &str) -> bool {
        self.pass_forward && self.use_at_evaluation
    }

    fn equivalent_topk(&self) -> Option<TopK> {
        (!self.evaluation_reads(VECTORS)).then_some(TopK {
            renormalize: self.renormalize,
        })
    }

    fn use_default_vectors(
        &self,
        settings: &mut toml::Table,
        used: bool,
    ) -> Result<(), &'static str> {
        if used && !self.pass_forward {
            return Err("with router.pass_forward = false: the vectors never enter the output");
        }
        settings.insert("use_at_evaluation".into(), used.into());
        Ok(())
    }

    fn weighs_by_softmax(&self) -> bool {
        !self.renormalize
    }
}

#[cfg(test)]
mod sampled_tests;
#[cfg(test)]
mod tests;
