//! Computes the bytes that training needs, by kind, from shapes alone, for a run on the CPU or on a GPU.
//!
//! The activations kept for backward are the tensors that the operations of `src/ops/` save; a tensor that two operations
//! save counts once. A test compares them with the tape. On the CPU, a freed block returns to a pool of blocks of equal
//! size ([`crate::device::Memory`]), so for each size the largest number of blocks in use at the same time counts, no
//! matter when: the kept blocks and those of the layer whose backward is running.

use crate::config::{Config, ModelConfig, QkNorm};
use crate::device::machine::{CHIPS, Chip, h200};
use crate::device::rounded_bytes;
use crate::error::Result;
use crate::kernels::cross_entropy::statistics;
use crate::ops::cross_entropy::{LOGIT_TOKENS, LOGITS, gradient_tokens};
use crate::routers::{self, Router};
use crate::train::optimizer::BUCKET;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use serde::{Serialize, Serializer};
use std::sync::LazyLock;

/// Bytes of an f32 or of a table entry.
const F32: u64 = 4;
/// Bytes of the program and its threads, without a model: 12 MB, measured on Linux.
const PROGRAM: u64 = 12_000_000;
/// Bytes of the embedded text.
const EMBEDDED_TEXT: u64 = 10_760_000;

/// The machine on which the training would run.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// This machine's CPU, with the configuration's dtype.
    Cpu,
    /// One GPU, in bf16 with f32 master weights, moments and gradients. The memory of a run does not depend on the GPU
    /// model.
    Gpu(&'static Chip),
}

impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Target {}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(self.key())
    }
}

impl ValueEnum for Target {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: LazyLock<Vec<Target>> = LazyLock::new(|| {
            let gpus = CHIPS.iter().map(Target::Gpu);
            std::iter::once(Target::Cpu).chain(gpus).collect()
        });
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Target::Cpu => "This machine's processor, in the configuration's dtype".into(),
            Target::Gpu(chip) => format!(
                "One {}, {} GiB, in bf16 with f32 master weights, moments and gradients",
                chip.name, chip.memory_gib
            ),
        };
        Some(PossibleValue::new(self.key()).help(help))
    }
}

impl Target {
    /// The target for uses in which the GPU model does not matter.
    pub fn gpu() -> Self {
        Target::Gpu(h200())
    }

    /// Returns the name of the target in `plan --device`.
    pub fn key(self) -> &'static str {
        match self {
            Target::Cpu => "cpu",
            Target::Gpu(chip) => chip.key,
        }
    }

    /// Returns the bytes of an activation.
    fn activation_bytes(self, config: &Config) -> u64 {
        match self {
            Target::Cpu => config.train.dtype.dtype().size() as u64,
            Target::Gpu(_) => 2,
        }
    }

    /// Returns how many activations have the size of one f32: activations have the run's dtype on the CPU and bf16 on a
    /// GPU.
    fn f32_numbers(self) -> u64 {
        match self {
            Target::Cpu => 1,
            Target::Gpu(_) => 2,
        }
    }
}

/// Bytes by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights; on a GPU in bf16, plus the lower half of the f32 master weights.
    pub weights: u64,
    /// Gradients of all parameters, in the precision in which they are accumulated.
    pub gradients: u64,
    /// The two moments of each weight.
    pub optimizer: u64,
    /// State of the routers.
    pub router_state: u64,
    /// Activations of one micro-batch that are kept for backward.
    pub activations: u64,
    /// Temporary memory during backward: gradients of activations, a recomputed layer, logits.
    pub workspace: u64,
    /// The program, its text and the tokens of a step.
    pub program: u64,
}

impl Memory {
    /// Returns the memory of the rank that needs most in a run on `ranks` ranks: its part of a micro-batch and its share
    /// of the moments.
    ///
    /// # Errors
    /// When the router does not exist.
    pub fn of(config: &Config, target: Target, ranks: usize) -> Result<Self> {
        let router = routers::build(&config.router)?;
        Ok(Self::with_ranks(config, &*router, target, ranks))
    }

    /// As [`of`](Self::of), for the given router.
    pub(super) fn with_ranks(
        config: &Config,
        router: &dyn Router,
        target: Target,
        ranks: usize,
    ) -> Self {
        if ranks == 1 {
            return Self::with(config, router, target);
        }
        let mut part = config.clone();
        part.train.micro_batch = config.train.micro_batch.div_ceil(ranks);
        part.train.sequences_per_step = config.train.sequences_per_step.div_ceil(ranks);
        let whole = Self::with(&part, router, target);
        // Gradients of the largest bucket from all ranks, or a batch that is evaluated; the activations of training are
        // already freed.
        let received =
            (BUCKET as u64 + F32 * largest_parameter(&config.model)).min(whole.gradients);
        let later = received.max(evaluation(config, router, target));
        Memory {
            weights: match target {
                Target::Cpu => whole.weights,
                // The bf16 halves of all weights, and the lower halves of a share.
                Target::Gpu(_) => whole.weights / 2 + (whole.weights / 2).div_ceil(ranks as u64),
            },
            optimizer: whole.optimizer.div_ceil(ranks as u64),
            workspace: whole.workspace.max(later.saturating_sub(whole.activations)),
            ..whole
        }
    }

    /// Returns the memory of a run on one rank.
    pub(super) fn with(config: &Config, router: &dyn Router, target: Target) -> Self {
        let m = &config.model;
        let parameters = routers::total_parameters(router, m);
        let tokens = config.train.micro_batch as u64 * m.sequence_length as u64;
        let size = target.activation_bytes(config);
        let full = size.max(F32);
        let bytes = |numbers: &[u64]| -> u64 {
            let block = |n: &u64| match target {
                Target::Cpu => rounded_bytes(tokens * n * size),
                Target::Gpu(_) => tokens * n * size,
            };
            numbers.iter().map(block).sum()
        };
        let recomputed = |layer: &usize| config.train.recompute.covers(*layer);
        let widest =
            |layers: &mut dyn Iterator<Item = usize>,
             of: fn(&Config, &dyn Router, usize, Target) -> Vec<u64>| {
                let each = layers.map(|l| bytes(&of(config, router, l, target)));
                each.max().unwrap_or(0)
            };
        // The input of the last norm and the gradient of its output, and the gradient of the head.
        let d = m.hidden as u64;
        let mut activations = bytes(&[d, d]) + full * m.vocab_size as u64 * d;
        for layer in 0..m.layers {
            activations += match recomputed(&layer) {
                true => bytes(&[d]),
                false => bytes(&kept(config, router, layer, target)),
            };
        }
        activations += index_bytes(config, router, tokens);
        let again = widest(&mut (0..m.layers).filter(recomputed), kept);
        let backward = widest(&mut (0..m.layers), passing);
        let vocabulary = m.vocab_size as u64;
        let logit_rows = tokens.min(LOGIT_TOKENS as u64);
        let workspace = match target {
            Target::Cpu => again + backward + full * (logit_rows * vocabulary).min(LOGITS as u64),
            // The head's f32 logits, their statistics and their bf16 gradients are freed before backward reaches the
            // layers.
            Target::Gpu(_) => {
                let statistics = 2 * statistics(m.vocab_size) as u64;
                let gradients = 2 * tokens.min(gradient_tokens(m.hidden) as u64) * vocabulary;
                (again + backward).max(F32 * logit_rows * (vocabulary + statistics) + gradients)
            }
        };
        let workspace = workspace + sampled_bytes(config, router, size);
        let moe_layers = m.moe_layers().len() as u64;
        Memory {
            weights: parameters * full,
            gradients: parameters * full,
            optimizer: 2 * parameters * if config.train.bf16_moments { 2 } else { full },
            router_state: moe_layers * full * router_numbers(m, router),
            activations,
            workspace,
            program: program(config, target),
        }
    }

    /// Returns the sum of all kinds.
    pub fn total(&self) -> u64 {
        self.weights
            + self.gradients
            + self.optimizer
            + self.router_state
            + self.activations
            + self.workspace
            + self.program
    }
}

/// Returns the number of elements of the largest parameter: the embedding, or the experts' gate and up projections of a
/// layer.
fn largest_parameter(m: &ModelConfig) -> u64 {
    let experts = m.num_experts * 2 * m.expert_ffn_width * m.hidden;
    experts.max(m.vocab_size * m.hidden) as u64
}

fn attention_widths(m: &ModelConfig) -> [u64; 2] {
    let dim = m.head_dim as u64;
    [
        (m.heads + 2 * m.kv_heads) as u64 * dim,
        m.heads as u64 * dim,
    ]
}

/// Returns, for each tensor that a layer keeps for backward, the number of elements per token; on a GPU in units of bf16,
/// with an f32 counted as two. On a GPU the experts are one operation, which keeps gate and up but not their product or
/// the outputs.
pub fn kept(config: &Config, router: &dyn Router, layer: usize, target: Target) -> Vec<u64> {
    let m = &config.model;
    let f32s = |n: usize| n as u64 * target.f32_numbers();
    let [qkv, out] = attention_widths(m);
    let d = m.hidden as u64;
    // Input and output of the norm; rotated queries and keys, and values; the output and its logsumexp.
    let mut sizes = vec![d, d, qkv, out, f32s(m.heads)];
    if m.qk_norm != QkNorm::None {
        sizes.push(qkv);
    }
    // Input and output of the second norm.
    sizes.extend([d, d]);
    if m.dense_layers.contains(&layer) {
        let f = m.dense_ffn_width as u64;
        sizes.extend([2 * f, f]);
        return sizes;
    }
    let rows = router.max_experts_per_token(m) as u64;
    let f = m.expert_ffn_width as u64;
    // Gate and up, their product, and the outputs of the experts.
    sizes.push(rows * 2 * f);
    if target == Target::Cpu {
        sizes.extend([rows * f, rows * d]);
    }
    let scores = router.kept_score_tensors() + usize::from(config.balance.z_coefficient != 0.0);
    sizes.extend(vec![f32s(m.num_experts); scores]);
    let further = router.kept_numbers_per_token(m) as u64;
    sizes.extend((further > 0).then_some(further));
    if m.shared_expert_width > 0 {
        let f = m.shared_expert_width as u64;
        sizes.extend([2 * f, f, d, 1]);
    }
    sizes
}

/// Returns the number of elements per token of the temporary tensors during a layer's backward, without the kept ones.
fn passing(config: &Config, router: &dyn Router, layer: usize, target: Target) -> Vec<u64> {
    let m = &config.model;
    let [qkv, out] = attention_widths(m);
    let d = m.hidden as u64;
    // The residual's gradient; the gradients of a norm's input and output; tensors before and after RoPE; the attention's
    // output.
    let mut sizes = vec![d, d, d, qkv, qkv, out];
    if m.dense_layers.contains(&layer) {
        let f = m.dense_ffn_width as u64;
        sizes.extend([2 * f, f]);
    } else {
        let (rows, f, e) = (
            router.max_experts_per_token(m) as u64,
            m.expert_ffn_width as u64,
            m.num_experts as u64 * target.f32_numbers(),
        );
        // Gradients of the tensors in `kept`; rows gathered for a matrix product, and its result.
        sizes.extend([rows * 2 * f, rows * f, rows * d, rows * d, e, e]);
    }
    sizes
}

/// Returns the bytes of the rows that a layer's router samples for its state: gathered tokens, gate and up, their product,
/// the outputs, and how often each pair was sampled.
fn sampled_bytes(config: &Config, router: &dyn Router, size: u64) -> u64 {
    let (m, train) = (&config.model, &config.train);
    let parts = (train.sequences_per_step / train.micro_batch.max(1)).max(1);
    let each = router.sampled_rows_per_step(m) / m.num_experts.max(1);
    let rows = (each.div_ceil(parts) * m.num_experts) as u64;
    if rows == 0 {
        return 0;
    }
    let tokens = (train.micro_batch * m.sequence_length) as u64;
    let (d, f) = (m.hidden as u64, m.expert_ffn_width as u64);
    size * rows * (2 * d + 3 * f) + size.max(F32) * tokens * m.num_experts as u64
}

/// Returns the bytes of the activations of a batch that is evaluated: those of one layer.
fn evaluation(config: &Config, router: &dyn Router, target: Target) -> u64 {
    let m = &config.model;
    let layers = (0..m.layers).map(|l| kept(config, router, l, target).iter().sum::<u64>());
    let tokens = config.evaluation_batch() as u64 * m.sequence_length as u64;
    tokens * layers.max().unwrap_or(0) * target.activation_bytes(config)
}

/// Returns the bytes of the maps between tokens and rows of all MoE layers: three entries of four bytes per row.
fn index_bytes(config: &Config, router: &dyn Router, tokens: u64) -> u64 {
    let layers = config.model.moe_layers().len() as u64;
    layers * tokens * router.max_experts_per_token(&config.model) as u64 * 3 * F32
}

/// Returns the bytes of the program on the CPU, as measured; of the embedded text; and of the tokens of a step.
fn program(config: &Config, target: Target) -> u64 {
    let tokens = config.train.sequences_per_step * (config.model.sequence_length + 1);
    let text = match config.data.source.as_str() {
        "embedded" => EMBEDDED_TEXT,
        path => std::fs::metadata(path).map_or(0, |m| if m.is_file() { m.len() } else { 0 }),
    };
    match target {
        Target::Cpu => PROGRAM + text + F32 * tokens as u64,
        Target::Gpu(_) => F32 * tokens as u64,
    }
}

/// Returns how many numbers the router keeps between steps per MoE layer.
fn router_numbers(model: &ModelConfig, router: &dyn Router) -> u64 {
    let state = router.initial_state(model, 0, 0);
    state.iter().map(|t| t.start.elements() as u64).sum()
}
