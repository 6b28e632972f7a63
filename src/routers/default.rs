//! `default`: Default MoE. TopK routing in which every expert that did not run is stood in for by a
//! moving average of its outputs, so that the router learns about all experts from every token.
//!
//! `y = Σ_A p_i e_i(x) + Σ_{i∉A} p_i ê_i` (2504.12463, eq. 11); with `v_i = e_i(x)` on A and ê_i off
//! it, `s_i = ⟨g, v_i⟩`: `dz_j = p_j (s_j − Σ_all p_i s_i)`. ê is a constant in backward; it is
//! updated before use, `ê_i ← β ê_i + (1 − β) m_i` (eq. 10), m_i the mean of e_i over the tokens that
//! chose i. With n micro-batches each updates with β^(1/n), so that β is per optimizer step.
//!
//! With `source = "sampled"` (ours) m_i is the mean over a few tokens that did *not* choose i, drawn by their probabilities, on
//! which the expert runs for this alone: what ê stands in for. The mean over the tokens that chose it is another one, since they
//! chose it for what it gives them.

use super::topk::TopK;
use super::{
    GradientCheck, LayerPass, Phase, Router, RouterInfo, Routing, StateTensor, registry, within,
};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::dist::at;
use crate::error::{Error, Result};
use crate::ops::combine::Defaults;
use crate::ops::expert_mean::{ExpertSums, Weighting};
use crate::ops::routing::{Choice, Score, scores};
use crate::ops::sampled_outputs::{SampledRows, Sampling, sample};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::tensor::random::{Purpose, Stream};
use serde::{Deserialize, Serialize};

pub(super) const INFO: RouterInfo = RouterInfo {
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
            "whether a token counts by its probability, or all alike",
        ),
        (
            "weight_norm",
            "what a weighted mean is divided by: \"sum_p\" or \"count\"",
        ),
        (
            "init_std",
            "standard deviation of the vectors at the start; 0 for zeros",
        ),
        (
            "pass_forward",
            "whether the vectors enter the output, or the router's gradient alone",
        ),
        ("use_at_evaluation", "whether evaluation uses them"),
        (
            "source",
            "tokens whose outputs the vectors average: \"chosen\", those that chose the expert, or \"sampled\", some that did not",
        ),
        (
            "samples",
            "tokens that \"sampled\" draws for each expert and optimizer step",
        ),
    ],
    check: GradientCheck {
        // So that the vectors are large enough to be seen.
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

/// Which tokens' outputs default vectors average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Those that chose the expert.
    Chosen,
    /// A few that did not, drawn by their probabilities.
    Sampled,
}

/// Settings of `default`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DefaultMoe {
    /// Decay of the moving average per optimizer step, in [0, 1).
    pub beta: f64,
    /// Whether a token counts by its probability, or all tokens alike.
    pub weighted: bool,
    /// What a weighted mean is divided by: "sum_p" or "count".
    pub weight_norm: WeightNorm,
    /// Standard deviation of the vectors at the start; 0 starts at zero.
    pub init_std: f64,
    /// Whether default vectors enter the layer's output, or its router gradient alone.
    pub pass_forward: bool,
    /// Whether evaluation uses them.
    pub use_at_evaluation: bool,
    /// Which tokens' outputs they average: "chosen" or "sampled".
    pub source: Source,
    /// Tokens that "sampled" draws for each expert and optimizer step, below 2^16.
    pub samples: usize,
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
            source: Source::Chosen,
            samples: 16,
        }
    }
}

impl DefaultMoe {
    /// Moves ê towards the mean of these sums over all ranks, by this share of a step.
    fn update(&self, sums: ExpertSums, share: f64, layer: &mut LayerPass<'_>) -> Result<()> {
        at(layer.dist, || format!("ê of MoE layer {}", layer.layer));
        let sums = sums.over_ranks(layer.dist)?;
        sums.update(layer.state_mut(VECTORS), self.beta.powf(share))
    }

    /// Refuses what sampling cannot do.
    fn can_sample(&self) -> Result<()> {
        if self.source == Source::Chosen {
            return Ok(());
        }
        if !(1..1 << 16).contains(&self.samples) {
            return Err(Error::invalid(
                "router.samples",
                "a whole number from 1 to 65535",
                self.samples.to_string(),
                "change it with --set router.samples=…",
            ));
        }
        if self.weighted && self.weight_norm == WeightNorm::Count {
            return Err(Error::invalid(
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
        self.can_sample()
    }

    fn initial_state(&self, model: &ModelConfig, layer: usize, seed: u64) -> Vec<StateTensor> {
        let mut start = Tensor::zeros(Device::Cpu, DType::F64, [model.num_experts, model.hidden]);
        if self.init_std > 0.0 {
            let stream = Stream::new(seed, Purpose::DefaultVectors, 0, layer);
            stream.fill_normal(start.slice_mut::<f64>(), self.init_std);
        }
        vec![StateTensor {
            name: VECTORS,
            start,
        }]
    }

    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let choice = Choice::top_k(layer.top_k);
        Routing::by_scores(scores(tape, x, weight, Score::Softmax, choice)?, layer)
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
        if self.source == Source::Chosen {
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
        self.update(sums, drawn.share, layer)
    }

    fn sampled_rows_per_step(&self, model: &ModelConfig) -> usize {
        match self.source {
            Source::Chosen => 0,
            Source::Sampled => self.samples * model.num_experts,
        }
    }

    fn defaults(
        &self,
        sums: Option<ExpertSums>,
        layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        if let Some(sums) = sums {
            self.update(sums, 1.0 / layer.pass.micro_batches as f64, layer)?;
        }
        let evaluating = layer.pass.phase == Phase::Evaluate;
        if evaluating && !(self.use_at_evaluation && self.pass_forward) {
            return Ok(None);
        }
        let vectors = layer.state(VECTORS).clone();
        Ok(Some(Defaults {
            vectors,
            in_forward: self.pass_forward,
        }))
    }

    fn evaluation_reads(&self, _name: &str) -> bool {
        self.pass_forward && self.use_at_evaluation
    }

    fn equivalent_topk(&self) -> Option<TopK> {
        (!self.evaluation_reads(VECTORS)).then(TopK::default)
    }

    fn leave_out_default_vectors(&self, settings: &mut toml::Table) -> bool {
        settings.insert("use_at_evaluation".into(), false.into());
        true
    }

    fn weighs_by_softmax(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
