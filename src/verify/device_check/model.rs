//! Directional derivatives of a whole model's loss on the simulator, choices and default vectors held.
//!
//! Each parameter is moved back and forth along its own gradient, so far that the loss should change by
//! [`CHANGE`]. A gradient that lacks a term predicts another change; to see that the check notices, a fault
//! is planted in gradients of the CPU's, which then stand for the kernels'.

use super::{Directional, is_router, norm, random_batch, rounded};
use crate::config::{Config, Layers};
use crate::device::Device;
use crate::dist::SingleRank;
use crate::error::Result;
use crate::model::Model;
use crate::model::batch::Batch;
use crate::routers::{self, Pass, Phase, Surrogate};
use crate::tape::check::normal_numbers;
use crate::tape::{Gradients, Tape};
use crate::tensor::Tensor;
use crate::verify::fault::Fault;

/// The largest relative error of a directional derivative of the loss that passes. The loss of the check's
/// 120 tokens is uncertain by some 0.001 nats, since activations that moved are rounded to bf16 anew: 1% of
/// `CHANGE`. The gradient itself is within 1% of the CPU's ([`TOLERANCE`](super::TOLERANCE)) for the same
/// reason. The rest is for the curvature along the movement; the largest error seen is 3.5%. A missing term is
/// worth more.
pub const MODEL_TOLERANCE: f64 = 0.04;

/// What the loss should change by between the two ends of a movement, in nats, …
const CHANGE: f64 = 0.1;

/// … which is no longer than this share of the parameter's length to either side.
const LONGEST: f64 = 0.1;

const SEQUENCES: usize = 5;

/// Every balance loss on, so that every term is seen.
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

/// What is set in the models that are checked, beside the router's defaults.
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

/// Every expert chosen, of the four of the models that are checked.
const ALL_EXPERTS: &str = "model.top_k=4";

/// A model to check: its router, and what is set.
pub struct ModelCheck {
    pub router: &'static str,
    pub set: Vec<&'static str>,
    surrogate: Option<Surrogate>,
}

/// A model of every router, and one of every option.
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
    /// Router and settings.
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

    /// The model with random bf16 numbers, the rows of matrices of unit scale; with the surrogate, if the router has one,
    /// whose derivative its estimate is.
    fn model(&self, device: Device) -> Result<Model> {
        let config = self.config(device)?;
        let mut model = match self.surrogate {
            Some(surrogate) => {
                let router = surrogate(&config.router)?;
                Model::with_router(&config, router, Box::new(SingleRank))?
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

    /// The derivatives along every parameter's gradient; predicted by gradients with `fault`, if there is one.
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
            let (name, shape) = (parameter.name.clone(), parameter.value.shape());
            let (exact, start) = (is_router(&name), parameter.value.to_f64()?);
            let (length, slope) = (norm(&start), norm(&gradient));
            let step = (CHANGE / (2.0 * slope * slope)).min(LONGEST * length / slope);
            let moved = |sign: f64| -> Vec<f32> {
                let pairs = start.iter().zip(&gradient);
                let moved: Vec<f32> = pairs.map(|(s, g)| (s + sign * step * g) as f32).collect();
                if exact { moved } else { rounded(&moved) }
            };
            let (up, down) = (moved(1.0), moved(-1.0));
            let predicting = match &faulty {
                Some(store) => match store.get(i) {
                    Some(gradient) => gradient.to_f64()?,
                    None => vec![0.0; start.len()],
                },
                None => gradient,
            };
            let movement = up
                .iter()
                .zip(&down)
                .map(|(u, d)| f64::from(*u) - f64::from(*d));
            let predicted = movement.zip(&predicting).map(|(m, g)| m * g).sum();
            let mut at = |values: &[f32]| -> Result<f64> {
                let old = model.parameters[i].value.clone();
                let moved = Tensor::from_slice(shape, values);
                model.parameters[i].value.set(&moved);
                let value = loss(&model, &batch, Phase::Frozen, None);
                model.parameters[i].value = old;
                value
            };
            found.push(Directional {
                input: name,
                predicted,
                found: at(&up)? - at(&down)?,
            });
        }
        Ok(found)
    }

    /// The CPU's gradients with a term left out, of the choices that `model` made.
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

/// The loss of a batch, and its gradients.
fn loss(model: &Model, batch: &Batch, phase: Phase, store: Option<&mut Gradients>) -> Result<f64> {
    let (tape, weights) = (Tape::new(), model.weights());
    let losses = model.loss(&tape, &weights, batch.all(), Pass::single(phase))?;
    let value = losses.total.tensor().item()?;
    if let Some(store) = store {
        tape.backward(&losses.total, 1.0, store)?;
    }
    Ok(value)
}
