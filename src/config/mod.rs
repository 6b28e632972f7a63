//! The one typed configuration of a run: the model, its router, the balancing losses, the training
//! and the data. Every key stands here with its meaning and default; `load` says where values
//! come from, `validate` what they may be, [`count`] what a model of them costs.

mod choices;
pub mod count;
mod describe;
mod hub;
mod load;
mod names;
mod preset;
mod validate;

pub use choices::{Precision, Recompute, Schedule};
pub use describe::described;
pub use hub::ModelFile;
pub use load::{Layers, RouterCheck};
pub use preset::PRESETS;

use crate::device::Device;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Everything a run needs to know, fully resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The transformer.
    pub model: ModelConfig,
    /// The method of routing.
    #[serde(default)]
    pub router: RouterConfig,
    /// Losses that spread tokens over experts.
    #[serde(default = "earlier_balance")]
    pub balance: BalanceConfig,
    /// The training loop and its optimizer.
    pub train: TrainConfig,
    /// What the model is trained on.
    #[serde(default)]
    pub data: DataConfig,
}

/// Shapes of the transformer. Widths are in elements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Width D of the residual stream.
    pub hidden: usize,
    /// Transformer blocks, dense ones included.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`. Default: `heads`.
    pub kv_heads: usize,
    /// Width of one head, even (RoPE turns pairs). Default: `hidden / heads`.
    pub head_dim: usize,
    /// Experts E of one MoE layer.
    pub num_experts: usize,
    /// Experts K that one token uses.
    pub top_k: usize,
    /// Width F of one expert. Default: 22 `hidden` / E, which is 2.75 `hidden` at 8 experts.
    pub expert_ffn_width: usize,
    /// Width of the feed-forward of a dense layer. Default: `expert_ffn_width`.
    pub dense_ffn_width: usize,
    /// Layers, from 0, whose feed-forward is dense instead of MoE.
    #[serde(default = "first_layer")]
    pub dense_layers: Vec<usize>,
    /// Normalisation: "rmsnorm" or "layernorm".
    pub norm: Norm,
    /// ε that a norm adds to the mean square or the variance.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// Base θ of RoPE's frequencies.
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
    /// The output head is the transposed embedding.
    #[serde(default)]
    pub tied_embeddings: bool,
    /// Biases in the query, key and value projections.
    #[serde(default)]
    pub qkv_bias: bool,
    /// RMSNorm of queries and keys before RoPE: "none", "head" (each head) or "full" (all heads together).
    #[serde(default)]
    pub qk_norm: QkNorm,
    /// Width of a shared expert that every token uses, scaled by a sigmoid gate; 0 for none.
    #[serde(default)]
    pub shared_expert_width: usize,
    /// Tokens S of one sequence.
    pub sequence_length: usize,
}

impl ModelConfig {
    /// Layers that are MoE, in order.
    pub fn moe_layers(&self) -> Vec<usize> {
        (0..self.layers)
            .filter(|l| !self.dense_layers.contains(l))
            .collect()
    }
}

/// Normalisation of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// LayerNorm with weight and bias.
    LayerNorm,
    /// RMSNorm with a weight.
    RmsNorm,
}

/// RMS normalisation of queries and keys before RoPE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QkNorm {
    /// Queries and keys go to RoPE as they are.
    #[default]
    None,
    /// Over each head, one weight of `head_dim`.
    Head,
    /// Over all heads together.
    Full,
}

/// Which router, and its settings; the registry of routers knows what each one takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterConfig {
    /// Router; `routegrad routers` lists them.
    #[serde(default = "default_router")]
    pub name: String,
    /// The router's own keys; its type checks them.
    #[serde(flatten)]
    pub settings: toml::Table,
}

impl Default for RouterConfig {
    fn default() -> Self {
        RouterConfig {
            name: default_router(),
            settings: toml::Table::new(),
        }
    }
}

/// Losses that spread tokens over experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalanceConfig {
    /// α, the weight of the auxiliary (Switch) loss, which is 1 · α when the load is balanced.
    pub aux_coefficient: f64,
    /// Tokens whose counts enter the auxiliary loss: "global", of the step so far on all ranks, or "micro", of the micro-batch.
    pub aux_scope: Scope,
    /// How the losses of the MoE layers are combined: "mean" or "sum".
    #[serde(default = "earlier_reduction")]
    pub aux_reduction: Reduction,
    /// c of c · mean(logsumexp(z)²).
    pub z_coefficient: f64,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        BalanceConfig {
            aux_coefficient: 0.01,
            aux_scope: Scope::Global,
            aux_reduction: Reduction::Sum,
            z_coefficient: 0.0,
        }
    }
}

/// Tokens whose routing counts enter the auxiliary loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Those of the optimizer step so far, over all ranks.
    Global,
    /// Those of the micro-batch.
    Micro,
}

/// Reduction over MoE layers; the two differ by their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// The mean over the layers.
    Mean,
    /// The sum over the layers.
    Sum,
}

/// The training loop and its optimizer, AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences of one optimizer step, the global batch.
    pub sequences_per_step: usize,
    /// Sequences that go through the model at once, a divisor of `sequences_per_step`.
    pub micro_batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of the steps in which the rate rises linearly from 0.
    #[serde(default = "warmup_fraction")]
    pub warmup_fraction: f64,
    /// How the rate falls after that: "cosine", "linear", "constant", or "wsd", constant and then linear.
    #[serde(default)]
    pub schedule: Schedule,
    /// Share of the steps, the last ones, in which the rate of "wsd" falls.
    #[serde(default = "decay_fraction")]
    pub decay_fraction: f64,
    /// Rate at the end, as a share of `learning_rate`; "constant" does not fall.
    #[serde(default = "final_rate")]
    pub final_rate: f64,
    /// Decay of AdamW's first and second moment.
    #[serde(default = "betas")]
    pub betas: [f64; 2],
    /// ε that AdamW adds to the root of the second moment.
    #[serde(default = "eps")]
    pub eps: f64,
    /// Decoupled decay of matrices; norms and embeddings do not decay.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Largest norm of the whole gradient, to which it is clipped; 0 for no clipping.
    #[serde(default = "gradient_clip")]
    pub gradient_clip: f64,
    /// Seed of the weights, the order of the data and the sampling routers.
    #[serde(default)]
    pub seed: u64,
    /// Steps between checkpoints; one more is written at the end.
    pub checkpoint_interval: u64,
    /// Newest checkpoints that are kept.
    #[serde(default = "keep_checkpoints")]
    pub keep_checkpoints: usize,
    /// Steps between evaluations; one more is done at the end.
    pub eval_interval: u64,
    /// Validation sequences of an evaluation during training, spread evenly; 0 for all.
    #[serde(default = "eval_sequences")]
    pub eval_sequences: usize,
    /// Steps between analyses of the router, as `routegrad analyze` makes them of 8 sequences, into
    /// `analysis/step-N` of the run; 0 for none. On the CPU alone.
    #[serde(default)]
    pub analyze_interval: u64,
    /// Steps between benchmark scores, with one more at the end; 0 for none. On the CPU alone.
    #[serde(default)]
    pub tasks_interval: u64,
    /// The benchmarks: names of `routegrad eval --tasks`, or "all" for those whose documents are there.
    #[serde(default = "all_tasks")]
    pub tasks: Vec<String>,
    /// Folder of their documents, as for `routegrad eval --task-data`.
    #[serde(default)]
    pub task_data: String,
    /// Questions of each benchmark, the first ones; 0 for all.
    #[serde(default = "tasks_limit")]
    pub tasks_limit: usize,
    /// Where the model runs: "cpu"; "sim", the kernels on the simulator in bf16; "cuda", the kernels on a GPU.
    #[serde(default)]
    pub device: Device,
    /// "f32" or "f64": arithmetic on the CPU, and of weights and optimizer everywhere.
    #[serde(default)]
    pub dtype: Precision,
    /// Layers whose activations are computed again in backward instead of kept: false, true for all, or a list.
    #[serde(default)]
    pub recompute: Recompute,
    /// Whether the optimizer's moments are bf16, rounded stochastically: 12 instead of 16 bytes a parameter on a device with
    /// kernels.
    #[serde(default)]
    pub bf16_moments: bool,
    /// Whether a device with kernels replays a step as a CUDA graph if possible.
    #[serde(default = "on")]
    pub graph: bool,
    /// Non-finite steps in a row, each left out, before the run stops.
    #[serde(default = "max_skipped_steps")]
    pub max_skipped_steps: u64,
}

impl TrainConfig {
    /// Whether the model is evaluated after step `step`, counted from 1: at the interval, and after the last.
    pub fn evaluates_after(&self, step: u64) -> bool {
        self.at(self.eval_interval, step)
    }

    /// Whether benchmarks are scored after it.
    pub fn scores_after(&self, step: u64) -> bool {
        self.tasks_interval > 0 && self.at(self.tasks_interval, step)
    }

    /// Whether the router is analysed after it.
    pub fn analyzes_after(&self, step: u64) -> bool {
        self.analyze_interval > 0 && self.at(self.analyze_interval, step)
    }

    /// Whether a checkpoint is saved after it.
    pub fn saves_after(&self, step: u64) -> bool {
        self.at(self.checkpoint_interval, step)
    }

    fn at(&self, interval: u64, step: u64) -> bool {
        step == self.steps || step % interval == 0
    }
}

/// The text a run learns from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// `"embedded"`, or the path of a text file, of a folder of them, or of a folder that
    /// `routegrad data prepare` made.
    pub source: String,
    /// Folders that `data prepare` made with one tokenizer, and the weights of their sequences, instead
    /// of `source`: `[{source = "web", weight = 0.7}, {source = "books", weight = 0.3}]`.
    pub mix: Vec<Weighted>,
    /// What separates the documents of one file; empty: a file is one document.
    pub document_separator: String,
    /// Share of the documents that is held out for validation, at least one.
    pub validation_fraction: f64,
    /// Whether attention stays within a document where several share a sequence.
    pub document_boundaries: bool,
    /// Fingerprint of the tokenizer that made the tokens, "bytes" for bytes. Default: that of the
    /// source.
    pub tokenizer: String,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            source: "embedded".into(),
            mix: Vec::new(),
            document_separator: "\n\n\n".into(),
            validation_fraction: 0.05,
            document_boundaries: false,
            tokenizer: "bytes".into(),
        }
    }
}

impl DataConfig {
    /// The sources of the mix, or the one there is.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        let single = self.mix.is_empty().then_some(self.source.as_str());
        single
            .into_iter()
            .chain(self.mix.iter().map(|w| w.source.as_str()))
    }

    /// What to call them.
    pub fn name(&self) -> String {
        self.sources().collect::<Vec<_>>().join(" + ")
    }

    /// Takes another source.
    pub fn set_source(&mut self, source: &str) {
        self.source = source.into();
        self.mix.clear();
    }
}

/// A part of a mix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weighted {
    /// A text, a folder of texts, or a folder that `data prepare` made.
    pub source: String,
    /// Share of the sequences, in proportion to the others'.
    pub weight: f64,
}

impl Config {
    /// Resolves the layers of a configuration; see [`Layers`].
    pub fn load(layers: &Layers, check_router: &RouterCheck) -> Result<Self> {
        let mut config = load::resolve(layers)?;
        check_router(&mut config.router)?;
        config.validate()?;
        Ok(config)
    }

    /// The configuration as TOML; as [`Layers::file`] it gives itself back.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| load::unwritable(&e))
    }

    /// The same as a table.
    pub fn to_table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self).map_err(|e| load::unwritable(&e))
    }
}

/// What a run had whose configuration does not say: the mean was the default before the sum.
fn earlier_reduction() -> Reduction {
    Reduction::Mean
}
fn earlier_balance() -> BalanceConfig {
    BalanceConfig {
        aux_reduction: earlier_reduction(),
        ..BalanceConfig::default()
    }
}
fn first_layer() -> Vec<usize> {
    vec![0]
}
fn norm_eps() -> f64 {
    1e-5
}
fn rope_theta() -> f64 {
    10_000.0
}
fn default_router() -> String {
    "default".into()
}
fn warmup_fraction() -> f64 {
    0.01
}
fn decay_fraction() -> f64 {
    0.2
}
fn final_rate() -> f64 {
    0.1
}
fn betas() -> [f64; 2] {
    [0.9, 0.95]
}
fn eps() -> f64 {
    1e-8
}
fn weight_decay() -> f64 {
    0.1
}
fn gradient_clip() -> f64 {
    1.0
}
fn keep_checkpoints() -> usize {
    2
}
fn all_tasks() -> Vec<String> {
    vec!["all".into()]
}
fn on() -> bool {
    true
}

fn tasks_limit() -> usize {
    200
}
fn eval_sequences() -> usize {
    64
}
fn max_skipped_steps() -> u64 {
    10
}
