//! Checks the values of a configuration. Every error names the key, the value and the values that are allowed.

use super::{Config, ModelConfig, Precision, Recompute};
use crate::device::Device;
use crate::error::{Error, Result};
use std::fmt::Display;

/// Upper bound of every size, far larger than any model needs: the product of four such sizes fits in 128 bits.
const MOST: usize = 1 << 24;

fn ensure(ok: bool, key: &str, expected: impl Into<String>, got: impl Display) -> Result<()> {
    if ok {
        return Ok(());
    }
    Err(Error::usage(
        key,
        expected,
        got.to_string(),
        format!("change it with --set {key}=…"),
    ))
}

fn positive(key: &str, value: usize) -> Result<()> {
    ensure(value > 0, key, "at least 1", value)
}

/// Checks that `low <= value <= high` and that the value is finite.
fn within(key: &str, value: f64, low: f64, high: f64) -> Result<()> {
    let ok = value >= low && value <= high && value.is_finite();
    let expected = if high == f64::MAX {
        format!("a finite number from {low} up")
    } else {
        format!("a number from {low} to {high}")
    };
    ensure(ok, key, expected, value)
}

fn above_zero(key: &str, value: f64) -> Result<()> {
    // Some computations use f32, in which a smaller number is 0.
    let ok = value as f32 > 0.0 && (value as f32).is_finite();
    ensure(
        ok,
        key,
        "a finite number above 0 that an f32 holds, 1.5e-45 to 3.4e38",
        format!("{value:e}"),
    )
}

impl Config {
    /// Checks all values.
    ///
    /// # Errors
    /// When a value is not valid, or does not fit the others.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.validate_train()?;
        let b = &self.balance;
        within("balance.aux_coefficient", b.aux_coefficient, 0.0, f64::MAX)?;
        within("balance.z_coefficient", b.z_coefficient, 0.0, f64::MAX)?;
        let share = self.data.validation_fraction;
        ensure(
            share > 0.0 && share < 1.0,
            "data.validation_fraction",
            "a number between 0 and 1",
            share,
        )?;
        for part in &self.data.mix {
            above_zero("data.mix", part.weight)?;
        }
        ensure(
            self.data.sources().all(|source| !source.is_empty()),
            "data.source",
            "\"embedded\" or a path",
            "an empty string",
        )
    }

    fn validate_train(&self) -> Result<()> {
        let t = &self.train;
        ensure(
            t.steps > 0 && t.steps <= u64::from(u32::MAX),
            "train.steps",
            format!("1 to {}", u32::MAX),
            t.steps,
        )?;
        positive("train.sequences_per_step", t.sequences_per_step)?;
        ensure(
            t.sequences_per_step <= MOST,
            "train.sequences_per_step",
            format!("at most {MOST}"),
            t.sequences_per_step,
        )?;
        positive("train.micro_batch", t.micro_batch)?;
        ensure(
            t.sequences_per_step % t.micro_batch == 0,
            "train.micro_batch",
            format!(
                "a divisor of train.sequences_per_step = {}",
                t.sequences_per_step
            ),
            t.micro_batch,
        )?;
        above_zero("train.learning_rate", t.learning_rate)?;
        within("train.warmup_fraction", t.warmup_fraction, 0.0, 1.0)?;
        within("train.decay_fraction", t.decay_fraction, 0.0, 1.0)?;
        within("train.final_rate", t.final_rate, 0.0, 1.0)?;
        for beta in t.betas {
            let ok = (0.0..1.0).contains(&beta);
            ensure(ok, "train.betas", "two numbers in [0, 1)", beta)?;
        }
        above_zero("train.eps", t.eps)?;
        within("train.weight_decay", t.weight_decay, 0.0, f64::MAX)?;
        within("train.gradient_clip", t.gradient_clip, 0.0, f64::MAX)?;
        positive("train.keep_checkpoints", t.keep_checkpoints)?;
        if t.bf16_moments && t.dtype == Precision::F64 {
            return Err(Error::usage(
                "train.bf16_moments",
                "false where train.dtype is f64",
                "true",
                "remove one of the two settings",
            ));
        }
        if let Recompute::Layers(layers) = &t.recompute {
            layer_list("train.recompute", layers, self.model.layers)?;
        }
        self.validate_intervals()?;
        self.validate_kernels()
    }

    /// Checks the intervals of checkpoints, evaluations, analyses and benchmarks.
    fn validate_intervals(&self) -> Result<()> {
        let t = &self.train;
        ensure(
            t.checkpoint_interval > 0,
            "train.checkpoint_interval",
            "at least 1",
            0,
        )?;
        ensure(t.eval_interval > 0, "train.eval_interval", "at least 1", 0)?;
        let fits = t.analyze_interval == 0 || t.device == Device::Cpu;
        ensure(
            fits,
            "train.analyze_interval",
            "0 on a device other than the CPU; run `routegrad analyze` on the checkpoints instead",
            t.analyze_interval,
        )?;
        if t.tasks_interval > 0 {
            ensure(
                t.device == Device::Cpu,
                "train.tasks_interval",
                "0 on a device other than the CPU; run `routegrad eval --tasks` on the checkpoints instead",
                t.tasks_interval,
            )?;
            ensure(
                !t.task_data.is_empty(),
                "train.task_data",
                "the folder of the benchmarks' documents, since train.tasks_interval is not 0",
                "an empty string",
            )?;
        }
        Ok(())
    }

    /// Checks the restrictions of the kernels.
    fn validate_kernels(&self) -> Result<()> {
        let t = &self.train;
        ensure(
            t.device == Device::Cpu || t.dtype == Precision::F32,
            "train.dtype",
            "f32 where kernels run",
            "f64",
        )?;
        if t.device != Device::Cpu {
            let m = &self.model;
            for (key, width) in [
                ("model.vocab_size", m.vocab_size),
                ("model.hidden", m.hidden),
                ("model.expert_ffn_width", m.expert_ffn_width),
                ("model.dense_ffn_width", m.dense_ffn_width),
                ("model.shared_expert_width", m.shared_expert_width),
            ] {
                let expected = "a multiple of 8 where kernels run (16-byte rows)";
                ensure(width % 8 == 0, key, expected, width)?;
            }
            let key = "model.head_dim";
            let expected = format!(
                "64 or 128 where kernels run, the widths that attention has kernels for{}",
                m.by_default()
            );
            ensure([64, 128].contains(&m.head_dim), key, expected, m.head_dim)?;
            // Each balance loss is one sum over the MoE layers.
            let b = &self.balance;
            let summed = b.aux_coefficient > 0.0 || b.z_coefficient > 0.0;
            let layers = if summed { m.moe_layers().len() } else { 0 };
            for (key, most, value, what) in [
                ("model.num_experts", 256, m.num_experts, ""),
                ("model.hidden", 8192, m.hidden, ""),
                ("model.heads", 1024, m.heads, ""),
                (
                    "model.layers",
                    128,
                    layers,
                    " MoE layers with balance losses",
                ),
            ] {
                let expected = format!("at most {most}{what} where kernels run");
                ensure(value <= most, key, expected, value)?;
            }
        }
        Ok(())
    }
}

impl ModelConfig {
    /// Returns how the default width of a head is computed, for error messages.
    fn by_default(&self) -> String {
        let (hidden, heads) = (self.hidden, self.heads);
        format!(" (default: model.hidden / model.heads = {hidden} / {heads})")
    }

    /// Checks the shapes of the model.
    ///
    /// # Errors
    /// When a shape is not valid.
    pub fn validate(&self) -> Result<()> {
        for (key, value) in [
            ("model.vocab_size", self.vocab_size),
            ("model.hidden", self.hidden),
            ("model.layers", self.layers),
            ("model.heads", self.heads),
            ("model.num_experts", self.num_experts),
            ("model.top_k", self.top_k),
            ("model.kv_heads", self.kv_heads),
            ("model.head_dim", self.head_dim),
            ("model.expert_ffn_width", self.expert_ffn_width),
            ("model.dense_ffn_width", self.dense_ffn_width),
            ("model.sequence_length", self.sequence_length),
        ] {
            positive(key, value)?;
            ensure(value <= MOST, key, format!("at most {MOST}"), value)?;
        }
        ensure(
            self.heads % self.kv_heads == 0,
            "model.kv_heads",
            format!("a divisor of model.heads = {}", self.heads),
            self.kv_heads,
        )?;
        ensure(
            self.head_dim % 2 == 0,
            "model.head_dim",
            format!(
                "an even number, because RoPE rotates pairs of elements{}",
                self.by_default()
            ),
            self.head_dim,
        )?;
        ensure(
            self.top_k <= self.num_experts,
            "model.top_k",
            format!("at most model.num_experts = {}", self.num_experts),
            self.top_k,
        )?;
        layer_list("model.dense_layers", &self.dense_layers, self.layers)?;
        ensure(
            self.dense_layers.len() < self.layers,
            "model.dense_layers",
            format!("fewer than all {} layers, so that one is MoE", self.layers),
            format!("{:?}", self.dense_layers),
        )?;
        above_zero("model.norm_eps", self.norm_eps)?;
        above_zero("model.rope_theta", self.rope_theta)
    }
}

/// Checks a list of layers: indices from 0, increasing.
fn layer_list(key: &str, list: &[usize], layers: usize) -> Result<()> {
    let increasing = list.windows(2).all(|w| w[0] < w[1]);
    let inside = list.iter().all(|l| *l < layers);
    ensure(
        increasing && inside,
        key,
        format!(
            "increasing layer numbers from 0 to {}",
            layers.saturating_sub(1)
        ),
        format!("{list:?}"),
    )
}
