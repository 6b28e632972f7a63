//! A router that wraps another one and records the input, the choices and the incoming gradient of each MoE layer, and
//! the mean outputs of its experts when the default vectors are updated.
//!
//! It does not change the results: it adds a leaf of zeros to the layer's output, and the gradient of this leaf is g =
//! ∂loss/∂y.

use crate::config::{Config, ModelConfig};
use crate::dist::{Collective, SingleRank};
use crate::error::Result;
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::ops::add::add;
use crate::ops::combine::Defaults;
use crate::ops::dispatch::Selection;
use crate::ops::expert_mean::{ExpertSums, Weighting};
use crate::ops::sampled_outputs::SampledRows;
use crate::routers::default::VECTORS;
use crate::routers::{
    Balance, LayerPass, LayerState, OwnParameter, Pass, Phase, Router, Routing, StateTensor,
};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// The record of one MoE layer in one pass.
pub struct Seen {
    /// The layer's input `[T, D]`.
    pub x: Tensor,
    /// The experts that count as chosen.
    pub chosen: Selection,
    /// Default vectors before their update and the means m `[E, D]` that they are updated with, in a
    /// pass that updates them; m is 0 for an expert without averaged tokens.
    pub update: Option<[Tensor; 2]>,
}

/// The records of the MoE layers since the last [`Watched::take`], in the order in which the layers ran.
pub type Record = Rc<RefCell<Vec<Seen>>>;

/// The router that records. Its layers must not be recomputed in backward, because they would then be recorded twice.
struct Probe {
    inner: Box<dyn Router>,
    record: Record,
    /// Slot of the first layer's g in the store of gradients.
    first_slot: Rc<Cell<usize>>,
}

/// A model whose router is wrapped in a [`Probe`].
pub struct Watched {
    pub model: Model,
    pub record: Record,
}

impl Watched {
    /// Creates a model of `config` with `router` in a [`Probe`], on one rank, with only the cross-entropy as its loss.
    /// It takes the weights and the state that `source` has.
    ///
    /// # Errors
    /// Returns an error when the router refuses the model.
    pub fn new(config: &Config, router: Box<dyn Router>, source: &Model) -> Result<Self> {
        let mut config = config.clone();
        config.train.recompute = Default::default();
        config.balance.aux_coefficient = 0.0;
        config.balance.z_coefficient = 0.0;
        let record = Record::default();
        let first_slot = Rc::new(Cell::new(0));
        let probe = Probe {
            inner: router,
            record: record.clone(),
            first_slot: first_slot.clone(),
        };
        let mut model = Model::with_router(&config, Box::new(probe), Arc::new(SingleRank))?;
        first_slot.set(model.parameters.len());
        model.take_over(source)?;
        Ok(Watched { model, record })
    }

    /// Returns the slot of g of layer `layer` in a store of gradients, after the slots of the parameters.
    pub fn slot(&self, layer: usize) -> usize {
        self.model.parameters.len() + layer
    }

    /// Returns the number of slots that a store of gradients needs.
    pub fn slots(&self) -> usize {
        self.slot(self.model.layer_states().len())
    }

    /// Runs the model without gradients, and returns the records of its layers.
    pub fn see(&self, sequences: Sequences<'_>, phase: Phase) -> Result<Vec<Seen>> {
        let (model, tape) = (&self.model, Tape::without_gradients());
        model.loss(&tape, &model.weights(), sequences, Pass::single(phase))?;
        Ok(self.take())
    }

    /// Returns the records since the last call.
    pub fn take(&self) -> Vec<Seen> {
        self.record.take()
    }
}

impl Probe {
    /// Records the means with which the default vectors are updated.
    fn see_update(&self, sums: &ExpertSums, layer: &LayerPass<'_>) -> Result<()> {
        if let Some(seen) = self.record.borrow_mut().last_mut() {
            let vectors = layer.state(VECTORS).clone();
            let mut means = Tensor::zeros(vectors.device(), vectors.dtype(), vectors.shape());
            sums.update(&mut means, 0.0)?;
            seen.update = Some([vectors, means]);
        }
        Ok(())
    }
}

impl Router for Probe {
    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let routing = self.inner.route(tape, x, weight, layer)?;
        self.record.borrow_mut().push(Seen {
            x: x.tensor().clone(),
            chosen: routing.chosen().selection().clone(),
            update: None,
        });
        Ok(routing)
    }

    fn samples(&self, routing: &Routing, layer: &mut LayerPass<'_>) -> Result<Option<SampledRows>> {
        self.inner.samples(routing, layer)
    }

    fn learn_from_samples(
        &self,
        sums: ExpertSums,
        drawn: &SampledRows,
        layer: &mut LayerPass<'_>,
    ) -> Result<()> {
        // If the chosen tokens are averaged, their sums come later and replace these.
        self.see_update(&sums, layer)?;
        self.inner.learn_from_samples(sums, drawn, layer)
    }

    fn defaults(
        &self,
        sums: Option<ExpertSums>,
        layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        if let Some(sums) = &sums {
            self.see_update(sums, layer)?;
        }
        self.inner.defaults(sums, layer)
    }

    fn output(&self, tape: &Tape, y: Var, own: &[Var]) -> Result<Var> {
        let y = self.inner.output(tape, y, own)?;
        if !tape.is_recording() {
            return Ok(y);
        }
        let t = y.tensor();
        let zeros = Tensor::zeros(t.device(), t.dtype(), t.shape());
        let layer = self.record.borrow().len().saturating_sub(1);
        add(tape, &y, &Var::leaf(zeros, self.first_slot.get() + layer))
    }

    fn validate(&self, model: &ModelConfig) -> Result<()> {
        self.inner.validate(model)
    }

    fn initial_state(&self, model: &ModelConfig, layer: usize, seed: u64) -> Vec<StateTensor> {
        self.inner.initial_state(model, layer, seed)
    }

    fn parameters(&self, model: &ModelConfig) -> Vec<OwnParameter> {
        self.inner.parameters(model)
    }

    fn weighting(&self) -> Option<Weighting> {
        self.inner.weighting()
    }

    fn end_step(
        &self,
        model: &ModelConfig,
        layers: &mut [LayerState],
        dist: &dyn Collective,
    ) -> Result<()> {
        self.inner.end_step(model, layers, dist)
    }

    fn balance(&self) -> Balance {
        self.inner.balance()
    }
}
