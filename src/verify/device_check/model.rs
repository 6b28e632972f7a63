//! Directional derivatives of a complete model's loss on the simulator, with fixed choices and default vectors.
//!
//! Each parameter is moved in both directions along its gradient, so far that the loss should change by [`CHANGE`]. A
//! gradient that lacks a term predicts a different change. To show that the check detects this, a fault can be planted in
//! gradients that the CPU computes, which then replace those of the kernels.

use super::{Directional, ends_of_movement, is_router, norm, random_batch, with_value};
use crate::config::{Config, Layers};
use crate::device::Device;
use crate::dist::SingleRank;
use crate::error::Result;
use crate::model::Model;
use crate::model::batch::Batch;
use crate::routers::{self, Pass, Phase, Surrogate};
use crate::tape::check::normal_numbers;
use crate::tape::{Gradients, Tape};
use crate::verify::fault::Fault;
use std::sync::Arc;

/// The largest relative error of a directional derivative of the loss that passes the check. The loss of the check's 120
/// tokens has an uncertainty of about 0.001 nats, since activations are rounded to bf16 again after a movement: this is 1%
/// of `CHANGE`. For the same reason the gradient itself is within 1% of the CPU's ([`TOLERANCE`](super::TOLERANCE)). The
/// rest is for the curvature along the movement; the largest observed error is 3.5%. A missing term causes a larger error.
pub const MODEL_TOLERANCE: f64 = 0.04;

/// Intended change of the loss between the two ends of a movement, in nats.
const CHANGE: f64 = 0.1;

/// Longest movement to either side, as a share of the parameter's norm.
const LONGEST: f64 = 0.1;

const SEQUENCES: usize = 5;

/// All balance losses are enabled, so that every term has an effect.
const SMALL: &[&str] = &[
    "model.vocab_size=64",
    "model.hidden=64",
    "model.heads=2",
    "model.head_dim=64",
    "model.layers=2",
    "model.dense_layers=[0]",
    "model.num_experts=4",
    "model.top_k=2",
    "model.expert_ffn_width=48",
    "model.dense_ffn_width=48",
    "model.sequence_length=24",
    "balance.aux_coefficient=1",
    "balance.z_coefficient=0.02",
];

/// Settings of the checked models, in addition to the router's defaults.
const OPTIONS: &[&[&str]] = &[
    &["model.norm=\"layernorm\"", "model.qkv_bias=true"],
    &[
        "model.kv_heads=1",
        "model.qk_norm=\"head\"",
        "model.shared_expert_width=40",
    ],
    &[
        "model.qk_norm=\"full\"",
        "train.recompute=true",
        "router.pass_forward=false",
        "data.document_boundaries=true",
    ],
];

/// All four experts of the checked models are chosen.
const ALL_EXPERTS: &str = "model.top_k=4";

/// A model to check: its router and settings.
pub struct ModelCheck {
    /// Name of the router.
    pub router: &'static str,
    /// Entries KEY=VALUE that change the configuration.
    pub set: Vec<&'static str>,
    surrogate: Option<Surrogate>,
}

/// Returns a model for every router, and one for every option.
pub fn model_checks() -> Vec<ModelCheck> {
    let plain = routers::all().into_iter().map(|info| {
        let all = info.check.exact_for_all_experts.then_some(ALL_EXPERTS);
        ModelCheck {
            router: info.name,
            set: info.check.set.iter().copied().chain(all).collect(),
            surrogate: info.check.surrogate,
        }
    });
    let options = OPTIONS.iter().map(|set| ModelCheck {
        router: "default",
        set: set.to_vec(),
        surrogate: None,
    });
    plain.chain(options).collect()
}

impl ModelCheck {
    /// Returns the name, which consists of router and settings.
    pub fn name(&self) -> String {
        [&["model", self.router], &self.set[..]].concat().join(" ")
    }

    fn config(&self, device: Device) -> Result<Config> {
        let mut layers = Layers::preset("tiny");
        let set = SMALL.iter().chain(&self.set);
        layers.set = set.map(|s| s.to_string()).collect();
        layers.set.push(format!("router.name={}", self.router));
        let mut config = Config::load(&layers, &routers::resolve)?;
        config.train.device = device;
        Ok(config)
    }

    /// Returns the model with random bf16 weights, with matrix rows of unit scale. If the router's gradient is that of a
    /// surrogate, the model uses the surrogate.
    fn model(&self, device: Device) -> Result<Model> {
        let config = self.config(device)?;
        let mut model = match self.surrogate {
            Some(surrogate) => {
                let router = surrogate(&config.router)?;
                Model::with_router(&config, router, Arc::new(SingleRank))?
            }
            None => Model::new(&config)?,
        };
        for (i, p) in model.parameters.iter_mut().enumerate() {
            let shape = p.value.shape();
            let (kept, spread) = match shape.len() {
                1 => (1.0, 0.25),
                _ if p.name.contains("embed") => (0.0, 1.0),
                _ => (0.0, 1.0 / (shape.width() as f32).sqrt()),
            };
            let numbers = normal_numbers(shape.elements(), 500 + i as u64);
            p.value.change(|value| {
                let values = value.slice_mut::<f32>().iter_mut().zip(numbers);
                values.for_each(|(w, x)| *w = kept * *w + spread * x as f32);
            });
            p.value.round_to_bf16();
        }
        Ok(model)
    }

    fn batch(&self) -> Result<Batch> {
        Ok(random_batch(&self.config(Device::Sim)?, SEQUENCES))
    }

    /// Computes the derivatives along every parameter's gradient. With `fault`, the gradients lack the term.
    ///
    /// # Errors
    /// When the model cannot run.
    pub fn run(&self, fault: Option<Fault>) -> Result<Vec<Directional>> {
        let mut model = self.model(Device::Sim)?;
        let batch = self.batch()?;
        let mut store = Gradients::new(model.parameters.len());
        model.layer_states_mut().iter_mut().for_each(|s| s.record());
        loss(&model, &batch, Phase::Train, None)?;
        loss(&model, &batch, Phase::Frozen, Some(&mut store))?;
        let faulty = fault.map(|f| self.faulty(&model, f)).transpose()?;
        let mut found = Vec::new();
        for i in 0..model.parameters.len() {
            let Some(gradient) = store.get(i) else {
                continue;
            };
            let gradient = gradient.to_f64()?;
            let parameter = &model.parameters[i];
            let (name, start) = (parameter.name.clone(), parameter.value.to_f64()?);
            let exact = is_router(&name);
            let (length, slope) = (norm(&start), norm(&gradient));
            let step = (CHANGE / (2.0 * slope * slope)).min(LONGEST * length / slope);
            let ends = ends_of_movement(&start, &gradient, step, exact);
            let predicting = match &faulty {
                Some(store) => match store.get(i) {
                    Some(gradient) => gradient.to_f64()?,
                    None => vec![0.0; start.len()],
                },
                None => gradient,
            };
            let value = |values: &[f32]| {
                let of = |model: &Model| loss(model, &batch, Phase::Frozen, None);
                with_value(&mut model, i, values, of)
            };
            found.push(Directional::of(name, ends, &predicting, value)?);
        }
        Ok(found)
    }

    /// Returns the CPU's gradients without a term, for the choices that `model` made.
    fn faulty(&self, model: &Model, fault: Fault) -> Result<Gradients> {
        let on_cpu = self.model(Device::Cpu)?;
        let mut recorded = model.layer_states_mut();
        for (own, other) in on_cpu
            .layer_states_mut()
            .iter_mut()
            .zip(recorded.iter_mut())
        {
            own.replay(&other.take_record());
        }
        let mut store = Gradients::new(on_cpu.parameters.len());
        loss(&on_cpu, &self.batch()?, Phase::Train, None)?;
        let _guard = fault.inject();
        loss(&on_cpu, &self.batch()?, Phase::Frozen, Some(&mut store))?;
        Ok(store)
    }
}

/// Returns the loss of a batch, and its gradients.
fn loss(model: &Model, batch: &Batch, phase: Phase, store: Option<&mut Gradients>) -> Result<f64> {
    let (tape, weights) = (Tape::new(), model.weights());
    let losses = model.loss(&tape, &weights, batch.all(), Pass::single(phase))?;
    let value = losses.total.tensor().item()?;
    if let Some(store) = store {
        tape.backward(&losses.total, 1.0, store)?;
    }
    Ok(value)
}
