//! `lossfree`: loads are balanced by a bias that affects only the choice of experts, without an auxiliary loss.
//!
//! `A = TopK(score + b)`; the weights are the scores of A: softmax p, or sigmoid σ, renormalised over A or not.
//! Softmax: gradients as `topk`. Sigmoid: `dz_j = 1[j∈A] σ_j (1 − σ_j) s_j`, renormalised `w = σ / Σ_A σ`:
//! `dz_j = 1[j∈A] w_j (1 − σ_j) (s_j − Σ_A w_i s_i)`. b gets no gradient. Once per accepted optimizer step, over the
//! whole global batch: `b_i ← b_i + u sign(mean count − count_i)`, sign(0) = 0 (2408.15664, algorithm 1). b is
//! initially 0, is not centred, and does not change at evaluation.

use super::{
    Balance, GradientCheck, LayerPass, LayerState, Router, RouterInfo, Routing, StateTensor,
    chosen_by_kernel, learns_renormalized, registry, within,
};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::kernels::Stream;
use crate::kernels::layer_tally::LossfreeUpdate;
use crate::ops::routing::{Choice, Score, scores};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use serde::{Deserialize, Serialize};

pub(super) const INFO: RouterInfo = RouterInfo {
    name: "lossfree",
    summary: "topk of score + bias, the bias moved against each expert's load after every step; no \
              auxiliary loss",
    source: "Loss-Free Balancing, 2408.15664",
    cost: "topk, and E numbers a layer",
    settings: &[
        ("score", "\"sigmoid\", as in the source, or \"softmax\""),
        (
            "renormalize",
            "whether the weights are divided by their sum over the chosen experts; requires K of 2 or more",
        ),
        ("update_rate", "u, the change of the bias in a step"),
    ],
    check: GradientCheck::EXACT,
    build: registry::from_settings::<LossFree>,
};

/// The name of b in checkpoints, the same as in published models that use this method.
pub const BIAS: &str = "gate.e_score_correction_bias";

/// Settings of `lossfree`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossFree {
    /// Sigmoid or softmax of the logits.
    pub score: Score,
    /// Weights that sum to 1 over the chosen experts; needs K ≥ 2.
    pub renormalize: bool,
    /// The amount by which the bias changes in a step.
    pub update_rate: f64,
}

impl Default for LossFree {
    fn default() -> Self {
        LossFree {
            score: Score::Sigmoid,
            renormalize: false,
            update_rate: 1e-3,
        }
    }
}

impl LossFree {
    /// Updates the bias with a kernel if the layer's load is in device memory. Returns whether it did.
    fn updated_by_kernel(&self, layer: &mut LayerState) -> Result<bool> {
        layer.change_by_load(BIAS, |bias, load, first| {
            let experts = bias.elements();
            let kernel = LossfreeUpdate {
                bias: bias.output()?,
                load: load.input()?.from_element(first),
                experts,
                rate: self.update_rate as f32,
            };
            kernel.launch(&Stream::of(load.device())?)
        })
    }
}

impl Router for LossFree {
    fn validate(&self, model: &ModelConfig) -> Result<()> {
        within("update_rate", self.update_rate, 0.0, None)?;
        if !matches!(self.score, Score::Softmax | Score::Sigmoid) {
            return Err(Error::usage(
                "router.score",
                "\"softmax\" or \"sigmoid\"",
                format!("{:?}", self.score).to_lowercase(),
                "change it with --set router.score=…",
            ));
        }
        if self.renormalize {
            learns_renormalized(model)?;
        }
        Ok(())
    }

    fn validate_device(&self, model: &ModelConfig, device: Device) -> Result<()> {
        chosen_by_kernel(model, device)
    }

    fn initial_state(&self, model: &ModelConfig, _layer: usize, _seed: u64) -> Vec<StateTensor> {
        vec![StateTensor {
            name: BIAS,
            start: Tensor::zeros(Device::Cpu, DType::F64, [model.num_experts]),
        }]
    }

    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let choice = Choice {
            top_k: layer.top_k,
            bias: Some(layer.state(BIAS).clone()),
        };
        let scores = scores(tape, x, weight, self.score, choice)?;
        let routing = Routing::by_scores(scores, layer)?;
        if self.renormalize {
            return routing.renormalized(tape);
        }
        Ok(routing)
    }

    fn end_step(
        &self,
        _model: &ModelConfig,
        layers: &mut [LayerState],
        dist: &dyn Collective,
    ) -> Result<()> {
        for layer in layers {
            if self.updated_by_kernel(layer)? {
                continue;
            }
            let (_, mut counts) = layer.step_load();
            dist.sum(&mut counts)?;
            let mean = counts.iter().sum::<f64>() / counts.len() as f64;
            let bias = layer.pending_mut(BIAS);
            with_real!(bias.dtype(), "lossfree", |T| {
                for (b, count) in bias.slice_mut::<T>().iter_mut().zip(&counts) {
                    let sign = f64::from(mean > *count) - f64::from(mean < *count);
                    *b += T::of(self.update_rate * sign);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn balance(&self) -> Balance {
        Balance::None
    }

    fn kept_score_tensors(&self) -> usize {
        1 + usize::from(self.renormalize)
    }
}
