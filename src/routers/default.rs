//! `default`: Default MoE. TopK routing in which every expert that did not run is stood in for by a
//! moving average of its outputs, so that the router learns about all experts from every token.
//!
//! `y = Σ_A p_i e_i(x) + Σ_{i∉A} p_i ê_i` (2504.12463, eq. 11); with `v_i = e_i(x)` on A and ê_i off
//! it, `s_i = ⟨g, v_i⟩`: `dz_j = p_j (s_j − Σ_all p_i s_i)`. ê is a constant in backward; it is
//! updated before use, `ê_i ← β ê_i + (1 − β) m_i` (eq. 10), m_i the mean of e_i over the tokens that
//! chose i. With n micro-batches each updates with β^(1/n), so that β is per optimizer step.

use super::topk::TopK;
use super::{
    GradientCheck, LayerPass, Phase, Router, RouterInfo, Routing, StateTensor, registry, within,
};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::dist::at;
use crate::error::Result;
use crate::ops::combine::Defaults;
use crate::ops::expert_mean::{ExpertSums, Weighting};
use crate::ops::routing::{Choice, Score, scores};
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

impl Router for DefaultMoe {
    fn validate(&self, _model: &ModelConfig) -> Result<()> {
        within("beta", self.beta, 0.0, Some(1.0))?;
        within("init_std", self.init_std, 0.0, None)
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
        Some(match (self.weighted, self.weight_norm) {
            (false, _) => Weighting::Plain,
            (true, WeightNorm::SumP) => Weighting::BySumOfProbabilities,
            (true, WeightNorm::Count) => Weighting::ByCount,
        })
    }

    fn defaults(
        &self,
        sums: Option<ExpertSums>,
        layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        if let Some(sums) = sums {
            at(layer.dist, || format!("ê of MoE layer {}", layer.layer));
            let sums = sums.over_ranks(|tensor| layer.sum_tensor(tensor))?;
            let beta = self.beta.powf(1.0 / layer.pass.micro_batches as f64);
            sums.update(layer.state_mut(VECTORS), beta)?;
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
mod tests {
    use super::*;
    use crate::dist::SingleRank;
    use crate::ops::combine::combine;
    use crate::routers::{LayerState, Pass};
    use crate::tape::Gradients;
    use std::rc::Rc;

    /// What one training pass gave: y, ê after it, dz, de.
    struct Outcome {
        y: Vec<f64>,
        vectors: Vec<f64>,
        dz: Vec<f64>,
        de: Vec<f64>,
    }

    /// Three tokens, three experts, K = 1, D = 2, β = 1/2.
    ///
    /// z = ln (2, 1, 1), ln (1, 3, 4), ln (6, 1, 1), so p = (1/2, 1/4, 1/4), (1/8, 3/8, 1/2),
    /// (3/4, 1/8, 1/8): tokens 0 and 2 choose expert 0, token 1 expert 2, none expert 1.
    /// Outputs e_0(x_0) = (4, 0), e_0(x_2) = (0, 8), e_2(x_1) = (0, 8).
    /// At the start ê_0 = (2, 0), ê_1 = (1, 1), ê_2 = (0, 4).
    /// Incoming gradients g_0 = (1, 2), g_1 = (−1, 1), g_2 = (2, 0).
    fn worked(router: DefaultMoe) -> Outcome {
        let ln = |row: [f64; 3]| row.map(f64::ln);
        let z = [
            ln([2.0, 1.0, 1.0]),
            ln([1.0, 3.0, 4.0]),
            ln([6.0, 1.0, 1.0]),
        ]
        .concat();
        let z = Var::leaf(Tensor::from_slice([3, 3], &z), 0);
        // Rows sorted by expert: (expert 0, token 0), (expert 0, token 2), (expert 2, token 1).
        let e = Var::leaf(
            Tensor::from_slice([3, 2], &[4.0, 0.0, 0.0, 8.0, 0.0, 8.0]),
            1,
        );
        let start = Tensor::from_slice([3, 2], &[2.0, 0.0, 1.0, 1.0, 0.0, 4.0]);
        let mut state = LayerState::new(vec![StateTensor {
            name: VECTORS,
            start,
        }]);

        let (tape, mut store) = (Tape::new(), Gradients::new(2));
        let pass = Pass::single(Phase::Train);
        let mut layer = LayerPass::new(pass, &SingleRank, 0, 1, 0, &mut state, false);
        // With the identity as the router's weight the logits are the layer's input.
        let identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        let weight = Var::constant(Tensor::from_slice([3, 3], &identity));
        let routing = router.route(&tape, &z, &weight, &mut layer).unwrap();
        let (gates, weighting) = (routing.gates.tensor(), router.weighting().unwrap());
        let sums = ExpertSums::of_rows(e.tensor(), gates, weighting, &routing.dispatch).unwrap();
        let defaults = router.defaults(Some(sums), &mut layer).unwrap();
        let y = combine(
            &tape,
            &routing.gates,
            &e,
            defaults,
            &Rc::clone(&routing.dispatch),
        )
        .unwrap();
        let g = Tensor::from_slice([3, 2], &[1.0, 2.0, -1.0, 1.0, 2.0, 0.0]);
        tape.backward_from(&[(&y, g)], &mut store).unwrap();
        state.commit();
        let vectors = state.tensors().next().map(|(_, t)| t.to_f64().unwrap());
        Outcome {
            y: y.tensor().to_f64().unwrap(),
            vectors: vectors.unwrap(),
            dz: store.get(0).unwrap().to_f64().unwrap(),
            de: store.get(1).unwrap().to_f64().unwrap(),
        }
    }

    fn half() -> DefaultMoe {
        DefaultMoe {
            beta: 0.5,
            ..Default::default()
        }
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 1e-14, "{found:?}, expected {expected:?}");
        }
    }

    #[test]
    fn the_moving_average_worked_by_hand_in_every_weighting() {
        // Weighted: m_0 = (1/2 (4, 0) + 3/4 (0, 8)) / (1/2 + 3/4) = (2, 6) / 1.25 = (1.6, 4.8),
        // ê_0 = ((2, 0) + (1.6, 4.8)) / 2 = (1.8, 2.4); ê_1 stays; ê_2 = ((0, 4) + (0, 8)) / 2.
        assert_close(&worked(half()).vectors, &[1.8, 2.4, 1.0, 1.0, 0.0, 6.0]);
        // Plain: m_0 = ((4, 0) + (0, 8)) / 2 = (2, 4), ê_0 = (2, 2).
        let plain = DefaultMoe {
            weighted: false,
            ..half()
        };
        assert_close(&worked(plain).vectors, &[2.0, 2.0, 1.0, 1.0, 0.0, 6.0]);
        // By count: m_0 = (2, 6) / 2 = (1, 3), ê_0 = (1.5, 1.5); m_2 = 1/2 (0, 8), ê_2 = (0, 4).
        let count = DefaultMoe {
            weight_norm: WeightNorm::Count,
            ..half()
        };
        assert_close(&worked(count).vectors, &[1.5, 1.5, 1.0, 1.0, 0.0, 4.0]);
    }

    #[test]
    fn the_output_worked_by_hand_uses_the_updated_average() {
        // y_0 = 1/2 (4, 0) + 1/4 (1, 1) + 1/4 (0, 6),
        // y_1 = 1/8 (1.8, 2.4) + 3/8 (1, 1) + 1/2 (0, 8),
        // y_2 = 3/4 (0, 8) + 1/8 (1, 1) + 1/8 (0, 6).
        assert_close(&worked(half()).y, &[2.25, 1.75, 0.6, 4.675, 0.125, 6.875]);
    }

    #[test]
    fn the_gradients_worked_by_hand() {
        // Token 0: s = (⟨g, e_0⟩, ⟨g, ê_1⟩, ⟨g, ê_2⟩) = (4, 3, 12), Σ p s = 5.75,
        //   dz = (1/2 (4 − 5.75), 1/4 (3 − 5.75), 1/4 (12 − 5.75)).
        // Token 1: s = (0.6, 0, 8), Σ p s = 4.075,
        //   dz = (1/8 (0.6 − 4.075), 3/8 (0 − 4.075), 1/2 (8 − 4.075)).
        // Token 2: s = (0, 2, 0), Σ p s = 0.25, dz = (3/4 (−0.25), 1/8 (1.75), 1/8 (−0.25)).
        let found = worked(half());
        assert_close(
            &found.dz,
            &[
                -0.875, -0.6875, 1.5625, -0.434375, -1.528125, 1.9625, -0.1875, 0.21875, -0.03125,
            ],
        );
        // de = p g of the expert that ran: 1/2 (1, 2), 3/4 (2, 0), 1/2 (−1, 1).
        assert_close(&found.de, &[0.5, 1.0, 1.5, 0.0, -0.5, 0.5]);
    }

    #[test]
    fn without_pass_forward_the_output_is_that_of_topk_and_the_gradient_stays_dense() {
        let found = worked(DefaultMoe {
            pass_forward: false,
            ..half()
        });
        // y_t = p e of the chosen expert.
        assert_close(&found.y, &[2.0, 0.0, 0.0, 4.0, 0.0, 6.0]);
        assert_close(&found.dz, &worked(half()).dz);
    }
}
