//! One optimizer step: micro-batches forward and backward, clipping, update, and commit of the routers' state. A step
//! with a value that is not finite is not applied and changes nothing.
//!
//! On several ranks micro-batch m of the step is cut into equal, consecutive parts
//! (`Collective::part`); losses, gradients and statistics are those of the global batch, and all
//! ranks make the same update, or skip it for the same reason.

mod launched;
mod non_finite;
mod readback;
mod replay;
mod shares;

use crate::config::TrainConfig;
use crate::device::{Device, counters, timeline};
use crate::dist::{DeviceRanks, at, lost};
use crate::error::{Error, Result};
use crate::kernels::{launchers, trace};
use crate::model::batch::Sequences;
use crate::model::{Inputs, Model};
use crate::routers::{LayerState, LayerStats, Pass, Phase};
use crate::tape::{Gradients, Tape};
use crate::tensor::Tensor;
use crate::train::optimizer::{AdamW, DeviceStep, Settings, Shards, gradient_norm, reduce};
pub use launched::Launched;
use non_finite::{first_of_ranks, of_outcome};
use readback::{begin_readback, by_name, vectors_of};
use replay::{LaunchMode, Replay, common_mode};
use shares::{equal_shares, shape_of, sum_gradients};
use std::collections::BTreeMap;
use std::time::Duration;

/// What a step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Mean cross-entropy over the global batch, in nats.
    pub cross_entropy: f64,
    /// Auxiliary loss, multiplied by its coefficient.
    pub auxiliary: f64,
    /// z-loss, multiplied by its coefficient.
    pub z: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// The name of the value that was not finite, if the step was skipped.
    pub skipped: Option<String>,
    /// Routing statistics of every MoE layer.
    pub layers: Vec<LayerStats>,
    /// The vectors of the router's state after the step, by name and MoE layer.
    pub router_state: BTreeMap<&'static str, Vec<Vec<f64>>>,
}

/// Executes optimizer steps on a model. It owns the optimizer, the memory of gradients and inputs, and, on a device
/// with kernels, the captured graph of a step.
pub struct StepExecutor {
    /// The optimizer with its moments.
    pub optimizer: AdamW,
    gradients: Gradients,
    clip: f64,
    /// The micro-batches of the step.
    inputs: Vec<Inputs>,
    /// The data for the end of a step on a device with kernels.
    device: Option<DeviceStep>,
    /// The replay of steps on such a device, unless the configuration disables it.
    replay: Option<Replay>,
    /// Number of steps launched on such a device whose results were not read yet.
    unread: usize,
    /// The ranks for communication in device memory, if there are several.
    ranks: Option<DeviceRanks>,
    /// The number of micro-batches, and the smallest and largest number of sequences of one, in the last step for
    /// which all ranks agreed on these.
    shape: Option<[usize; 3]>,
}

impl StepExecutor {
    /// Creates an executor. With several ranks, the optimizer of each has a share of the parameters.
    pub fn new(config: &TrainConfig, model: &Model) -> Self {
        let (parameters, dist) = (&model.parameters, model.dist());
        let shards = Shards::new(parameters, dist.rank(), dist.size());
        let shards = match model.device_ranks() {
            Some(_) => shards.shared_out(),
            None => shards,
        };
        Self::with_shards(config, model, shards)
    }

    /// Creates an executor with the given shards, for example unsharded on every rank.
    pub fn with_shards(config: &TrainConfig, model: &Model, shards: Shards) -> Self {
        let (device, parameters) = (model.device(), &model.parameters);
        let new = || DeviceStep::new(device, parameters, &shards, model.device_ranks());
        StepExecutor {
            device: (device != Device::Cpu).then(new),
            unread: 0,
            ranks: model.device_ranks(),
            shape: None,
            optimizer: AdamW::sharded(config, parameters, shards),
            gradients: Gradients::new(model.parameters.len()),
            clip: config.gradient_clip,
            inputs: Vec::new(),
            replay: (device != Device::Cpu && config.graph).then(Replay::default),
        }
    }

    /// On a device with kernels, keeps on this rank only the lower halves of the weights that it updates.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn share_out_weights(&self, model: &mut Model) -> Result<()> {
        let shards = self.optimizer.shards();
        if self.device.is_none() || shards.is_whole() {
            return Ok(());
        }
        let mut all = model.parameters.iter_mut().enumerate();
        all.try_for_each(|(i, parameter)| parameter.value.keep_lower_halves(shards.own(i)))
    }

    /// Returns the gradients of the last step over the global batch, before clipping. On several ranks with a sharded
    /// optimizer, only this rank's share is summed over the ranks; the other gradients are this rank's contributions.
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// Makes one step on `micro_batches`, this rank's part of each micro-batch, with equally many sequences each, at
    /// learning rate `rate`. The loss is the mean over all micro-batches.
    ///
    /// On a device with kernels, the complete step is launched without waiting, and its results are read when it has
    /// finished.
    ///
    /// # Errors
    /// Returns an error when the sequences do not fit the model, micro-batches differ in size, the ranks do not share them
    /// equally, or an operation fails.
    pub fn step(
        &mut self,
        model: &mut Model,
        micro_batches: &[Sequences],
        rate: f64,
    ) -> Result<StepReport> {
        let launched = self.launch(model, micro_batches, rate)?;
        self.report(model, launched)
    }

    /// Runs the step up to its update. On a device with kernels this includes the update, and the next step may be
    /// launched before the [`report`](Self::report) of this step, if this step [was
    /// replayed](Launched::was_replayed).
    ///
    /// # Errors
    /// The same errors as [`step`](Self::step).
    pub fn launch(
        &mut self,
        model: &mut Model,
        micro_batches: &[Sequences],
        rate: f64,
    ) -> Result<Launched> {
        self.launch_until(model, micro_batches, rate, &mut |_| Ok(false))
    }

    /// Like [`launch`](Self::launch), but the step can be abandoned on the CPU, which computes during the call:
    /// `give_up` is called after every micro-batch but the last, with the number of finished micro-batches. If it
    /// returns true, which it must do on all ranks alike, the step [has no effect](Launched::is_given_up).
    ///
    /// # Errors
    /// The same errors as [`step`](Self::step), and the errors of `give_up`.
    pub fn launch_until(
        &mut self,
        model: &mut Model,
        micro_batches: &[Sequences],
        rate: f64,
        give_up: &mut dyn FnMut(usize) -> Result<bool>,
    ) -> Result<Launched> {
        self.agree_on_shares(model, micro_batches)?;
        let mut states = model.layer_states_mut();
        states.iter_mut().for_each(LayerState::forget_pass);
        drop(states);
        self.take_inputs(model, micro_batches)?;
        let settings = self.optimizer.settings(rate, self.clip);
        let possible = self.prepare(model, settings)?;
        let mut launched = Launched {
            rate,
            sums: [0.0; 3],
            given_up: false,
            replayed: false,
            readback: None,
        };
        if self.ranks.is_some() {
            model.dist().begin_device_step();
        }
        // The simulator's launches wait, and a GPU's launches may wait if its queue is full.
        self.awaited(model, |own, model| {
            match own.replay.take_if(|_| possible) {
                None => match own.run(model, give_up)? {
                    Some(sums) => launched.sums = sums,
                    None => launched.given_up = true,
                },
                Some(mut replay) => {
                    let replayed = own.replayed(model, &mut replay);
                    own.replay = Some(replay);
                    launched.replayed = replayed?;
                }
            }
            Ok(())
        })?;
        if let Some(device) = &self.device {
            launched.readback = Some(begin_readback(model, device)?);
            self.unread += 1;
            let mut states = model.layer_states_mut();
            states.iter_mut().for_each(LayerState::count_anew);
            model.dist().trust_device_calls();
        }
        Ok(launched)
    }

    /// Runs `work` that may wait for the device, whose communication waits for the other ranks.
    fn awaited<R>(
        &mut self,
        model: &mut Model,
        wait: impl FnOnce(&mut Self, &mut Model) -> Result<R>,
    ) -> Result<R> {
        if self.ranks.is_none() {
            return wait(self, model);
        }
        model.dist().await_device(true);
        let done = wait(self, model);
        model.dist().await_device(false);
        done
    }

    /// Runs the step by replaying its graph and returns true, or runs it without a graph and returns false if there
    /// is no valid graph.
    fn replayed(&mut self, model: &mut Model, replay: &mut Replay) -> Result<bool> {
        let device = model.device();
        let shape = self.inputs.iter().map(Inputs::places).collect();
        for inputs in &self.inputs {
            inputs.check(model.config().vocab_size)?;
        }
        at(model.dist(), || replay.words().into());
        let (several, in_flight) = (self.ranks.is_some(), self.unread > 0);
        let mode = |model: &Model, replay: &Replay| {
            let own = replay.mode(device, &shape);
            match several {
                true => common_mode(model.dist(), own, in_flight),
                false => Ok(own),
            }
        };
        let mut launch = mode(model, replay)?;
        if launch == LaunchMode::Capture {
            let step = || self.run(model, &mut |_| Ok(false)).map(drop);
            replay.capture(device, &shape, step);
            let mut states = model.layer_states_mut();
            states.iter_mut().for_each(LayerState::forget_pass);
            states.iter_mut().for_each(LayerState::count_anew);
            drop(states);
            launch = mode(model, replay)?;
        }
        let done = launch == LaunchMode::Replay && replay.run(device, &shape)?;
        match done {
            true => counters::replayed(),
            false => drop(replay.watch(shape, || self.run(model, &mut |_| Ok(false)))?),
        }
        Ok(done)
    }

    /// Copies the micro-batches to the model's inputs.
    fn take_inputs(&mut self, model: &Model, micro_batches: &[Sequences]) -> Result<()> {
        self.inputs.truncate(micro_batches.len());
        for (m, sequences) in micro_batches.iter().enumerate() {
            match self.inputs.get_mut(m) {
                Some(inputs) => inputs.set(*sequences)?,
                None => self.inputs.push(Inputs::new(*sequences, model.device())?),
            }
        }
        Ok(())
    }

    /// Copies to a device with kernels the data that changes between steps. Returns whether the step may be captured
    /// or replayed, which requires that choices are neither recorded nor replayed, that launches are neither recorded
    /// nor waited for, and, with several ranks, that the optimizer is sharded and each rank is a separate process.
    fn prepare(&mut self, model: &mut Model, settings: Settings) -> Result<bool> {
        let Some(device) = &mut self.device else {
            return Ok(false);
        };
        let (optimizer, gradients) = (&mut self.optimizer, &mut self.gradients);
        let moved = device.prepare(optimizer, &mut model.parameters, gradients, settings)?;
        let mut states = model.layer_states_mut();
        let moved = device.prepare_states(&mut states) || moved;
        let plain = states.iter().all(LayerState::is_plain);
        drop(states);
        if let Some(tally) = model.device_tally() {
            tally.keep_in_place();
        }
        if let Some(replay) = self.replay.as_mut().filter(|_| moved) {
            replay.forget();
        }
        // With an unsharded optimizer on several ranks, the host adds the gradients. Ranks that are threads of one
        // process allocate memory while others replay.
        let whole = self.optimizer.shards().is_whole();
        let recorded = timeline::recorded() || trace::recorded();
        let repeats = self.ranks.is_none() || !whole && !model.dist().shares_process();
        Ok(plain && repeats && !recorded && !launchers::waits())
    }

    /// Rejects micro-batches for which equal weights would not give the mean over the global batch. On a device with
    /// kernels, the hosts of the ranks communicate about this only when the shape of the micro-batches changes.
    fn agree_on_shares(&mut self, model: &Model, micro_batches: &[Sequences]) -> Result<()> {
        let shape = shape_of(micro_batches);
        if self.ranks.is_some() && self.shape == Some(shape) {
            return Ok(());
        }
        equal_shares(model.dist(), shape)?;
        self.shape = Some(shape);
        Ok(())
    }

    /// Runs forward and backward of all micro-batches, and, on a device with kernels, launches the rest of the step.
    /// Returns the summed losses if the host knows them, and `None` for an abandoned step.
    fn run(
        &mut self,
        model: &mut Model,
        give_up: &mut dyn FnMut(usize) -> Result<bool>,
    ) -> Result<Option<[f64; 3]>> {
        let n = self.inputs.len();
        let (rank, ranks) = (model.dist().rank(), model.dist().size());
        let share = 1.0 / (n * ranks) as f64;
        self.gradients.reset();
        let mut sums = [0.0; 3];
        let weights = model.weights();
        for (m, inputs) in self.inputs.iter().enumerate() {
            // The ranks' parts of a micro-batch are consecutive.
            let place = m * ranks + rank;
            let pass = Pass {
                phase: Phase::Train,
                micro_batches: n,
                step: self.optimizer.steps(),
                first_token: (place * inputs.tokens()) as u64,
            };
            let tape = Tape::new();
            let losses = model.loss_of(&tape, &weights, inputs, pass)?;
            match &mut self.device {
                Some(device) => device.add_losses(&losses, share, m == 0)?,
                None => {
                    for (sum, part) in sums.iter_mut().zip(losses.parts()?) {
                        *sum += share * part;
                    }
                }
            }
            tape.backward(&losses.total, share, &mut self.gradients)?;
            if self.device.is_none() && m + 1 < n && give_up(m + 1)? {
                for state in model.layer_states_mut().iter_mut() {
                    state.discard();
                    state.take_stats();
                }
                return Ok(None);
            }
        }
        drop(weights); // otherwise the update would copy the shared memory
        at(model.dist(), || "gradients".into());
        let (shards, gradients) = (self.optimizer.shards(), &mut self.gradients);
        match (shards.is_whole(), &self.ranks) {
            (true, _) => sum_gradients(model, gradients)?,
            (false, None) => shards.reduce(model.dist(), &model.parameters, gradients)?,
            (false, Some(ranks)) => reduce(ranks, shards, &model.parameters, gradients)?,
        }
        if let Some(device) = &mut self.device {
            let tally = model.device_tally();
            let flags = tally.as_ref().map(|t| t.flags());
            if let Some(ranks) = &self.ranks {
                at(model.dist(), || "losses and counts".into());
                device.sum_over_ranks(ranks)?;
                if let Some(tally) = &tally {
                    tally.sum_over_ranks()?;
                }
            }
            let (optimizer, gradients) = (&mut self.optimizer, &mut self.gradients);
            device.update(optimizer, &mut model.parameters, gradients, flags)?;
            // The commit discards the pending state of a skipped step.
            model.end_step()?;
            device.commit(&mut model.layer_states_mut())?;
        }
        Ok(Some(sums))
    }

    /// Makes the steps launched from now on inform the other ranks whether this rank was `asked` to stop. Returns
    /// whether a report contained a stop request of any rank, or `None` if steps do not carry stop requests.
    pub fn ask_to_stop(&mut self, asked: bool) -> Option<bool> {
        if self.optimizer.shards().is_whole() {
            return None;
        }
        self.device.as_mut().map(|device| device.ask_to_stop(asked))
    }

    /// Returns the error because of which a step could not be captured as a graph, so that steps are launched without
    /// one.
    pub fn graph_error(&self) -> Option<&Error> {
        self.replay.as_ref().and_then(Replay::error)
    }

    /// Returns the report of a launched step. Steps must be reported in the order of their launch.
    ///
    /// # Errors
    /// Returns an error when a sum over ranks, the update on the CPU or a kernel fails.
    pub fn report(&mut self, model: &mut Model, launched: Launched) -> Result<StepReport> {
        if let Some(readback) = launched.readback {
            self.unread -= 1;
            let results = self.awaited(model, |_, _| readback.wait())?;
            // A replayed step also ends when its transfers were aborted, with wrong sums.
            if let Some(text) = model.dist().failure_within(Duration::ZERO) {
                return Err(lost(text));
            }
            return self.report_from(model, &results);
        }
        let mut report = self.update_on_cpu(model, launched.sums, launched.rate)?;
        at(model.dist(), || "routing statistics".into());
        for layer in &mut report.layers {
            *layer = std::mem::take(layer).over_ranks(model.dist())?;
        }
        Ok(report)
    }

    /// Returns the report of a step on a device with kernels, from its readback.
    fn report_from(&mut self, model: &Model, results: &[Tensor]) -> Result<StepReport> {
        let (Some(device), [outcome, stop, stats, vectors @ ..]) = (&mut self.device, results)
        else {
            unreachable!("the readback begins with outcome, stop flag and statistics")
        };
        device.read_stop(stop)?;
        let outcome = device.outcome(outcome, &mut self.optimizer);
        let states = model.layer_states();
        let names = vectors_of(&states).map(|(name, _)| name);
        Ok(StepReport {
            cross_entropy: outcome.losses[0],
            auxiliary: outcome.losses[1],
            z: outcome.losses[2],
            gradient_norm: outcome.norm,
            skipped: of_outcome(&outcome),
            layers: LayerStats::of_rows(stats),
            router_state: by_name(names.zip(vectors))?,
        })
    }

    fn update_on_cpu(
        &mut self,
        model: &mut Model,
        mut sums: [f64; 3],
        rate: f64,
    ) -> Result<StepReport> {
        at(model.dist(), || "losses and norm".into());
        model.dist().sum(&mut sums)?;
        let shards = self.optimizer.shards();
        let norm = match shards.is_whole() {
            true => gradient_norm(&self.gradients, model.parameters.len())?,
            false => shards.norm(model.dist(), &self.gradients)?,
        };
        let skipped = first_of_ranks(model, sums[0], norm)?;
        if skipped.is_none() {
            let scale = match self.clip > 0.0 && norm > self.clip {
                true => self.clip / norm,
                false => 1.0,
            };
            let (parameters, gradients) = (&mut model.parameters, &self.gradients);
            self.optimizer.update(parameters, gradients, rate, scale)?;
            if !self.optimizer.shards().is_whole() {
                let (parameters, dist) = model.parameters_and_dist();
                at(dist, || "weights".into());
                self.optimizer.shards().gather_weights(dist, parameters)?;
            }
            model.end_step()?;
        }
        let mut states = model.layer_states_mut();
        for state in states.iter_mut() {
            match skipped {
                None => state.commit(),
                Some(_) => state.discard(),
            }
        }
        let [cross_entropy, auxiliary, z] = sums;
        Ok(StepReport {
            cross_entropy,
            auxiliary,
            z,
            gradient_norm: norm,
            skipped,
            layers: states.iter_mut().map(LayerState::take_stats).collect(),
            router_state: by_name(vectors_of(&states))?,
        })
    }
}
