//! The typed configuration of a run: the model, its router, the balancing losses, the training and the data. The fields
//! document the meaning and default of every key; `load` determines their values, `validate` checks them, and [`count`]
//! computes the cost of the model.

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
pub(crate) use preset::experts;

use crate::device::Device;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// All values that a run needs, fully resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The transformer.
    pub model: ModelConfig,
    /// The routing method.
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
    /// Width of one head; even, because RoPE rotates pairs of elements. Default: `hidden / heads`.
    pub head_dim: usize,
    /// Experts E of one MoE layer.
    pub num_experts: usize,
    /// Experts K that one token uses.
    pub top_k: usize,
    /// Width F of one expert. Default: 22 `hidden` / E, which is 2.75 `hidden` at 8 experts.
    pub expert_ffn_width: usize,
    /// Width of the feed-forward of a dense layer. Default: `expert_ffn_width`.
    pub dense_ffn_width: usize,
    /// Layers, counted from 0, whose feed-forward is dense instead of MoE.
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
    /// Whether the output head is the transposed embedding.
    #[serde(default)]
    pub tied_embeddings: bool,
    /// Whether the query, key and value projections have biases.
    #[serde(default)]
    pub qkv_bias: bool,
    /// RMSNorm of queries and keys before RoPE: "none", "head" (over each head) or "full" (over all heads together).
    #[serde(default)]
    pub qk_norm: QkNorm,
    /// Width of a shared expert that every token uses, scaled by a sigmoid gate; 0 for no shared expert.
    #[serde(default)]
    pub shared_expert_width: usize,
    /// Tokens S per sequence.
    pub sequence_length: usize,
}

impl ModelConfig {
    /// Returns the indices of the MoE layers, counted from 0, in increasing order.
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
    /// No normalisation.
    #[default]
    None,
    /// Over each head, with one weight vector of `head_dim` elements.
    Head,
    /// Over all heads together.
    Full,
}

/// The router's name and settings. The registry of routers defines which settings each router has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterConfig {
    /// Name of the router; `routegrad routers` lists them.
    #[serde(default = "default_router")]
    pub name: String,
    /// Settings of the router; the router's type checks them.
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
    /// Weight α of the auxiliary (Switch) loss; with a balanced load the weighted loss is α.
    pub aux_coefficient: f64,
    /// Tokens whose routing counts enter the auxiliary loss: "global" (the step so far, over all ranks) or "micro" (the
    /// micro-batch).
    pub aux_scope: Scope,
    /// How the losses of the MoE layers are combined: "mean" or "sum".
    #[serde(default = "earlier_reduction")]
    pub aux_reduction: Reduction,
    /// Weight c of the z-loss c · mean(logsumexp(z)²), where z are the router's logits.
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
    /// The tokens of the optimizer step so far, over all ranks.
    Global,
    /// The tokens of the micro-batch.
    Micro,
}

/// Reduction over MoE layers. The sum is the mean times the number of MoE layers.
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
    /// Number of optimizer steps.
    pub steps: u64,
    /// Sequences per optimizer step (the global batch).
    pub sequences_per_step: usize,
    /// Sequences per forward and backward pass, a divisor of `sequences_per_step`.
    pub micro_batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of the steps in which the rate increases linearly from 0.
    #[serde(default = "warmup_fraction")]
    pub warmup_fraction: f64,
    /// How the rate decreases after the warm-up: "cosine", "linear", "constant", or "wsd" (constant, then linear).
    #[serde(default)]
    pub schedule: Schedule,
    /// Share of the steps, at the end, in which the rate of "wsd" decreases.
    #[serde(default = "decay_fraction")]
    pub decay_fraction: f64,
    /// Rate at the end, as a share of `learning_rate`; "constant" does not use it.
    #[serde(default = "final_rate")]
    pub final_rate: f64,
    /// Decay rates of AdamW's first and second moment.
    #[serde(default = "betas")]
    pub betas: [f64; 2],
    /// ε that AdamW adds to the square root of the second moment.
    #[serde(default = "eps")]
    pub eps: f64,
    /// Decoupled weight decay of matrices; norms and embeddings do not decay.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Largest norm of the gradient of all parameters; a larger gradient is clipped to it. 0 for no clipping.
    #[serde(default = "gradient_clip")]
    pub gradient_clip: f64,
    /// Seed of the weights, the order of the data and the routers that sample.
    #[serde(default)]
    pub seed: u64,
    /// Steps between checkpoints; a checkpoint is also written after the last step.
    pub checkpoint_interval: u64,
    /// Number of newest checkpoints that are kept.
    #[serde(default = "keep_checkpoints")]
    pub keep_checkpoints: usize,
    /// Steps between evaluations; the model is also evaluated after the last step.
    pub eval_interval: u64,
    /// Validation sequences per evaluation during training, spread evenly over the text; 0 for all.
    #[serde(default = "eval_sequences")]
    pub eval_sequences: usize,
    /// Steps between analyses of the router with 8 sequences, as by `routegrad analyze`, which are also made after the last
    /// step; written to `analysis/step-N` in the folder of the run; 0 for none. Only on the CPU.
    #[serde(default)]
    pub analyze_interval: u64,
    /// Steps between benchmark scores, which are also computed after the last step; 0 for none. Only on the CPU.
    #[serde(default)]
    pub tasks_interval: u64,
    /// Benchmarks to score: names of `routegrad eval --tasks`, or "all" for those whose documents are present.
    #[serde(default = "all_tasks")]
    pub tasks: Vec<String>,
    /// Folder of the benchmarks' documents, as for `routegrad eval --task-data`.
    #[serde(default)]
    pub task_data: String,
    /// Number of questions per benchmark, from its beginning; 0 for all.
    #[serde(default = "tasks_limit")]
    pub tasks_limit: usize,
    /// Where the model runs: "cpu"; "sim" (the CUDA kernels on the simulator, in bf16); "cuda" (the kernels on a GPU).
    #[serde(default)]
    pub device: Device,
    /// "f32" or "f64": the arithmetic on the CPU, and on every device the dtype of weights and optimizer state.
    #[serde(default)]
    pub dtype: Precision,
    /// Layers whose activations are recomputed in backward instead of stored: false, true for all, or a list.
    #[serde(default)]
    pub recompute: Recompute,
    /// Whether the optimizer's moments are bf16 with stochastic rounding: 12 instead of 16 bytes per parameter on a device
    /// with kernels.
    #[serde(default)]
    pub bf16_moments: bool,
    /// Whether a device with kernels replays a step as a CUDA graph where possible.
    #[serde(default = "on")]
    pub graph: bool,
    /// Number of consecutive steps that may be skipped because of non-finite values before the run stops.
    #[serde(default = "max_skipped_steps")]
    pub max_skipped_steps: u64,
}

impl TrainConfig {
    /// Returns whether the model is evaluated after step `step`, counted from 1: at each interval and after the last step.
    pub fn evaluates_after(&self, step: u64) -> bool {
        self.at(self.eval_interval, step)
    }

    /// Returns whether benchmarks are scored after step `step`.
    pub fn scores_after(&self, step: u64) -> bool {
        self.tasks_interval > 0 && self.at(self.tasks_interval, step)
    }

    /// Returns whether the router is analysed after step `step`.
    pub fn analyzes_after(&self, step: u64) -> bool {
        self.analyze_interval > 0 && self.at(self.analyze_interval, step)
    }

    /// Returns whether a checkpoint is saved after step `step`.
    pub fn saves_after(&self, step: u64) -> bool {
        self.at(self.checkpoint_interval, step)
    }

    fn at(&self, interval: u64, step: u64) -> bool {
        step == self.steps || step % interval == 0
    }
}

/// The text that a run trains on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// `"embedded"`, or the path of a text file, of a folder of text files, or of a folder that `routegrad data prepare`
    /// created.
    pub source: String,
    /// Folders that `data prepare` created with one tokenizer, each with the weight of its sequences. Replaces `source`:
    /// `[{source = "web", weight = 0.7}, {source = "books", weight = 0.3}]`.
    pub mix: Vec<Weighted>,
    /// Text that separates the documents of one file; if empty, a file is one document.
    pub document_separator: String,
    /// Share of the documents that is held out for validation; at least one document.
    pub validation_fraction: f64,
    /// Whether attention is limited to tokens of the same document where several documents share a sequence.
    pub document_boundaries: bool,
    /// Fingerprint of the tokenizer that produced the tokens; "bytes" if each byte is a token. Default: the tokenizer of
    /// the source.
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
    /// Returns the sources of the mix, or `source` if there is no mix.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        let single = self.mix.is_empty().then_some(self.source.as_str());
        single
            .into_iter()
            .chain(self.mix.iter().map(|w| w.source.as_str()))
    }

    /// Returns the names of the sources, joined by " + ".
    pub fn name(&self) -> String {
        self.sources().collect::<Vec<_>>().join(" + ")
    }

    /// Replaces the source, or the mix, by `source`.
    pub fn set_source(&mut self, source: &str) {
        self.source = source.into();
        self.mix.clear();
    }
}

/// One source of a mix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weighted {
    /// A text file, a folder of text files, or a folder that `data prepare` created.
    pub source: String,
    /// Weight of the source: its share of the sequences is its weight divided by the sum of all weights.
    pub weight: f64,
}

/// Most tokens of a batch of several sequences that is evaluated.
const EVALUATION_TOKENS: usize = 16_384;

impl Config {
    /// Merges the sources of the values, validates the result and returns it; see [`Layers`].
    ///
    /// # Errors
    /// When a file cannot be read or parsed, a key is unknown, or a value is not valid.
    pub fn load(layers: &Layers, check_router: &RouterCheck) -> Result<Self> {
        let mut config = load::resolve(layers)?;
        check_router(&mut config.router)?;
        config.validate()?;
        Ok(config)
    }

    /// Returns the number of sequences that are evaluated at a time: those of a micro-batch, of at most 16,384 tokens. It
    /// does not depend on the number of ranks, so that results do not either.
    pub fn evaluation_batch(&self) -> usize {
        let most = EVALUATION_TOKENS / self.model.sequence_length.max(1);
        self.train.micro_batch.min(most.max(1))
    }

    /// Returns the configuration as TOML. Loaded as [`Layers::file`], it results in an equal configuration.
    ///
    /// # Errors
    /// When a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| load::unwritable(&e))
    }

    /// Returns the configuration as a TOML table.
    ///
    /// # Errors
    /// When a value cannot be written as TOML.
    pub fn to_table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self).map_err(|e| load::unwritable(&e))
    }
}

/// The reduction of a run whose configuration does not name one: the mean was the default before the sum.
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

#[cfg(test)]
impl Config {
    /// The preset `tiny` with these values.
    pub(crate) fn tiny(set: &[&str]) -> Self {
        let mut layers = Layers::preset("tiny");
        layers.set = set.iter().map(|s| s.to_string()).collect();
        Config::load(&layers, &|_| Ok(())).unwrap()
    }
}
