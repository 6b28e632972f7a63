//! `dense`: every expert runs for every token, `y = Σ_i p_i e_i(x)`.
//!
//! The gradient is exact; the cost is E / K times that of `topk`. It is the upper bound that Default MoE
//! approximates, and the reference of the gradient analyses. The auxiliary loss would be a constant and is left out.

use super::{Balance, GradientCheck, LayerPass, Router, RouterInfo, Routing, registry};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::ops::routing::{Choice, Score, scores};
use crate::tape::{Tape, Var};
use serde::{Deserialize, Serialize};

pub(super) const INFO: RouterInfo = RouterInfo {
    name: "dense",
    summary: "every expert on every token: the exact router gradient",
    source: "Default MoE, 2504.12463, section 3",
    cost: "E / K times the experts of topk",
    settings: &[],
    check: GradientCheck::EXACT,
    build: registry::from_settings::<Dense>,
};

/// `dense` has no settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dense {}

impl Router for Dense {
    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let scores = scores(tape, x, weight, Score::Softmax, Choice::none())?;
        let dispatch = layer.select(|| scores.all())?;
        Ok(Routing::new(scores.values.clone(), scores, dispatch))
    }

    fn balance(&self) -> Balance {
        Balance::None
    }

    fn max_experts_per_token(&self, model: &ModelConfig) -> usize {
        model.num_experts
    }

    fn weighs_by_softmax(&self) -> bool {
        true
    }

    fn evaluates_all_experts(&self) -> bool {
        true
    }
}
