//! `densemixer`: the output of `topk`, and a router gradient that uses every expert's true output.
//!
//! `y = Σ_A p_i e_i(x)`; with `s_i = ⟨g, e_i⟩` of all experts `dz_j = p_j (s_j − Σ_all p_i s_i)`, as if TopK were the
//! identity in backward. Experts and x get gradients only through A. Renormalised, `q_i = p_i / Σ_A p` for all i:
//! `y = Σ_A q_i e_i(x)`, `dz_j = q_j (s_j − 1[j∈A] Σ_A q_i s_i − Σ_{i∉A} p_i s_i)`. At evaluation it is the same as
//! `topk`, with the same cost.

use super::topk::TopK;
use super::{
    GradientCheck, LayerPass, Phase, Router, RouterInfo, Routing, chosen_by_kernel, registry,
};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::error::Result;
use crate::ops::dispatch::{Dispatch, Selection};
use crate::ops::routing::{Choice, Score, scores};
use crate::ops::straight_through::straight_through;
use crate::tape::{Tape, Var};
use serde::{Deserialize, Serialize};
use std::rc::Rc;

pub(super) const INFO: RouterInfo = RouterInfo {
    name: "densemixer",
    summary: "the output of topk; in training every expert runs, so that the router's gradient is \
              the dense one, straight through the choice",
    source: "DenseMixer, Yao et al. 2025, code yaof20/DenseMixer",
    cost: "E / K times the experts of topk in training, topk at evaluation",
    settings: &[(
        "renormalize",
        "whether the weights are divided by their sum over the chosen experts",
    )],
    check: GradientCheck {
        exact: false,
        exact_for_all_experts: true,
        ..GradientCheck::EXACT
    },
    build: registry::from_settings::<DenseMixer>,
};

/// Settings of `densemixer`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DenseMixer {
    /// Weights that sum to 1 over the chosen experts.
    pub renormalize: bool,
}

impl Router for DenseMixer {
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
        let chosen = layer.select(|| scores.choose())?;
        let gates = straight_through(tape, &scores.values, &chosen, self.renormalize)?;
        if layer.pass.phase == Phase::Evaluate {
            return Ok(Routing::new(gates, scores, chosen));
        }
        let selection = chosen.selection();
        let all = Selection::all(selection.num_tokens(), selection.num_experts());
        Ok(Routing {
            chosen: Some(chosen.clone()),
            ..Routing::new(gates, scores, Rc::new(Dispatch::new(all)))
        })
    }

    fn max_experts_per_token(&self, model: &ModelConfig) -> usize {
        model.num_experts
    }

    fn kept_score_tensors(&self) -> usize {
        2
    }

    fn equivalent_topk(&self) -> Option<TopK> {
        Some(TopK {
            renormalize: self.renormalize,
        })
    }

    fn weighs_by_softmax(&self) -> bool {
        !self.renormalize
    }
}
