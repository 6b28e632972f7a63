//! What a router keeps and sees: state per layer, committed only with an accepted step.
//!
//! During a step a layer's tensors are changed in a *pending* copy; micro-batch m reads what m − 1
//! left there. [`LayerState::commit`] makes it the state, [`LayerState::discard`] forgets it, so
//! that a step which is not applied leaves no trace.

use crate::dist::{Collective, at};
use crate::error::Result;
use crate::kernels::bindings::routegrad_draws;
use crate::ops::dispatch::{Dispatch, Selection};
use crate::ops::expert_mean::ExpertSums;
use crate::ops::over_ranks;
use crate::ops::router::{NonFinite, TopK};
use crate::ops::routing::Entropy;
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Stream};
use std::collections::VecDeque;
use std::rc::Rc;

use super::StateTensor;
use super::statistics::LayerStats;
use super::tally::{Counted, Tally};

/// What a forward pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Training: state is updated, statistics are counted.
    Train,
    /// Training's mathematics with state, counts and chosen experts as the last training pass left
    /// them: a differentiable function, for finite differences and for comparisons.
    Frozen,
    /// Evaluation: state is read.
    Evaluate,
}

/// One forward pass of the model over one micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// What the pass is for: whether state is written.
    pub phase: Phase,
    /// Micro-batches of this optimizer step.
    pub micro_batches: usize,
    /// Updates that the optimizer made before: part of the key of a router's draws.
    pub step: u64,
    /// Place of this micro-batch's first token in the global batch: the other part.
    pub first_token: u64,
}

impl Pass {
    /// Evaluation, which knows no micro-batches.
    pub const EVALUATE: Pass = Pass::single(Phase::Evaluate);

    /// The only micro-batch of a first step.
    pub const fn single(phase: Phase) -> Self {
        Pass {
            phase,
            micro_batches: 1,
            step: 0,
            first_token: 0,
        }
    }
}

/// The state of one MoE layer.
#[derive(Default)]
pub struct LayerState {
    names: Vec<&'static str>,
    committed: Vec<Tensor>,
    pending: Vec<Tensor>,
    /// The choice, the balance fractions and whatever else the router decided in the last training
    /// pass, which replays reuse.
    selection: Option<Selection>,
    fractions: Option<Tensor>,
    held: Vec<Tensor>,
    tally: Tally,
    /// The choices made since they were last taken, if they are recorded.
    record: Option<Vec<Selection>>,
    replay: VecDeque<Selection>,
    disagreements: Vec<Disagreement>,
}

/// A token whose replayed choice is not the one that the router would have made.
#[derive(Clone, Debug, PartialEq)]
pub struct Disagreement {
    /// Its number in the batch.
    pub token: usize,
    /// The experts of the replayed choice.
    pub replayed: Vec<i32>,
    /// The experts of the router's own.
    pub own: Vec<i32>,
}

impl LayerState {
    /// The state of a layer that begins with `tensors`.
    pub(crate) fn new(tensors: Vec<StateTensor>) -> Self {
        Self::with_tally(tensors, Tally::default())
    }

    /// The same, counting in `tally`.
    pub(crate) fn with_tally(tensors: Vec<StateTensor>, tally: Tally) -> Self {
        let (names, committed): (_, Vec<Tensor>) =
            tensors.into_iter().map(|t| (t.name, t.start)).unzip();
        LayerState {
            names,
            pending: committed.clone(),
            committed,
            tally,
            ..Default::default()
        }
    }

    /// The committed tensors with their names, for checkpoints.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        self.names.iter().copied().zip(&self.committed)
    }

    /// Replaces a committed tensor, from a checkpoint.
    ///
    /// # Errors
    /// When shape or dtype differ. A name that is not there is left alone and answered with false.
    pub fn restore(&mut self, name: &str, tensor: Tensor) -> Result<bool> {
        let Some(i) = self.names.iter().position(|n| *n == name) else {
            return Ok(false);
        };
        tensor.expect_shape("checkpoint", name, self.committed[i].shape())?;
        tensor.expect_dtype("checkpoint", name, self.committed[i].dtype())?;
        let tensor = tensor.on(self.committed[i].device());
        self.pending[i] = tensor.clone();
        self.committed[i] = tensor;
        Ok(true)
    }

    /// Makes the pending state the state; begins a new step.
    pub fn commit(&mut self) {
        self.committed = self.pending.clone();
        self.tally.begin_step();
    }

    /// Forgets the pending state; begins a new step.
    pub fn discard(&mut self) {
        self.pending = self.committed.clone();
        self.tally.begin_step();
    }

    /// Lets the next count of kernels begin all sums anew.
    pub(crate) fn count_anew(&mut self) {
        self.tally.count_anew();
    }

    /// Whether the next training step depends on nothing that the host would have to follow: choices are neither recorded
    /// nor replayed, and the sums begin anew.
    pub(crate) fn is_plain(&self) -> bool {
        self.record.is_none() && self.replay.is_empty() && self.tally.is_fresh()
    }

    /// Forgets what the last training pass decided, so that a step begins with the memory of the step before.
    pub(crate) fn forget_pass(&mut self) {
        self.selection = None;
        self.fractions = None;
        self.held.clear();
    }

    /// Committed and pending tensors, for a kernel that commits or discards.
    pub(crate) fn both(&mut self) -> impl Iterator<Item = (&mut Tensor, &mut Tensor)> {
        self.committed.iter_mut().zip(&mut self.pending)
    }

    /// Begins to record the choices of training passes.
    pub fn record(&mut self) {
        self.record = Some(Vec::new());
    }

    /// Ends the record and gives it, a selection for each micro-batch, to [`replay`](Self::replay).
    pub fn take_record(&mut self) -> Vec<Selection> {
        let record = self.record.take().unwrap_or_default();
        record.into_iter().map(Selection::on_host).collect()
    }

    /// Lets the next training passes take these choices instead of the router's own, one a
    /// micro-batch: two routers then do the same work, or two devices the same sums.
    pub fn replay(&mut self, choices: &[Selection]) {
        self.replay.extend(choices.iter().cloned());
    }

    /// Lets passes with state frozen take this choice, or their own again.
    pub(crate) fn force(&mut self, choice: Option<Selection>) {
        self.selection = choice;
    }

    /// Where replayed choices were not the router's own, since the last call.
    pub fn take_disagreements(&mut self) -> Vec<Disagreement> {
        std::mem::take(&mut self.disagreements)
    }

    /// Tokens that this rank trained on since the last commitment, and how many of them chose each expert, `[E]`; empty
    /// before the first.
    pub fn step_load(&self) -> (f64, Vec<f64>) {
        self.tally.step_load()
    }

    /// Lets kernels change a pending tensor by the layers' loads where those are in device memory: `change` gets it, the loads
    /// and the first element of this layer's. Answers whether they are there.
    ///
    /// # Errors
    /// Those of `change`.
    ///
    /// # Panics
    /// When the router did not declare the tensor.
    pub(crate) fn change_by_load(
        &mut self,
        name: &str,
        change: impl FnOnce(&mut Tensor, &Tensor, usize) -> Result<()>,
    ) -> Result<bool> {
        let i = self.index(name);
        let pending = &mut self.pending[i];
        let done = self
            .tally
            .device_load(|load, first| change(pending, load, first));
        done.transpose().map(|done| done.is_some())
    }

    /// A pending tensor, to update at the end of a step.
    ///
    /// # Panics
    /// When the router did not declare it.
    pub fn pending_mut(&mut self, name: &str) -> &mut Tensor {
        let i = self.index(name);
        &mut self.pending[i]
    }

    fn index(&self, name: &str) -> usize {
        match self.names.iter().position(|n| *n == name) {
            Some(i) => i,
            None => panic!("the router declared no state {name:?}"),
        }
    }

    /// Statistics since the last call.
    pub fn take_stats(&mut self) -> LayerStats {
        self.tally.take_stats()
    }

    /// The first of this rank's tokens in this step whose logits were not finite, by its place in
    /// the global batch.
    pub fn first_non_finite(&self) -> Option<usize> {
        self.tally.first_non_finite()
    }
}

fn disagreements(replayed: &Selection, own: &Selection) -> Vec<Disagreement> {
    let tokens = (0..replayed.num_tokens()).filter(|&t| replayed.experts(t) != own.experts(t));
    let of = |token| Disagreement {
        token,
        replayed: replayed.experts(token).to_vec(),
        own: own.experts(token).to_vec(),
    };
    tokens.map(of).collect()
}

/// One layer in one pass, as a router sees it.
pub struct LayerPass<'p> {
    /// The pass of the whole model.
    pub pass: Pass,
    /// The ranks that share the batch.
    pub dist: &'p dyn Collective,
    /// MoE layers from 0.
    pub layer: usize,
    /// K of the configuration.
    pub top_k: usize,
    seed: u64,
    state: &'p mut LayerState,
    replaying: bool,
    non_finite: NonFinite,
}

impl<'p> LayerPass<'p> {
    pub(crate) fn new(
        pass: Pass,
        dist: &'p dyn Collective,
        layer: usize,
        top_k: usize,
        seed: u64,
        state: &'p mut LayerState,
        recomputing: bool,
    ) -> Self {
        let replaying = recomputing && pass.phase == Phase::Train || pass.phase == Phase::Frozen;
        LayerPass {
            pass,
            dist,
            layer,
            top_k,
            seed,
            state,
            replaying,
            non_finite: NonFinite::At(None),
        }
    }

    /// Whether this pass may change state: training, and not a second run of a recompute segment.
    pub fn updates_state(&self) -> bool {
        self.pass.phase == Phase::Train && !self.replaying
    }

    /// The experts that run: chosen by `choose`, or in a replay those of the first run.
    ///
    /// # Errors
    /// Those of `choose`.
    pub fn select(&mut self, choose: impl FnOnce() -> Result<TopK>) -> Result<Rc<Dispatch>> {
        if let (true, Some(selection)) = (self.replaying, &self.state.selection) {
            return Ok(Rc::new(Dispatch::new(selection.clone())));
        }
        let TopK {
            mut selection,
            non_finite,
        } = choose()?;
        self.non_finite = non_finite;
        if self.updates_state() {
            if let Some(replayed) = self.state.replay.pop_front() {
                self.state
                    .disagreements
                    .extend(disagreements(&replayed, &selection));
                selection = replayed;
            }
            if let Some(record) = &mut self.state.record {
                record.push(selection.clone());
            }
            self.state.selection = Some(selection.clone());
        }
        Ok(Rc::new(Dispatch::new(selection)))
    }

    /// What else a router decides once for a micro-batch: `decide` gives it, or in a replay the
    /// first run did.
    ///
    /// # Errors
    /// Those of `decide`.
    pub fn hold(&mut self, decide: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        if self.replaying && !self.state.held.is_empty() {
            return Ok(self.state.held.clone());
        }
        let decided = decide()?;
        if self.updates_state() {
            self.state.held = decided.clone();
        }
        Ok(decided)
    }

    /// The random numbers of this layer and step. Their index begins with a token's place in the
    /// global batch, [`Pass::first_token`] and on.
    pub fn draws(&self) -> Stream {
        Stream::new(self.seed, Purpose::Routing, self.pass.step, self.layer)
    }

    /// This micro-batch's place among those of its step: the ranks' parts of one follow one another.
    pub fn micro_batch(&self, tokens: usize) -> usize {
        let whole = (tokens * self.dist.size()).max(1) as u64;
        (self.pass.first_token / whole) as usize
    }

    /// The random numbers of this layer and step for another purpose than routing.
    pub fn draws_for(&self, purpose: Purpose) -> Stream {
        Stream::new(self.seed, purpose, self.pass.step, self.layer)
    }

    /// The seed, step and first token that [`draws`](Self::draws) and their index begin with, for kernels that
    /// draw.
    pub fn draws_for_kernels(&self) -> routegrad_draws {
        routegrad_draws {
            seed: self.seed,
            step: self.pass.step,
            first_token: self.pass.first_token,
        }
    }

    /// A state tensor: the pending one in training, the committed one at evaluation.
    ///
    /// # Panics
    /// When the router did not declare it.
    pub fn state(&self, name: &str) -> &Tensor {
        let i = self.state.index(name);
        if self.pass.phase == Phase::Evaluate {
            &self.state.committed[i]
        } else {
            &self.state.pending[i]
        }
    }

    /// A pending state tensor, to update.
    ///
    /// # Panics
    /// When the router did not declare it, or this pass may not change state.
    pub fn state_mut(&mut self, name: &str) -> &mut Tensor {
        assert!(
            self.updates_state(),
            "state changes in a first training pass alone"
        );
        self.state.pending_mut(name)
    }

    /// Adds up what the ranks counted in their parts of a micro-batch, in a pass that changes state;
    /// any other is this rank's own affair and sums nothing.
    ///
    /// # Errors
    /// Those of [`Collective::sum`].
    pub fn sum_over_ranks(&self, values: &mut [f64]) -> Result<()> {
        if self.updates_state() {
            at(self.dist, || format!("sums of MoE layer {}", self.layer));
            self.dist.sum(values)?;
        }
        Ok(())
    }

    /// Replaces a tensor by its sum over the ranks, where it lies.
    ///
    /// # Errors
    /// When a rank has left, or no kernel adds up such numbers.
    fn sum_tensor(&self, tensor: &mut Tensor) -> Result<()> {
        match self.state.tally.ranks() {
            Some(ranks) => over_ranks::sum(ranks, tensor),
            None => tensor.sum_over_ranks(self.dist),
        }
    }

    /// Sums of the experts' outputs of all ranks.
    ///
    /// # Errors
    /// When a rank has left, or a kernel fails.
    pub(crate) fn sums_of_all_ranks(&self, sums: ExpertSums) -> Result<ExpertSums> {
        match self.dist.size() {
            1 => Ok(sums),
            _ => sums.over_ranks(|tensor| self.sum_tensor(tensor)),
        }
    }

    /// The sum over the ranks of what each counted in device memory, in a pass that changes state on several ranks; a second
    /// run of the pass gets that of the first. Otherwise none: what this rank counted is all that there is.
    ///
    /// # Errors
    /// As [`sum_tensor`](Self::sum_tensor).
    pub(crate) fn counted_by_all(&mut self, own: &Tensor) -> Result<Option<Tensor>> {
        let all = match self.state.tally.ranks().filter(|_| self.updates_state()) {
            Some(ranks) => {
                at(self.dist, || format!("counts of MoE layer {}", self.layer));
                let mut all = Tensor::unspecified(own.device(), own.dtype(), own.shape());
                over_ranks::sum_to(ranks, &mut all, own, 0..own.elements())?;
                vec![all]
            }
            None => Vec::new(),
        };
        Ok(self.hold(|| Ok(all))?.into_iter().next())
    }

    /// Adds this micro-batch to the layer's statistics and to what the end of the step sees. Gives `f_i [E]`, the share of
    /// slots that went to expert i: of the step so far and all ranks (`over_step`), or of this micro-batch alone; a replay
    /// counts nothing and gives those of the first run.
    ///
    /// # Errors
    /// When a kernel or a sum over ranks fails.
    pub fn count(
        &mut self,
        chosen: &Dispatch,
        entropy: Entropy,
        over_step: bool,
    ) -> Result<Tensor> {
        if self.replaying {
            if let Some(fractions) = &self.state.fractions {
                return Ok(fractions.clone());
            }
            return Ok(self.state.tally.fractions_of(chosen));
        }
        let trains = self.updates_state();
        let counted = Counted {
            chosen,
            entropy,
            non_finite: self.non_finite.clone(),
            first_token: self.pass.first_token,
            trains,
            over_step: over_step && trains,
        };
        if trains {
            at(self.dist, || format!("counts of MoE layer {}", self.layer));
        }
        let fractions = self.state.tally.count(&counted, self.dist)?;
        if trains {
            self.state.fractions = Some(fractions.clone());
        }
        Ok(fractions)
    }
}
