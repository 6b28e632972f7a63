//! The routers, one per file, and their registry.
//!
//! A router turns a layer's input `x [T, D]` into gates `[T, E]` and, for every token, the experts that run: no code
//! outside this folder depends on the method. To add a router, add a file here and a line in [`ROUTERS`], or define a
//! type in another crate and pass it to [`register`], after which commands and checkpoints find it by name.

pub mod default;
pub mod dense;
pub mod densemixer;
pub mod lossfree;
mod registry;
pub mod remoe;
mod replay;
pub mod sparsemixer;
mod state;
mod statistics;
mod tally;
pub mod topk;

pub use registry::{GradientCheck, RouterInfo, Surrogate, all, build, find, register, resolve};
pub use replay::Disagreement;
pub use state::{LayerPass, LayerState, Pass, Phase};
pub use statistics::LayerStats;
pub(crate) use tally::DeviceTally;

use crate::config::{ModelConfig, count};
use crate::device::Device;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::kernels::router::MAX_CHOICES;
use crate::ops::combine::Defaults;
use crate::ops::dispatch::Dispatch;
use crate::ops::expert_mean::{ExpertSums, Weighting};
use crate::ops::renormalize::renormalize;
use crate::ops::routing::Scores;
use crate::ops::sampled_outputs::SampledRows;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use std::rc::Rc;

/// A router's decisions for one micro-batch of one layer.
pub struct Routing {
    /// `[T, E]`: weight of each expert's output. For an expert that was not chosen it is the weight of the default
    /// vector, or unused if there is none.
    pub gates: Var,
    /// The scores that the balance losses and the statistics use.
    pub scores: Scores,
    /// The experts that run for each token.
    pub dispatch: Rc<Dispatch>,
    /// The experts that count as chosen, if these differ from the experts that run.
    pub chosen: Option<Rc<Dispatch>>,
    /// `[T, E]`: the weights in weighted sums of the experts' outputs; the gates if absent.
    pub sum_weights: Option<Var>,
    /// The loss of a router with [`Balance::Own`], a scalar already multiplied by its coefficient.
    pub penalty: Option<Var>,
}

impl Routing {
    /// A routing in which the chosen experts are those that run, without a router loss.
    pub fn new(gates: Var, scores: Scores, dispatch: Rc<Dispatch>) -> Self {
        Routing {
            gates,
            scores,
            dispatch,
            chosen: None,
            sum_weights: None,
            penalty: None,
        }
    }

    /// A routing in which the chosen experts run, weighted by their scores.
    ///
    /// # Errors
    /// Returns an error when a choice cannot be made.
    pub fn by_scores(scores: Scores, layer: &mut LayerPass<'_>) -> Result<Self> {
        let dispatch = layer.select(|| scores.choose())?;
        Ok(Self::new(scores.values.clone(), scores, dispatch))
    }

    /// Returns the routing with weights that sum to 1 over the experts that run.
    ///
    /// # Errors
    /// Returns an error when the gates do not fit the dispatch.
    pub fn renormalized(mut self, tape: &Tape) -> Result<Self> {
        self.gates = renormalize(tape, &self.gates, &self.dispatch)?;
        Ok(self)
    }

    /// Returns the experts that balance losses and statistics count.
    pub fn chosen(&self) -> &Dispatch {
        self.chosen.as_ref().unwrap_or(&self.dispatch)
    }
}

/// The loss that keeps the experts' loads even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// The auxiliary loss and the z-loss, as the configuration weights them.
    Auxiliary,
    /// The router's own loss, [`Routing::penalty`], which is added to the total loss without a further coefficient.
    Own,
    /// No loss.
    None,
}

/// A vector that a router learns, for one layer. It has no weight decay.
pub struct OwnParameter {
    /// Name in checkpoints, after the layer's prefix.
    pub name: &'static str,
    /// Number of entries.
    pub length: usize,
    /// Initial value of every entry.
    pub start: f64,
}

/// A tensor that a router keeps between steps, for one layer.
pub struct StateTensor {
    /// Name in checkpoints, after the layer's prefix.
    pub name: &'static str,
    /// Value before the first step. Its shape and dtype do not change.
    pub start: Tensor,
}

/// A method of routing. One value serves all layers; [`LayerPass`] has the data of a layer.
pub trait Router {
    /// Rejects models that the method cannot train.
    ///
    /// # Errors
    /// Returns an error that names the configuration key to change.
    fn validate(&self, _model: &ModelConfig) -> Result<()> {
        Ok(())
    }

    /// Rejects devices on which the router's settings, or the model's with this router, are not supported.
    ///
    /// # Errors
    /// Returns an error that names the key and what is supported.
    fn validate_device(&self, _model: &ModelConfig, _device: Device) -> Result<()> {
        Ok(())
    }

    /// Returns the state of one MoE layer at the start of training, in f64; the model converts it to its dtype.
    /// `layer` counts MoE layers from 0.
    fn initial_state(&self, _model: &ModelConfig, _layer: usize, _seed: u64) -> Vec<StateTensor> {
        Vec::new()
    }

    /// Returns the vectors that the method learns in each MoE layer.
    fn parameters(&self, _model: &ModelConfig) -> Vec<OwnParameter> {
        Vec::new()
    }

    /// Chooses experts and gates from the layer's input `[T, D]` and its router weight `[E, D]`.
    ///
    /// # Errors
    /// Returns an error when the shapes of input and weight do not fit.
    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing>;

    /// Returns how to weight the sums of the experts' outputs for [`defaults`](Self::defaults); `None` if the method
    /// does not need these sums.
    fn weighting(&self) -> Option<Weighting> {
        None
    }

    /// Draws tokens on which experts that they did not choose will run, only to update the router's state. It is
    /// called in passes that may change state. All ranks must agree on whether there are samples.
    ///
    /// # Errors
    /// Returns an error when the draw fails.
    fn samples(
        &self,
        _routing: &Routing,
        _layer: &mut LayerPass<'_>,
    ) -> Result<Option<SampledRows>> {
        Ok(None)
    }

    /// Gets this rank's sums of the experts' outputs over the rows that [`samples`](Self::samples) drew. It is called
    /// before [`defaults`](Self::defaults).
    ///
    /// # Errors
    /// Returns an error when the sums do not fit the state, or a rank has left.
    fn learn_from_samples(
        &self,
        _sums: ExpertSums,
        _drawn: &SampledRows,
        _layer: &mut LayerPass<'_>,
    ) -> Result<()> {
        Ok(())
    }

    /// Returns an upper bound of the rows that [`samples`](Self::samples) draws for one layer in an optimizer step.
    fn sampled_rows_per_step(&self, _model: &ModelConfig) -> usize {
        0
    }

    /// Returns the default vectors for the experts that did not run, if the method has any. `sums` are the sums of
    /// the outputs of the experts that ran; they are present if [`weighting`](Self::weighting) requests them and the
    /// pass may change state.
    ///
    /// # Errors
    /// Returns an error when the sums do not fit the state.
    fn defaults(
        &self,
        _sums: Option<ExpertSums>,
        _layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        Ok(None)
    }

    /// Applies the method's own parameters to the combined output `y [T, D]`, and returns the layer's output
    /// `[T, D]`.
    ///
    /// # Errors
    /// Returns an error when `y` does not fit.
    fn output(&self, _tape: &Tape, y: Var, _own: &[Var]) -> Result<Var> {
        Ok(y)
    }

    /// Updates the pending state of the layers at the end of an accepted optimizer step, before it is committed. The
    /// counts of a layer are those of this rank; sum them over ranks with `dist`.
    ///
    /// # Errors
    /// Returns an error when a state tensor is not real, or a sum over ranks fails.
    fn end_step(
        &self,
        _model: &ModelConfig,
        _layers: &mut [LayerState],
        _dist: &dyn Collective,
    ) -> Result<()> {
        Ok(())
    }

    /// Returns the loss that balances the experts.
    fn balance(&self) -> Balance {
        Balance::Auxiliary
    }

    /// Returns the maximum number of experts that run for a token in training. Memory is planned for this number.
    fn max_experts_per_token(&self, model: &ModelConfig) -> usize {
        model.top_k
    }

    /// Returns the mean number of experts that run for a token. Operations are counted with this number.
    fn mean_experts_per_token(&self, model: &ModelConfig) -> usize {
        self.max_experts_per_token(model)
    }

    /// Returns the number of tensors `[T, E]` that are kept for backward: the scores, and the gates if they differ
    /// from the scores.
    fn kept_score_tensors(&self) -> usize {
        1
    }

    /// Returns how many further numbers per token are kept for backward.
    fn kept_numbers_per_token(&self, _model: &ModelConfig) -> usize {
        0
    }

    /// Returns whether evaluation reads the state tensor `name`. An export then contains it.
    fn evaluation_reads(&self, _name: &str) -> bool {
        true
    }

    /// Returns the `topk` router that gives the same results at evaluation, if there is one. An export is then a
    /// model class of the transformers library.
    fn equivalent_topk(&self) -> Option<topk::TopK> {
        None
    }

    /// Returns a Python function for exports of models that the transformers library does not support. It must have
    /// the router's name: `def NAME(z, k, settings, bias)` gets logits `z [T, E]` and returns the experts' weights
    /// `[T, E]` and a bool tensor `[T, E]` of the experts that run. `modeling_routegrad.py` contains the functions of
    /// the routers in this crate.
    fn export_code(&self) -> Option<&'static str> {
        None
    }

    /// Changes the settings so that evaluation uses default vectors, or does not. The error is the reason why this is not
    /// possible.
    fn use_default_vectors(
        &self,
        _settings: &mut toml::Table,
        _used: bool,
    ) -> Result<(), &'static str> {
        Err("which has none")
    }

    /// Returns whether experts are weighted by the softmax of their logits, as the analyses of gradients assume.
    fn weighs_by_softmax(&self) -> bool {
        false
    }

    /// Returns whether every expert runs for every token at evaluation.
    fn evaluates_all_experts(&self) -> bool {
        false
    }
}

/// The routers of this crate; [`all`] also returns registered routers.
pub const ROUTERS: &[RouterInfo] = &[
    topk::INFO,
    default::INFO,
    dense::INFO,
    densemixer::INFO,
    sparsemixer::INFO,
    remoe::INFO,
    lossfree::INFO,
];

/// Returns the number of parameters of a model with this router. Default vectors are buffers and are not counted.
pub fn total_parameters(router: &dyn Router, model: &ModelConfig) -> u64 {
    count::total_parameters(model).saturating_add(own_parameters(router, model))
}

/// Returns the number of parameters that one token uses in a model with this router.
pub fn active_parameters(router: &dyn Router, model: &ModelConfig) -> u64 {
    count::active_parameters(model).saturating_add(own_parameters(router, model))
}

/// Returns the number of [`Router::parameters`] in all MoE layers.
fn own_parameters(router: &dyn Router, model: &ModelConfig) -> u64 {
    let of_a_layer: usize = router.parameters(model).iter().map(|p| p.length).sum();
    (of_a_layer * model.moe_layers().len()) as u64
}

/// Rejects a setting outside `least ..`, or, with `below`, outside `least .. below`.
fn within(key: &str, value: f64, least: f64, below: Option<f64>) -> Result<()> {
    if value >= least && value < below.unwrap_or(f64::INFINITY) {
        return Ok(());
    }
    Err(Error::usage(
        format!("router.{key}"),
        match below {
            Some(below) => format!("a number >= {least} and < {below}"),
            None => format!("a number from {least} up"),
        },
        value.to_string(),
        format!("change it with --set router.{key}=…"),
    ))
}

/// Rejects more experts per token than the router's kernel chooses.
fn chosen_by_kernel(model: &ModelConfig, device: Device) -> Result<()> {
    if device == Device::Cpu || model.top_k <= MAX_CHOICES {
        return Ok(());
    }
    Err(Error::usage(
        "model.top_k",
        format!("at most {MAX_CHOICES} with this router where kernels run"),
        model.top_k.to_string(),
        "lower it, or set train.device = \"cpu\"",
    ))
}

/// Rejects weights that sum to 1 over the chosen experts if K is 1.
fn learns_renormalized(model: &ModelConfig) -> Result<()> {
    if model.top_k > 1 {
        return Ok(());
    }
    Err(Error::usage(
        "router.renormalize",
        "model.top_k of 2 or more",
        "1",
        "with one expert the weight is always 1 and the router gets no gradient; set renormalize = false",
    ))
}
