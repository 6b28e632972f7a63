//! `default`: Default MoE. TopK routing in which every expert that did not run is stood in for by a
//! moving average of its outputs, so that the router learns about all experts from every token.
//!
//! `y = Σ_A p_i e_i(x) + Σ_{i∉A} p_i ê_i` (2504.12463, eq. 11); with `v_i = e_i(x)` on A and ê_i off
//! it, `s_i = ⟨g, v_i⟩`: `dz_j = p_j (s_j − Σ_all p_i s_i)`. ê is a constant in backward; it is
//! updated before use, `ê_i ← β ê_i + (1 − β) m_i` (eq. 10), m_i the mean of e_i over the tokens that
//! chose i. With n micro-batches each updates with β^(1/n), so that β is per optimizer step.

use super::{LayerPass, Phase, Router, RouterInfo, Routing, StateTensor, from_settings};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::combine::Defaults;
use crate::ops::expert_mean::{Weighting, expert_mean, update_average};
use crate::ops::router::{softmax, top_k};
use crate::random::{Purpose, Stream};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub(super) const INFO: RouterInfo = RouterInfo {
    name: "default",
    summary: "topk, and a moving average of its outputs for every expert that did not run: \
              a dense gradient for the router",
    source: "Default MoE, 2504.12463",
    cost: "topk + 2 passes over the layer's output; E · D numbers a layer",
    build: from_settings::<DefaultMoe>,
};

/// The name of ê in checkpoints.
const VECTORS: &str = "default_vectors";

/// How the weighted mean is normalised; the paper says only that it is weighted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightNorm {
    /// By the sum of the probabilities.
    SumP,
    /// By the number of tokens.
    Count,
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
        }
    }
}

impl DefaultMoe {
    fn weighting(&self) -> Weighting {
        match (self.weighted, self.weight_norm) {
            (false, _) => Weighting::Plain,
            (true, WeightNorm::SumP) => Weighting::BySumOfProbabilities,
            (true, WeightNorm::Count) => Weighting::ByCount,
        }
    }
}

impl Router for DefaultMoe {
    fn validate(&self, _model: &ModelConfig) -> Result<()> {
        for (key, value, most) in [("beta", self.beta, 1.0), ("init_std", self.init_std, f64::MAX)] {
            if !(value >= 0.0 && value < most) {
                return Err(Error::invalid(
                    format!("router.{key}"),
                    if most == 1.0 { "a number from 0 to below 1" } else { "a number from 0 up" },
                    value.to_string(),
                    format!("change it with --set router.{key}=…"),
                ));
            }
        }
        Ok(())
    }

    fn initial_state(&self, model: &ModelConfig, layer: usize, seed: u64) -> Vec<StateTensor> {
        let mut start = Tensor::zeros(Device::Cpu, DType::F64, [model.num_experts, model.hidden]);
        if self.init_std > 0.0 {
            let stream = Stream::new(seed, Purpose::DefaultVectors, 0, layer);
            stream.fill_normal(start.slice_mut::<f64>(), self.init_std);
        }
        vec![StateTensor { name: VECTORS, start }]
    }

    fn route(&self, tape: &Tape<'_>, logits: &Var, layer: &mut LayerPass<'_>) -> Result<Routing> {
        let probabilities = softmax(tape, logits)?;
        let k = layer.top_k;
        let dispatch = layer.select(|| top_k(probabilities.tensor(), k))?;
        Ok(Routing { gates: probabilities.clone(), probabilities, dispatch })
    }

    fn defaults(
        &self,
        expert_outputs: &Tensor,
        routing: &Routing,
        layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        if layer.updates_state() {
            let gates = routing.gates.tensor();
            let (weighting, dist) = (self.weighting(), layer.pass.dist);
            let (mean, rows) = expert_mean(expert_outputs, gates, weighting, &routing.dispatch, dist)?;
            let beta = self.beta.powf(1.0 / layer.pass.micro_batches as f64);
            update_average(layer.state_mut(VECTORS), &mean, &rows, beta)?;
        }
        let evaluating = layer.pass.phase == Phase::Evaluate;
        if evaluating && !(self.use_at_evaluation && self.pass_forward) {
            return Ok(None);
        }
        let vectors = layer.state(VECTORS).clone();
        Ok(Some(Defaults { vectors, in_forward: self.pass_forward }))
    }
}
