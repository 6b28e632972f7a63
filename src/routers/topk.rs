//! `topk`: the K most probable experts run, weighted by their probabilities.
//!
//! `y = Σ_A p_i e_i(x)` (Default MoE, 2504.12463, eq. 2), with weights that are not renormalised, or, with
//! `renormalize`, `q_i = p_i / Σ_A p`. Through the softmax the logits get `dz_j = p_j (1[j∈A] s_j − Σ_A p_i s_i)`,
//! `s_i = ⟨g, e_i⟩`: the baseline, whose router learns only from the chosen experts.

use super::{
    GradientCheck, LayerPass, Router, RouterInfo, Routing, chosen_by_kernel, learns_renormalized,
    registry,
};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::error::Result;
use crate::ops::routing::{Choice, Score, scores};
use crate::tape::{Tape, Var};
use serde::{Deserialize, Serialize};

pub(crate) const INFO: RouterInfo = RouterInfo {
    name: "topk",
    summary: "the K most probable experts, weighted by their probabilities; the baseline",
    source: "Shazeer et al. 2017, 1701.06538; Default MoE, 2504.12463, eq. 2",
    cost: "K experts a token",
    settings: &[(
        "renormalize",
        "whether the weights are divided by their sum over the chosen experts; requires K of 2 or more",
    )],
    check: GradientCheck::EXACT,
    build: registry::from_settings::<TopK>,
};

/// Settings of `topk`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TopK {
    /// Weights that sum to 1 over the chosen experts; needs K ≥ 2.
    pub renormalize: bool,
}

impl Router for TopK {
    fn validate(&self, model: &ModelConfig) -> Result<()> {
        if self.renormalize {
            learns_renormalized(model)?;
        }
        Ok(())
    }

    fn validate_device(&self, model: &ModelConfig, device: Device) -> Result<()> {
        chosen_by_kernel(model, device)
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
        let routing = Routing::by_scores(scores, layer)?;
        if self.renormalize {
            return routing.renormalized(tape);
        }
        Ok(routing)
    }

    fn kept_score_tensors(&self) -> usize {
        1 + usize::from(self.renormalize)
    }

    fn equivalent_topk(&self) -> Option<TopK> {
        Some(self.clone())
    }

    fn weighs_by_softmax(&self) -> bool {
        !self.renormalize
    }
}
