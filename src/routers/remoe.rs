//! `remoe`: the positive logits are the weights, so a token may have any number of experts, including none. A
//! regulariser drives the mean number of experts to K.
//!
//! `p = ReLU(z)`, `y = Σ p_i e_i(x)`, 0 for a token without experts. For every MoE layer and micro-batch of T tokens,
//! of which n_i have `p_i > 0`, the loss gets the term `λ E / (K T²) Σ_i n_i Σ_t p_ti` with constant n, so that
//! `dz_i = 1[z_i>0] (s_i + λ E n_i / (K T²))`, 0 at z = 0 (2412.14711; its code, not its eq. 10, which has another 1
//! / L). n_i and T count the tokens of all ranks. There is one λ for the model: after every accepted step it is
//! multiplied by 1.2 if the mean sparsity, over MoE layers, micro-batches and ranks, was below `1 − K/E`, and divided
//! by 1.2 if it was above. Evaluation uses the same routing.

use super::{
    Balance, GradientCheck, LayerPass, LayerState, Router, RouterInfo, Routing, StateTensor,
    registry, within,
};
use crate::config::ModelConfig;
use crate::device::Device;
use crate::dist::Collective;
use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::layer_tally::{RemoeFractions, RemoeUpdate};
use crate::ops::balance::{auxiliary_loss, weighted_sum};
use crate::ops::dispatch::Dispatch;
use crate::ops::routing::{Choice, Score, scores};
use crate::ops::scores::on_selection;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use serde::{Deserialize, Serialize};

pub(super) const INFO: RouterInfo = RouterInfo {
    name: "remoe",
    summary: "ReLU of the logits as weights: any number of experts for a token, K of E on average \
              by an adaptive regulariser",
    source: "ReMoE, 2412.14711, code thu-ml/ReMoE",
    cost: "up to E / K times the experts of topk until the sparsity is reached, then topk on average",
    settings: &[
        ("initial_lambda", "initial weight of the regulariser"),
        (
            "lambda_factor",
            "factor by which the weight is multiplied or divided after a step",
        ),
    ],
    check: GradientCheck {
        exact: false, // it is not differentiable at some points within a difference step
        set: &["router.initial_lambda=0.5"],
        ..GradientCheck::EXACT
    },
    build: registry::from_settings::<ReMoe>,
};

/// The name of λ in checkpoints; every layer holds the same.
const LAMBDA: &str = "lambda";

/// Settings of `remoe`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReMoe {
    /// λ at the start.
    pub initial_lambda: f64,
    /// Factor by which λ is multiplied or divided after a step.
    pub lambda_factor: f64,
}

impl Default for ReMoe {
    fn default() -> Self {
        ReMoe {
            initial_lambda: 1e-8,
            lambda_factor: 1.2,
        }
    }
}

impl ReMoe {
    /// Updates λ of every layer with a kernel if the layers' loads are in device memory. Returns whether it did.
    fn updated_by_kernel(&self, top_k: usize, layers: &mut [LayerState]) -> Result<bool> {
        for layer in layers {
            let updated = layer.change_by_load(LAMBDA, |lambda, load, _| {
                let [layers, width] = [load.shape()[0], load.shape()[1]];
                let kernel = RemoeUpdate {
                    lambda: lambda.output()?,
                    load: load.input()?,
                    layers,
                    experts: width - 1,
                    top_k,
                    factor: self.lambda_factor,
                };
                kernel.launch(&Stream::of(load.device())?)
            })?;
            if !updated {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Returns λ n_i / (K T) in device memory, `[E]`. λ and the counts of all ranks are in device memory as well.
fn weighted_fractions(
    layer: &mut LayerPass<'_>,
    device: Device,
    dispatch: &Dispatch,
) -> Result<Tensor> {
    let selection = dispatch.selection();
    let experts = selection.num_experts();
    let mut fractions = Tensor::unspecified(device, DType::F32, [experts]);
    let own = &dispatch.maps(device)?.offsets;
    // The offsets of the experts are sums of counts, so they can be summed over the ranks, which have equally many
    // tokens.
    let all = layer.counted_by_all(own)?;
    let ranks = all.as_ref().map_or(1, |_| layer.dist.size());
    let slots = layer.top_k * selection.num_tokens() * ranks;
    let kernel = RemoeFractions {
        fractions: fractions.output()?,
        lambda: layer.state(LAMBDA).input()?,
        offsets: all.as_ref().unwrap_or(own).input()?,
        slots,
        experts,
    };
    kernel.launch(&Stream::of(device)?)?;
    Ok(fractions)
}

impl Router for ReMoe {
    fn validate(&self, _model: &ModelConfig) -> Result<()> {
        within("initial_lambda", self.initial_lambda, 0.0, None)?;
        within("lambda_factor", self.lambda_factor, 1.0, None)
    }

    fn initial_state(&self, _model: &ModelConfig, _layer: usize, _seed: u64) -> Vec<StateTensor> {
        vec![StateTensor {
            name: LAMBDA,
            start: Tensor::from_slice([1], &[self.initial_lambda]),
        }]
    }

    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let scores = scores(tape, x, weight, Score::Relu, Choice::none())?;
        let dispatch = layer.select(|| scores.positive())?;
        let selection = dispatch.selection();
        let gates = on_selection(tape, &scores.values, &dispatch)?;
        let device = x.tensor().device();
        if device != Device::Cpu {
            // On a device the router's kernels computed the gates ReLU(z) and their means.
            let fractions = weighted_fractions(layer, device, &dispatch)?;
            return Ok(Routing {
                penalty: Some(scores.auxiliary_loss(tape, &fractions)?),
                ..Routing::new(gates, scores, dispatch)
            });
        }
        // E Σ_i f_i mean_t(p_ti) with f_i = n_i / (K T).
        let own = selection.counts().into_iter().map(|n| n as f64);
        let mut counted: Vec<f64> = own.chain([selection.num_tokens() as f64]).collect();
        layer.sum_over_ranks(&mut counted)?;
        let held = layer.hold(|| Ok(vec![Tensor::from_slice([counted.len()], &counted)]))?;
        let (counts, tokens) = held[0].slice::<f64>().split_at(counted.len() - 1);
        let slots = layer.top_k as f64 * tokens[0];
        let fractions: Vec<f64> = counts.iter().map(|n| n / slots).collect();
        let fractions = Tensor::from_slice([fractions.len()], &fractions);
        let loss = auxiliary_loss(tape, &gates, &fractions)?;
        let lambda = layer.state(LAMBDA).item()?;
        let penalty = weighted_sum(tape, &[(&loss, lambda)])?;
        Ok(Routing {
            penalty: Some(penalty),
            ..Routing::new(gates, scores, dispatch)
        })
    }

    fn end_step(
        &self,
        model: &ModelConfig,
        layers: &mut [LayerState],
        dist: &dyn Collective,
    ) -> Result<()> {
        if self.updated_by_kernel(model.top_k, layers)? {
            return Ok(());
        }
        let mut sums = [0.0; 2];
        for (tokens, load) in layers.iter().map(LayerState::step_load) {
            sums[0] += load.iter().sum::<f64>();
            sums[1] += tokens;
        }
        dist.sum(&mut sums)?;
        // Sparsity is 1 − pairs / (E tokens): compared as integers, so that equality is exact.
        let (pairs, target) = (sums[0], model.top_k as f64 * sums[1]);
        let factor = if pairs > target {
            self.lambda_factor
        } else if pairs < target {
            1.0 / self.lambda_factor
        } else {
            1.0
        };
        for layer in layers {
            let lambda = layer.pending_mut(LAMBDA);
            with_real!(lambda.dtype(), "remoe", |T| {
                let value = &mut lambda.slice_mut::<T>()[0];
                *value = T::of(value.f64() * factor);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn balance(&self) -> Balance {
        Balance::Own
    }

    /// The number begins near E / 2 and may reach E.
    fn max_experts_per_token(&self, model: &ModelConfig) -> usize {
        model.num_experts
    }

    /// The number after the target sparsity is reached.
    fn mean_experts_per_token(&self, model: &ModelConfig) -> usize {
        model.top_k
    }

    fn kept_score_tensors(&self) -> usize {
        2
    }

    fn evaluation_reads(&self, _name: &str) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::SingleRank;
    use crate::ops::dispatch::Selection;
    use crate::ops::routing::Entropy;
    use crate::routers::{Pass, Phase};

    const EXPERTS: usize = 4;

    /// Two layers after one micro-batch; `chosen` has the number of experts of each token.
    fn layers(chosen: [&[usize]; 2]) -> Vec<LayerState> {
        let start = |value: f64| StateTensor {
            name: LAMBDA,
            start: Tensor::from_slice([1], &[value]),
        };
        let layer = |own: &&[usize]| {
            let selection =
                Selection::new(own.len(), EXPERTS, |t, c| c.extend(0..own[t] as i32)).unwrap();
            let mut state = LayerState::new(vec![start(0.5)]);
            let pass = Pass::single(Phase::Train);
            LayerPass::new(pass, &SingleRank, 0, 2, 0, &mut state, false)
                .count(&Dispatch::new(selection), Entropy::Sum(0.0), false)
                .unwrap();
            state
        };
        chosen.iter().map(layer).collect()
    }

    /// Returns λ of both layers after the end of a step with K = 2.
    fn lambda(chosen: [&[usize]; 2], dist: &dyn Collective) -> Vec<f64> {
        let mut layers = layers(chosen);
        let mut model = crate::config::Config::load(
            &crate::config::Layers::preset("tiny"),
            &crate::routers::resolve,
        )
        .unwrap()
        .model;
        model.top_k = 2;
        ReMoe::default()
            .end_step(&model, &mut layers, dist)
            .unwrap();
        let value = |l: &mut LayerState| {
            l.commit();
            l.tensors().next().unwrap().1.item().unwrap()
        };
        layers.iter_mut().map(value).collect()
    }

    #[test]
    fn lambda_follows_the_mean_sparsity_over_the_layers() {
        // Mean number of experts per token: 2.25, 1.75, 2.
        assert_eq!(lambda([&[4, 4], &[1, 0]], &SingleRank), [0.6, 0.6]);
        let less = [0.5 * (1.0 / 1.2); 2];
        assert_eq!(lambda([&[3, 3], &[1, 0]], &SingleRank), less);
        assert_eq!(lambda([&[4, 4], &[0, 0]], &SingleRank), [0.5, 0.5]);
    }

    /// This rank, and another one that has these sums.
    struct WithAnother([f64; 2]);

    impl Collective for WithAnother {
        fn rank(&self) -> usize {
            0
        }
        fn size(&self) -> usize {
            2
        }
        fn sum(&self, values: &mut [f64]) -> Result<()> {
            values.iter_mut().zip(self.0).for_each(|(v, o)| *v += o);
            Ok(())
        }
        fn all_gather(&self, _own: &[u8], _all: &mut [u8]) -> Result<()> {
            unreachable!("the router only sums")
        }
        fn exchange(&self, _own: &[u8], _all: &mut [u8]) -> Result<()> {
            unreachable!("the router only sums")
        }
        fn leave(&self, _why: &str) {}
    }

    #[test]
    fn the_counts_of_the_other_ranks_are_included() {
        // This rank has 7 pairs for 4 tokens, too few; the other rank has 10 for 4.
        let other = WithAnother([10.0, 4.0]);
        assert_eq!(lambda([&[3, 3], &[1, 0]], &other), [0.6, 0.6]);
    }
}
