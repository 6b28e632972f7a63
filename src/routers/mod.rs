//! The routers, one a file, and their registry.
//!
//! A router turns a layer's input `x [T, D]` into gates `[T, E]` and, for every token, the experts that run:
//! nothing outside this folder knows which method does so. A new router is a file here and a line in
//! [`ROUTERS`]; or a type of another crate, which [`register`] makes known by name to every command and to checkpoints.

pub mod default;
pub mod dense;
pub mod densemixer;
pub mod lossfree;
mod registry;
pub mod remoe;
pub mod sparsemixer;
mod state;
mod statistics;
mod tally;
pub mod topk;

pub use registry::{GradientCheck, RouterInfo, Surrogate, all, build, find, register, resolve};
pub use state::{Disagreement, LayerPass, LayerState, Pass, Phase};
pub use statistics::LayerStats;
pub(crate) use tally::DeviceTally;

use crate::config::ModelConfig;
use crate::device::Device;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::ops::combine::Defaults;
use crate::ops::dispatch::Dispatch;
use crate::ops::expert_mean::{ExpertSums, Weighting};
use crate::ops::renormalize::renormalize;
use crate::ops::routing::Scores;
use crate::ops::sampled_outputs::SampledRows;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use std::rc::Rc;

/// What a router decided for one micro-batch of one layer.
pub struct Routing {
    /// `[T, E]`: weight of each expert's output; off the chosen experts that of its default vector,
    /// if there is one, else unused.
    pub gates: Var,
    /// What the balance losses and the statistics see.
    pub scores: Scores,
    /// The experts that run for each token.
    pub dispatch: Rc<Dispatch>,
    /// The experts that count as chosen, where those that run are others.
    pub chosen: Option<Rc<Dispatch>>,
    /// `[T, E]`: what weighted sums of the experts' outputs count them by, where that is not the gates.
    pub sum_weights: Option<Var>,
    /// The loss of a router with [`Balance::Own`], a scalar with its coefficient.
    pub penalty: Option<Var>,
}

impl Routing {
    /// Experts that run because they were chosen, and no loss.
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

    /// The chosen experts run, weighted by their scores.
    ///
    /// # Errors
    /// When a choice cannot be made.
    pub fn by_scores(scores: Scores, layer: &mut LayerPass<'_>) -> Result<Self> {
        let dispatch = layer.select(|| scores.choose())?;
        Ok(Self::new(scores.values.clone(), scores, dispatch))
    }

    /// The same with weights that sum to 1 over the experts that run.
    ///
    /// # Errors
    /// When the gates do not fit the dispatch.
    pub fn renormalized(mut self, tape: &Tape) -> Result<Self> {
        self.gates = renormalize(tape, &self.gates, &self.dispatch)?;
        Ok(self)
    }

    /// The experts whose counts balance losses and statistics see.
    pub fn chosen(&self) -> &Dispatch {
        self.chosen.as_ref().unwrap_or(&self.dispatch)
    }
}

/// The loss that keeps the experts' loads even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// The auxiliary loss and the z-loss, as the configuration weights them.
    Auxiliary,
    /// The router's own, [`Routing::penalty`], which is added to the loss as it is.
    Own,
    /// None.
    None,
}

/// A vector that a router learns, for one layer; it does not decay.
pub struct OwnParameter {
    /// Name in checkpoints, behind the layer's prefix.
    pub name: &'static str,
    /// Number of its entries.
    pub length: usize,
    /// What every entry begins with.
    pub start: f64,
}

/// A tensor that a router keeps from step to step, for one layer.
pub struct StateTensor {
    /// Name in checkpoints, behind the layer's prefix.
    pub name: &'static str,
    /// What it holds before the first step; its shape and dtype stay.
    pub start: Tensor,
}

/// A method of routing. One value serves all layers; what differs by layer is in [`LayerPass`].
pub trait Router {
    /// Refuses models that the method cannot train.
    ///
    /// # Errors
    /// Names the key to change.
    fn validate(&self, _model: &ModelConfig) -> Result<()> {
        Ok(())
    }

    /// Refuses devices on which these settings do not run.
    ///
    /// # Errors
    /// Names the key, and where it runs.
    fn validate_device(&self, _device: Device) -> Result<()> {
        Ok(())
    }

    /// The state of one MoE layer at the start of training, in f64: the model rounds it to its
    /// dtype. `layer` counts MoE layers from 0.
    fn initial_state(&self, _model: &ModelConfig, _layer: usize, _seed: u64) -> Vec<StateTensor> {
        Vec::new()
    }

    /// The vectors that the method learns in each MoE layer.
    fn parameters(&self, _model: &ModelConfig) -> Vec<OwnParameter> {
        Vec::new()
    }

    /// Chooses experts and gates from the layer's input `[T, D]` and its router weight `[E, D]`.
    ///
    /// # Errors
    /// When the two do not fit.
    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing>;

    /// How the experts' outputs are to be summed for [`defaults`](Self::defaults); none if the
    /// method does not need them.
    fn weighting(&self) -> Option<Weighting> {
        None
    }

    /// Draws tokens on which experts that they did not choose are to run, for the router's state alone. Asked in passes that may
    /// change state; all ranks must answer alike.
    ///
    /// # Errors
    /// When the draw fails.
    fn samples(
        &self,
        _routing: &Routing,
        _layer: &mut LayerPass<'_>,
    ) -> Result<Option<SampledRows>> {
        Ok(None)
    }

    /// Takes the sums of the experts' outputs over the rows that [`samples`](Self::samples) drew, this rank's, before
    /// [`defaults`](Self::defaults) is asked.
    ///
    /// # Errors
    /// When the sums do not fit the state, or a rank has left.
    fn learn_from_samples(
        &self,
        _sums: ExpertSums,
        _drawn: &SampledRows,
        _layer: &mut LayerPass<'_>,
    ) -> Result<()> {
        Ok(())
    }

    /// Rows that [`samples`](Self::samples) draws in an optimizer step for one layer, at most.
    fn sampled_rows_per_step(&self, _model: &ModelConfig) -> usize {
        0
    }

    /// Gives the default vectors of the experts that did not run, if the method has any. `sums` are
    /// those of the experts that ran; they are there when the router asked for them and the pass
    /// may change state.
    ///
    /// # Errors
    /// When the sums do not fit the state.
    fn defaults(
        &self,
        _sums: Option<ExpertSums>,
        _layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        Ok(None)
    }

    /// What the method makes of the combined output `y [T, D]` with its own parameters.
    ///
    /// # Errors
    /// When `y` does not fit.
    fn output(&self, _tape: &Tape, y: Var, _own: &[Var]) -> Result<Var> {
        Ok(y)
    }

    /// Changes the pending state of the layers at the end of an accepted optimizer step, before it
    /// is committed. What a layer counted is this rank's: sums over ranks go through `dist`.
    ///
    /// # Errors
    /// When a state tensor is not real, or a sum over ranks fails.
    fn end_step(
        &self,
        _model: &ModelConfig,
        _layers: &mut [LayerState],
        _dist: &dyn Collective,
    ) -> Result<()> {
        Ok(())
    }

    /// The loss that balances the experts.
    fn balance(&self) -> Balance {
        Balance::Auxiliary
    }

    /// Experts that run for a token in training, at most: memory is planned for them.
    fn max_experts_per_token(&self, model: &ModelConfig) -> usize {
        model.top_k
    }

    /// Experts that run for a token on average: operations are counted for them.
    fn mean_experts_per_token(&self, model: &ModelConfig) -> usize {
        self.max_experts_per_token(model)
    }

    /// Tensors `[T, E]` that backward keeps: the scores, and the gates where they are others.
    fn kept_score_tensors(&self) -> usize {
        1
    }

    /// Further numbers of each token that backward keeps.
    fn kept_numbers_per_token(&self, _model: &ModelConfig) -> usize {
        0
    }

    /// Whether evaluation reads the state tensor `name`, so that an export has it.
    fn evaluation_reads(&self, _name: &str) -> bool {
        true
    }

    /// The `topk` router that computes the same at evaluation, if there is one: an export is then a model that transformers
    /// knows.
    fn equivalent_topk(&self) -> Option<topk::TopK> {
        None
    }

    /// A Python function for exports of models that transformers does not know, of the router's name:
    /// `def NAME(z, k, settings, bias)` gets logits `z [T, E]` and returns the experts' weights `[T, E]` and which of them
    /// run, `[T, E]` bool. See `modeling_routegrad.py`, which has those of the routers here.
    fn export_code(&self) -> Option<&'static str> {
        None
    }

    /// Changes the settings so that evaluation leaves default vectors out; false if the method has none.
    fn leave_out_default_vectors(&self, _settings: &mut toml::Table) -> bool {
        false
    }

    /// Whether experts are weighted by the softmax of their logits, as the analyses of gradients assume.
    fn weighs_by_softmax(&self) -> bool {
        false
    }

    /// Whether every expert takes every token at evaluation.
    fn evaluates_all_experts(&self) -> bool {
        false
    }
}

/// The routers of this crate; [`all`] has those that were registered too.
pub const ROUTERS: &[RouterInfo] = &[
    topk::INFO,
    default::INFO,
    dense::INFO,
    densemixer::INFO,
    sparsemixer::INFO,
    remoe::INFO,
    lossfree::INFO,
];

/// Refuses a setting outside `least ..`, or with `below` outside `least .. below`.
fn within(key: &str, value: f64, least: f64, below: Option<f64>) -> Result<()> {
    if value >= least && value < below.unwrap_or(f64::INFINITY) {
        return Ok(());
    }
    Err(Error::usage(
        format!("router.{key}"),
        match below {
            Some(below) => format!("a number from {least} to below {below}"),
            None => format!("a number from {least} up"),
        },
        value.to_string(),
        format!("change it with --set router.{key}=…"),
    ))
}

/// Refuses weights that sum to 1 over the chosen experts where one is chosen.
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
