//! The state that a router keeps per layer, which is committed only with an accepted step, and the data of a pass
//! that a router reads.
//!
//! During a step a layer's tensors are changed in a *pending* copy; micro-batch m reads the pending copy that
//! micro-batch m − 1 wrote. [`LayerState::commit`] makes the pending copy the state; [`LayerState::discard`] drops
//! it, so that a step which is not applied changes nothing.

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
use super::replay::{Disagreement, disagreements};
use super::statistics::LayerStats;
use super::tally::{Counted, Tally};

/// What a forward pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Training: state is updated, statistics are counted.
    Train,
    /// The same computation as training, but with the state, counts and chosen experts of the last training pass held
    /// fixed. This is a differentiable function, for finite differences and for comparisons.
    Frozen,
    /// Evaluation: state is read.
    Evaluate,
}

/// One forward pass of the model over one micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Purpose of the pass, which decides whether state is written.
    pub phase: Phase,
    /// Number of micro-batches of this optimizer step.
    pub micro_batches: usize,
    /// Number of updates that the optimizer made before: part of the key of a router's draws.
    pub step: u64,
    /// Index in the global batch of this micro-batch's first token: the other part of the key.
    pub first_token: u64,
}

impl Pass {
    /// An evaluation pass, which has no micro-batches.
    pub const EVALUATE: Pass = Pass::single(Phase::Evaluate);

    /// Returns the pass of the only micro-batch of the first step.
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
    /// The choice, the balance fractions and all other decisions of the router in the last training pass, which
    /// replays reuse.
    selection: Option<Selection>,
    fractions: Option<Tensor>,
    held: Vec<Tensor>,
    tally: Tally,
    /// The choices since [`take_record`](Self::take_record) was last called, if choices are recorded.
    record: Option<Vec<Selection>>,
    replay: VecDeque<Selection>,
    disagreements: Vec<Disagreement>,
}

impl LayerState {
    /// Creates the state of a layer with the initial `tensors`.
    pub(crate) fn new(tensors: Vec<StateTensor>) -> Self {
        Self::with_tally(tensors, Tally::default())
    }

    /// Creates the state of a layer with the initial `tensors`, which counts in `tally`.
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

    /// Returns the committed tensors with their names, for checkpoints.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        self.names.iter().copied().zip(&self.committed)
    }

    /// Replaces a committed tensor, from a checkpoint.
    ///
    /// # Errors
    /// Returns an error when shape or dtype differ. If there is no tensor `name`, returns `Ok(false)` and changes
    /// nothing.
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

    /// Makes the pending state the committed state, and begins a new step.
    pub fn commit(&mut self) {
        self.committed = self.pending.clone();
        self.tally.begin_step();
    }

    /// Drops the pending state, and begins a new step.
    pub fn discard(&mut self) {
        self.pending = self.committed.clone();
        self.tally.begin_step();
    }

    /// Makes the next count by kernels reset all sums first.
    pub(crate) fn count_anew(&mut self) {
        self.tally.count_anew();
    }

    /// Returns whether the next training step needs no action of the host: choices are neither recorded nor replayed,
    /// and the sums are reset.
    pub(crate) fn is_plain(&self) -> bool {
        self.record.is_none() && self.replay.is_empty() && self.tally.is_fresh()
    }

    /// Drops the decisions of the last training pass, so that a step begins with the same free memory as the step
    /// before.
    pub(crate) fn forget_pass(&mut self) {
        self.selection = None;
        self.fractions = None;
        self.held.clear();
    }

    /// Returns the committed and pending tensors, for a kernel that commits or discards.
    pub(crate) fn both(&mut self) -> impl Iterator<Item = (&mut Tensor, &mut Tensor)> {
        self.committed.iter_mut().zip(&mut self.pending)
    }

    /// Starts to record the choices of training passes.
    pub fn record(&mut self) {
        self.record = Some(Vec::new());
    }

    /// Stops recording, and returns one selection for each micro-batch, which [`replay`](Self::replay) accepts.
    pub fn take_record(&mut self) -> Vec<Selection> {
        let record = self.record.take().unwrap_or_default();
        record.into_iter().map(Selection::on_host).collect()
    }

    /// Makes the next training passes use these choices instead of the router's own, one per micro-batch. Two
    /// routers, or two devices, can then be compared on the same work.
    pub fn replay(&mut self, choices: &[Selection]) {
        self.replay.extend(choices.iter().cloned());
    }

    /// Makes passes with frozen state use this choice; `None` restores their own choice.
    pub(crate) fn force(&mut self, choice: Option<Selection>) {
        self.selection = choice;
    }

    /// Returns the tokens, since the last call, for which the replayed choice differs from the router's own.
    pub fn take_disagreements(&mut self) -> Vec<Disagreement> {
        std::mem::take(&mut self.disagreements)
    }

    /// Returns the number of tokens that this rank trained on since the last commit, and the number that chose each
    /// expert, `[E]`; empty before the first token.
    pub fn step_load(&self) -> (f64, Vec<f64>) {
        self.tally.step_load()
    }

    /// If the layers' loads are in device memory, calls `change` with a pending tensor, the loads, and the index of
    /// this layer's first element in the loads, so that a kernel can update the tensor. Returns whether the loads are
    /// in device memory.
    ///
    /// # Errors
    /// The errors of `change`.
    ///
    /// # Panics
    /// Panics when the router did not declare the tensor.
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

    /// Returns a pending tensor, for an update at the end of a step.
    ///
    /// # Panics
    /// Panics when the router did not declare it.
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

    /// Returns the statistics since the last call.
    pub fn take_stats(&mut self) -> LayerStats {
        self.tally.take_stats()
    }

    /// Returns the index in the global batch of this rank's first token in this step whose logits were not finite.
    pub fn first_non_finite(&self) -> Option<usize> {
        self.tally.first_non_finite()
    }
}

/// One layer in one pass: the interface of a router to its state.
pub struct LayerPass<'p> {
    /// The pass of the whole model.
    pub pass: Pass,
    /// The ranks that share the batch.
    pub dist: &'p dyn Collective,
    /// Index of the MoE layer, from 0.
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

    /// Returns whether this pass may change state: it is a training pass, and not the second run of a recompute
    /// segment.
    pub fn updates_state(&self) -> bool {
        self.pass.phase == Phase::Train && !self.replaying
    }

    /// Returns the experts that run: those chosen by `choose`, or in a replay those of the first run.
    ///
    /// # Errors
    /// The errors of `choose`.
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
                let found = disagreements(&replayed, &selection)?;
                self.state.disagreements.extend(found);
                selection = replayed;
            }
            if let Some(record) = &mut self.state.record {
                record.push(selection.clone());
            }
            self.state.selection = Some(selection.clone());
        }
        Ok(Rc::new(Dispatch::new(selection)))
    }

    /// Returns further decisions that a router makes once per micro-batch: the result of `decide`, or in a replay
    /// that of the first run.
    ///
    /// # Errors
    /// The errors of `decide`.
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

    /// Returns the random numbers of this layer and step. A token's index in the global batch, which begins at
    /// [`Pass::first_token`], determines the index of its draws.
    pub fn draws(&self) -> Stream {
        Stream::new(self.seed, Purpose::Routing, self.pass.step, self.layer)
    }

    /// Returns the index of this micro-batch in its step. The ranks' parts of a micro-batch are consecutive in the
    /// global batch.
    pub fn micro_batch(&self, tokens: usize) -> usize {
        let whole = (tokens * self.dist.size()).max(1) as u64;
        (self.pass.first_token / whole) as usize
    }

    /// Returns the random numbers of this layer and step for a purpose other than routing.
    pub fn draws_for(&self, purpose: Purpose) -> Stream {
        Stream::new(self.seed, purpose, self.pass.step, self.layer)
    }

    /// Returns the seed, step and first token that determine [`draws`](Self::draws), for kernels that draw random
    /// numbers.
    pub fn draws_for_kernels(&self) -> routegrad_draws {
        routegrad_draws {
            seed: self.seed,
            step: self.pass.step,
            first_token: self.pass.first_token,
        }
    }

    /// Returns a state tensor: the pending one in training, the committed one at evaluation.
    ///
    /// # Panics
    /// Panics when the router did not declare it.
    pub fn state(&self, name: &str) -> &Tensor {
        let i = self.state.index(name);
        if self.pass.phase == Phase::Evaluate {
            &self.state.committed[i]
        } else {
            &self.state.pending[i]
        }
    }

    /// Returns a pending state tensor for modification.
    ///
    /// # Panics
    /// Panics when the router did not declare it, or this pass must not change state.
    pub fn state_mut(&mut self, name: &str) -> &mut Tensor {
        assert!(
            self.updates_state(),
            "state may change only in the first run of a training pass"
        );
        self.state.pending_mut(name)
    }

    /// In a pass that changes state, replaces `values` by their sums over the ranks. Other passes are local to this
    /// rank, and `values` do not change.
    ///
    /// # Errors
    /// The errors of [`Collective::sum`].
    pub fn sum_over_ranks(&self, values: &mut [f64]) -> Result<()> {
        if self.updates_state() {
            at(self.dist, || format!("sums of MoE layer {}", self.layer));
            self.dist.sum(values)?;
        }
        Ok(())
    }

    /// Replaces a tensor by its sum over the ranks, in host or device memory.
    ///
    /// # Errors
    /// Returns an error when a rank has left, or no kernel supports the tensor's dtype.
    fn sum_tensor(&self, tensor: &mut Tensor) -> Result<()> {
        match self.state.tally.ranks() {
            Some(ranks) => over_ranks::sum(ranks, tensor),
            None => tensor.sum_over_ranks(self.dist),
        }
    }

    /// Returns the sums of the experts' outputs over all ranks.
    ///
    /// # Errors
    /// Returns an error when a rank has left, or a kernel fails.
    pub(crate) fn sums_of_all_ranks(&self, sums: ExpertSums) -> Result<ExpertSums> {
        match self.dist.size() {
            1 => Ok(sums),
            _ => sums.over_ranks(|tensor| self.sum_tensor(tensor)),
        }
    }

    /// In a pass that changes state on several ranks, returns the sum over the ranks of the counts `own` in device
    /// memory. The second run of a pass gets the sum of the first. Otherwise returns `None`: the counts of this rank
    /// are the total.
    ///
    /// # Errors
    /// The same errors as [`sum_tensor`](Self::sum_tensor).
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

    /// Adds this micro-batch to the layer's statistics and to the loads of the step. Returns `f_i [E]`, the fraction
    /// of slots that went to expert i: over the step so far and all ranks (`over_step`), or over this micro-batch
    /// only. A replay counts nothing and returns the fractions of the first run.
    ///
    /// # Errors
    /// Returns an error when a kernel or a sum over ranks fails.
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
