//! Complete optimizer steps of a preset.

use crate::config::{Config, Layers, count};
use crate::device::Device;
use crate::error::Result;
use crate::routers;
use crate::train::Trainer;
use serde_json::{Value, json};

/// Complete training steps.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Name of the preset.
    pub preset: &'static str,
    /// Experts and active experts, as for `--experts`.
    pub experts: &'static str,
    /// Names of the routers.
    pub routers: &'static [&'static str],
    /// Number of sequences per step; the micro-batch is that of the preset.
    pub sequences: usize,
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

/// Returns the FLOPs of a step: 6 per parameter and token, plus the causal half of attention, without recomputation.
///
/// # Errors
/// When the preset does not exist.
pub fn flops(step: &Step, router: &str) -> Result<f64> {
    let model = config(step, router)?.model;
    let tokens = step.sequences * model.sequence_length;
    Ok(count::flops_per_token(&model) as f64 * tokens as f64)
}

/// Returns the model and its steps as JSON, for implementations in other languages.
///
/// # Errors
/// When the preset does not exist.
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

/// Returns a trainer before its first step.
///
/// # Errors
/// When the model does not fit the device.
pub fn training(step: &Step, router: &str, device: Device) -> Result<Trainer> {
    let mut config = config(step, router)?;
    config.train.device = device;
    // The time of a step with non-finite values is not a valid measurement.
    config.train.max_skipped_steps = 1;
    Trainer::new(config)
}
