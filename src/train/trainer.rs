//! The training loop. On a device with kernels, the next step is launched before the results of the current step are
//! read, if no hook needs the model in between. The device then works while the host reads and writes.

mod launched;

pub use launched::LaunchedStep;

use super::checkpoint::TrainerState;
use super::console::Console;
use super::loader::DataLoader;
use super::outcome::{Outcome, Summary};
use super::record;
use super::step::{StepExecutor, StepReport};
use crate::config::Config;
use crate::data::Corpus;
use crate::dist::{self, Collective, doing};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::Batch;
use crate::report::lock::FolderLock;
use crate::report::metrics::Record;
use crate::tensor::Tensor;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Something that happens during training: logging, evaluation, checkpoints, analyses, early stopping.
///
/// For step `n` the trainer calls, each for all hooks in their order: [`before_step`](Self::before_step), the step,
/// [`measure`](Self::measure), [`log`](Self::log), [`after_step`](Self::after_step). An error ends the run. After an
/// error of `after_step` or `end`, the remaining hooks are still called, so that, for example, a figure that cannot
/// be drawn does not prevent a checkpoint. On several ranks, after an error of a hook that runs on every rank, no further
/// such hook is called.
///
/// On several ranks, a hook runs only on rank 0, unless [`on_every_rank`](Self::on_every_rank) returns true. Add it on all
/// ranks even then: [`needs_model`](Self::needs_model) must return the same on each of them.
///
/// ```
/// use routegrad::error::Result;
/// use routegrad::report::metrics::Record;
/// use routegrad::train::{Hook, StepReport, Trainer};
///
/// /// Ends the run when the loss is low enough.
/// struct StopBelow(f64);
///
/// impl Hook for StopBelow {
///     fn after_step(&mut self, trainer: &Trainer, report: &StepReport, _: &Record) -> Result<()> {
///         if report.cross_entropy < self.0 {
///             trainer.request_stop();
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait Hook {
    /// Returns whether the hook runs on every rank, because it makes collective calls.
    fn on_every_rank(&self) -> bool {
        false
    }

    /// Returns whether the hook uses the model after step `step`, counted from 1. If so, the trainer does not launch
    /// the next step before the hook has run. Otherwise the hook may run while the next step changes the model.
    fn needs_model(&self, _config: &Config, _step: u64) -> bool {
        false
    }

    /// Called before the first step of this process.
    ///
    /// # Errors
    /// An error ends the run.
    fn start(&mut self, _trainer: &Trainer) -> Result<()> {
        Ok(())
    }

    /// Called before step `step`, counted from 1, is launched.
    ///
    /// # Errors
    /// An error ends the run.
    fn before_step(&mut self, _trainer: &Trainer, _step: u64) -> Result<()> {
        Ok(())
    }

    /// Adds to the record of a step before it is logged.
    ///
    /// # Errors
    /// An error ends the run, and the step is not logged.
    fn measure(&mut self, _trainer: &Trainer, _record: &mut Record) -> Result<()> {
        Ok(())
    }

    /// Writes the record of a step.
    ///
    /// # Errors
    /// An error ends the run.
    fn log(&mut self, _trainer: &Trainer, _record: &Record) -> Result<()> {
        Ok(())
    }

    /// Called after a step was logged.
    ///
    /// # Errors
    /// An error ends the run after all hooks were called.
    fn after_step(&mut self, _: &Trainer, _: &StepReport, _: &Record) -> Result<()> {
        Ok(())
    }

    /// Called when the run has ended or was stopped, but not after an error.
    ///
    /// # Errors
    /// An error makes the run fail after all hooks were called.
    fn end(&mut self, _trainer: &Trainer, _outcome: Outcome) -> Result<()> {
        Ok(())
    }
}

/// Trains a model. It owns the configuration, the model, the optimizer, the prefetched data and the hooks.
///
/// ```no_run
/// use routegrad::config::{Config, Layers};
/// use routegrad::routers;
/// use routegrad::train::Trainer;
///
/// # fn main() -> routegrad::error::Result<()> {
/// let config = Config::load(&Layers::preset("tiny"), &routers::resolve)?;
/// let mut trainer = Trainer::new(config)?;
/// let report = trainer.step()?;
/// println!("loss {:.3}", report.cross_entropy);
/// # Ok(())
/// # }
/// ```
pub struct Trainer {
    /// The model. It is public, so that a program may change weights between steps.
    pub model: Model,
    executor: StepExecutor,
    /// State after the last step whose results were read.
    state: TrainerState,
    dist: Arc<dyn Collective>,
    data: DataLoader,
    /// Number of steps launched.
    launched: u64,
    /// The last launched step, if its results have not been read yet.
    in_flight: Option<LaunchedStep>,
    /// The time at which results were last read.
    last_read: Instant,
    hooks: Vec<Box<dyn Hook>>,
    /// On other ranks, the hooks that run on rank 0 alone: only their `needs_model` is called here, so that all ranks launch
    /// steps in the same order.
    hooks_of_rank_0: Vec<Box<dyn Hook>>,
    pub(super) console: Console,
    stop_requested: Cell<bool>,
    /// Lock on the run's folder.
    pub(super) lock: Option<FolderLock>,
}

impl Trainer {
    pub(super) fn assemble(
        parts: (Model, StepExecutor, TrainerState),
        dist: Arc<dyn Collective>,
        corpus: Corpus,
        hooks: Vec<Box<dyn Hook>>,
    ) -> Result<Self> {
        let (mut model, executor, state) = parts;
        executor.share_out_weights(&mut model)?;
        let first = dist.rank() == 0;
        let (hooks, hooks_of_rank_0) = hooks
            .into_iter()
            .partition(|hook| first || hook.on_every_rank());
        Ok(Trainer {
            data: DataLoader::new(Arc::new(corpus), &state.config, &*dist)?,
            launched: state.step,
            model,
            executor,
            state,
            dist,
            in_flight: None,
            last_read: Instant::now(),
            hooks,
            hooks_of_rank_0,
            console: Console::notes(),
            stop_requested: Cell::new(false),
            lock: None,
        })
    }

    /// Returns the resolved configuration of the run.
    pub fn config(&self) -> &Config {
        &self.state.config
    }

    /// Returns the state that a checkpoint holds in addition to weights and moments.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// Returns the number of steps done, including skipped steps.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// Returns the text on which the model is trained.
    pub fn corpus(&self) -> &Corpus {
        &self.data.corpus
    }

    /// Returns the step executor, which owns the optimizer.
    pub fn executor(&self) -> &StepExecutor {
        &self.executor
    }

    /// Ends [`run`](Self::run) after the current step.
    pub fn request_stop(&self) {
        self.stop_requested.set(true);
    }

    /// Writes a line for the user to standard error.
    pub fn note(&self, text: &str) {
        self.console.note(text);
    }

    /// Writes a line for the user to standard error, unless the run is quiet.
    pub fn info(&self, text: &str) {
        self.console.info(text);
    }

    /// Returns this rank's sequences of the next step to launch.
    pub fn next_batch(&self) -> Batch {
        self.data.read(self.launched)
    }

    /// Trains until the last step of the configuration, or until `stop` is set or a hook requests a stop. A stop
    /// finishes the current step; on the CPU, if that would take more than 2 seconds, it abandons the step after the
    /// current micro-batch.
    ///
    /// # Errors
    /// The errors of a step and of the hooks.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<Summary> {
        let steps = self.state.config.train.steps;
        let (mut outcome, mut validation_loss) = (Outcome::Finished, None);
        let mut last = None;
        while self.state.step < steps {
            doing(format!("step {}", self.state.step + 1));
            let asked = stop.load(Ordering::SeqCst) || self.stop_requested.get();
            let stopping = match self.executor.ask_to_stop(asked) {
                None => dist::any(&*self.dist, asked)?,
                // All ranks read the stop request in the report of the same step. Some ranks may already have
                // launched the next step, so all ranks run that step as well.
                Some(read) => {
                    if read {
                        last.get_or_insert(self.state.step + 1);
                    }
                    last.is_some()
                }
            };
            if last.is_some_and(|last| self.state.step < last) {
                validation_loss = self.advance(false)?.1.validation_loss;
                continue;
            }
            if stopping && self.in_flight.is_none() {
                outcome = Outcome::Stopped;
                break;
            }
            let next = match self.in_flight.take() {
                Some(next) => next,
                None => self.launch_until(Some(stop))?,
            };
            if next.launched.is_given_up() {
                (self.launched, self.data.prefetch) = (next.step, None);
                outcome = Outcome::Stopped;
                break;
            }
            validation_loss = self.conclude(next, !stopping)?.1.validation_loss;
        }
        self.stop_requested.set(false);
        self.executor.ask_to_stop(false);
        self.all_hooks(|hook, trainer| hook.end(trainer, outcome))?;
        self.dist.finished();
        if let Some(why) = self.executor.graph_error() {
            self.note(&format!(
                "steps were launched one by one, not as a graph: {why}"
            ));
        }
        self.console.finish();
        Ok(Summary {
            outcome,
            step: self.state.step,
            left_out: self.state.step - self.state.optimizer_steps,
            validation_loss,
        })
    }

    /// Runs one step and its hooks. The caller may read and change weights and moments when this returns.
    ///
    /// # Errors
    /// Returns an error when an operation or a hook fails, or `train.max_skipped_steps` steps in a row were not finite.
    pub fn step(&mut self) -> Result<StepReport> {
        Ok(self.advance(false)?.0)
    }

    /// For measurements: runs a step on the first `sequences` sequences of the next batch, in one micro-batch. The
    /// step is not counted.
    pub(crate) fn practise(&mut self, sequences: usize) -> Result<StepReport> {
        let (batch, rate) = (self.next_batch(), self.state.config.train.learning_rate);
        let first: Vec<_> = batch.chunks(sequences).take(1).collect();
        self.executor.step(&mut self.model, &first, rate)
    }

    /// Like [`step`](Self::step), but the next step may be launched before the results of this step are read, as in
    /// [`run`](Self::run).
    ///
    /// # Errors
    /// The same errors as [`step`](Self::step).
    pub fn step_overlapped(&mut self) -> Result<StepReport> {
        Ok(self.advance(true)?.0)
    }

    /// Runs the next step; see [`conclude`](Self::conclude).
    fn advance(&mut self, overlap: bool) -> Result<(StepReport, Record)> {
        let next = match self.in_flight.take() {
            Some(next) => next,
            None => self.launch()?,
        };
        self.conclude(next, overlap)
    }

    /// Launches the next step if `overlap` and the hooks allow it, then reads the results of `this` step.
    fn conclude(&mut self, this: LaunchedStep, overlap: bool) -> Result<(StepReport, Record)> {
        let step = this.step + 1;
        let config = &self.state.config;
        let mut hooks = self.hooks.iter().chain(&self.hooks_of_rank_0);
        let alone = !overlap
            || step >= config.train.steps
            || hooks.any(|hook| hook.needs_model(config, step));
        if this.was_replayed() && !alone {
            self.in_flight = Some(self.launch()?);
        }
        let rate = this.rate;
        let (report, seconds) = self.read_results(this)?;
        let mut record = record::record(&self.state.config, step, &report, rate, seconds);
        self.each_hook(|hook, trainer| hook.measure(trainer, &mut record))?;
        self.each_hook(|hook, trainer| hook.log(trainer, &record))?;
        self.check_finite(&report)
            .map_err(|e| dist::shared(&*self.dist, e))?;
        self.all_hooks(|hook, trainer| hook.after_step(trainer, &report, &record))?;
        Ok((report, record))
    }

    /// Reports a skipped step to the user; returns an error after too many in a row.
    fn check_finite(&self, report: &StepReport) -> Result<()> {
        let Some(what) = &report.skipped else {
            return Ok(());
        };
        let (row, step) = (self.state.skipped_in_a_row, self.state.step);
        self.note(&format!(
            "skipped step {step}: {what} is not finite ({row} skipped in a row)"
        ));
        if row < self.state.config.train.max_skipped_steps.max(1) {
            return Ok(());
        }
        Err(Error::NonFinite {
            what: format!("{what} at step {step}, in {row} consecutive steps,"),
            help: "lower train.learning_rate or check the data; earlier checkpoints are unchanged"
                .into(),
        })
    }

    /// Calls the hooks in order, up to the first that fails.
    pub(super) fn each_hook(
        &mut self,
        mut call: impl FnMut(&mut dyn Hook, &Trainer) -> Result<()>,
    ) -> Result<()> {
        let mut hooks = std::mem::take(&mut self.hooks);
        let done = hooks.iter_mut().try_for_each(|h| call(&mut **h, self));
        self.hooks = hooks;
        done
    }

    /// Calls all hooks and returns the last error: the hook that saves checkpoints is last, and its errors matter most.
    /// Among several ranks no further hook that runs on every rank is called after one has failed, since the other ranks are
    /// at another call.
    fn all_hooks(
        &mut self,
        mut call: impl FnMut(&mut dyn Hook, &Trainer) -> Result<()>,
    ) -> Result<()> {
        let (several, mut left) = (self.dist.size() > 1, false);
        let mut last = Ok(());
        self.each_hook(|hook, trainer| {
            let on_every_rank = hook.on_every_rank();
            if left && on_every_rank {
                return Ok(());
            }
            match call(hook, trainer) {
                Err(e) if !left => (last, left) = (Err(e), several && on_every_rank),
                _ => {}
            }
            Ok(())
        })?;
        last
    }

    /// Returns the name and digest of everything that a step may change: weights, moments, router state, and the
    /// number of steps.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn digests(&self) -> Result<Vec<(String, blake3::Hash)>> {
        let all = |t: &Tensor| t.copied_bytes(0..t.elements() * t.dtype().size());
        let optimizer = &self.executor.optimizer;
        let mut found = Vec::new();
        let mut add = |name: String, bytes: &[u8]| found.push((name, blake3::hash(bytes)));
        for (p, moments) in (self.model.parameters.iter()).zip(optimizer.moments()) {
            add(p.name.clone(), &p.value.bytes(0..p.value.elements())?);
            add(format!("first moment of {}", p.name), &all(&moments.first)?);
            let second = all(&moments.second)?;
            add(format!("second moment of {}", p.name), &second);
        }
        for (layer, state) in self.model.layer_states().iter().enumerate() {
            for (name, tensor) in state.tensors() {
                add(format!("{name} of MoE layer {layer}"), &all(tensor)?);
            }
        }
        add("number of steps".into(), &optimizer.steps().to_le_bytes());
        Ok(found)
    }
}
