//! Whole optimizer steps of a preset.

use super::case::Step;
use crate::config::{Config, Layers, count};
use crate::data::Corpus;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::routers;
use crate::step::Trainer;
use serde_json::{Value, json};

/// A model and its next step.
pub struct Training {
    model: Model,
    trainer: Trainer,
    corpus: Corpus,
    sequences: usize,
    micro_batch: usize,
    step: u64,
}

fn config(step: &Step, router: &str) -> Result<Config> {
    let mut layers = Layers::preset(step.preset);
    layers.experts = Some(step.experts.into());
    layers.set = vec![
        format!("router.name=\"{router}\""),
        format!("train.sequences_per_step={}", step.sequences),
    ];
    Config::load(&layers, &routers::resolve)
}

/// Of a step: 6 a parameter and token, the causal half of attention, nothing recomputed.
///
/// # Errors
/// When the preset is not known.
pub fn flops(step: &Step, router: &str) -> Result<f64> {
    let model = config(step, router)?.model;
    let tokens = step.sequences * model.sequence_length;
    Ok(count::flops_per_token(&model) as f64 * tokens as f64)
}

/// The model and its steps, for implementations in other languages.
///
/// # Errors
/// When the preset is not known.
pub fn sizes(step: &Step) -> Result<Value> {
    let Config { model, train, .. } = config(step, "topk")?;
    Ok(json!({
        "work": "step", "preset": step.preset, "routers": step.routers, "sequences": step.sequences,
        "micro_batch": train.micro_batch, "sequence": model.sequence_length, "vocabulary": model.vocab_size,
        "hidden": model.hidden, "layers": model.layers, "heads": model.heads, "norm": model.norm,
        "dense_ffn": model.dense_ffn_width, "ffn": model.expert_ffn_width, "experts": model.num_experts,
        "top_k": model.top_k,
    }))
}

impl Training {
    /// # Errors
    /// When the model does not fit the device.
    pub fn new(step: &Step, router: &str, device: Device) -> Result<Self> {
        let (mut config, sequences) = (config(step, router)?, step.sequences);
        config.train.device = device;
        let model = Model::new(&config)?;
        Ok(Training {
            trainer: Trainer::new(&config.train, &model),
            model,
            corpus: Corpus::load(&config.data, &config.model, 0)?,
            sequences,
            micro_batch: config.train.micro_batch,
            step: 0,
        })
    }

    /// The next one.
    ///
    /// # Errors
    /// Those of a step, and when a number in it was not finite.
    pub fn step(&mut self) -> Result<()> {
        let first = self.step * self.sequences as u64;
        let batch = self.corpus.sequences(first..first + self.sequences as u64);
        let parts: Vec<_> = batch.chunks(self.micro_batch).collect();
        let report = self.trainer.step(&mut self.model, &parts, 1e-3)?;
        self.step += 1;
        match report.refused {
            None => Ok(()),
            Some(what) => Err(Error::NonFinite {
                what,
                help: "report this as a bug: the step is of a preset".into(),
            }),
        }
    }
}
