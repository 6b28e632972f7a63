//! A router that watches another one: what a MoE layer saw, chose and got as its gradient, and what
//! its experts' mean outputs were when the default vectors were asked for.
//!
//! It changes nothing: to the layer's output it adds a leaf of zeros, whose gradient is then
//! g = ∂loss/∂y.

use crate::config::{Config, ModelConfig};
use crate::dist::{Collective, SingleRank};
use crate::error::Result;
use crate::model::Model;
use crate::ops::add::add;
use crate::ops::combine::Defaults;
use crate::ops::dispatch::Selection;
use crate::ops::expert_mean::{ExpertSums, Weighting};
use crate::ops::sampled_outputs::SampledRows;
use crate::routers::default::VECTORS;
use crate::routers::{Balance, LayerPass, LayerState, OwnParameter, Router, Routing, StateTensor};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What one MoE layer did in one pass.
pub struct Seen {
    /// The layer's input `[T, D]`.
    pub x: Tensor,
    /// The experts that count as chosen.
    pub chosen: Selection,
    /// Default vectors before their update and the means m `[E, D]` that they are updated with, in a
    /// pass that updates them; m of an expert without tokens is its ê.
    pub update: Option<[Tensor; 2]>,
}

/// What the MoE layers did since last taken, in the order in which they ran.
pub type Record = Rc<RefCell<Vec<Seen>>>;

/// The watching router. Its layers must not be recomputed in backward: they would be seen twice.
struct Probe {
    inner: Box<dyn Router>,
    record: Record,
    /// Slot of the first layer's g in the store of gradients.
    first_slot: Rc<Cell<usize>>,
}

/// A model whose router is watched.
pub struct Watched {
    pub model: Model,
    pub record: Record,
}

impl Watched {
    /// The model of `config` with `router`, watched, on one rank and without losses beside the
    /// cross-entropy; its weights and state are those of `source` wherever it has them.
    ///
    /// # Errors
    /// When the router refuses the model.
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
        let mut model = Model::with_router(&config, Box::new(probe), Box::new(SingleRank))?;
        first_slot.set(model.parameters.len());
        model.take_over(source)?;
        Ok(Watched { model, record })
    }

    /// Slot of layer `layer`'s g in a store of gradients, behind those of the parameters.
    pub fn slot(&self, layer: usize) -> usize {
        self.model.parameters.len() + layer
    }

    /// Slots that a store of gradients needs.
    pub fn slots(&self) -> usize {
        self.slot(self.model.layer_states().len())
    }

    /// What the layers did since this was last called.
    pub fn take(&self) -> Vec<Seen> {
        self.record.take()
    }
}

impl Probe {
    /// Records what default vectors are updated with.
    fn see_update(&self, sums: &ExpertSums, layer: &LayerPass<'_>) -> Result<()> {
        if let Some(seen) = self.record.borrow_mut().last_mut() {
            let vectors = layer.state(VECTORS).clone();
            let mut means = vectors.clone();
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
        // Where the chosen tokens are averaged, their sums come after these and stand over them.
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
