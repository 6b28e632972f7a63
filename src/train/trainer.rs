//! The training loop. On a device with kernels the next step is launched before the results of this one are read, where no
//! hook needs the model in between, so that the device has work while the host reads and writes.

use super::checkpoint::TrainerState;
use super::console::Console;
use super::loader::DataLoader;
use super::outcome::{Outcome, Summary};
use super::step::{Launched, StepExecutor, StepReport};
use super::{learning_rate, record};
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
use std::time::{Duration, Instant};

/// A run that is asked to stop finishes the present step if it takes no longer than this.
const PATIENCE: Duration = Duration::from_secs(2);

/// Something that happens during training: logging, evaluation, checkpoints, analyses, early stopping.
///
/// Around step `n` the trainer calls, each for all hooks in their order: [`before_step`](Self::before_step), the step,
/// [`measure`](Self::measure), [`log`](Self::log), [`after_step`](Self::after_step). An error ends the run; one of `after_step`
/// or `end` does so after all hooks were called, so that a figure that cannot be drawn does not cost a checkpoint.
///
/// On several ranks only rank 0 has the hooks that do not ask for [every rank](Self::on_every_rank).
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
    /// Whether every rank needs the hook, because it makes collective calls.
    fn on_every_rank(&self) -> bool {
        false
    }

    /// Whether it uses the model after step `step`, counted from 1. The trainer then does not launch the next step before
    /// the hook has run. Hooks that do not ask for it may run while the next step changes the model.
    fn needs_model(&self, _config: &Config, _step: u64) -> bool {
        false
    }

    /// Before the first step of this process.
    ///
    /// # Errors
    /// Ends the run.
    fn start(&mut self, _trainer: &Trainer) -> Result<()> {
        Ok(())
    }

    /// Before step `step` is launched, counted from 1.
    ///
    /// # Errors
    /// Ends the run.
    fn before_step(&mut self, _trainer: &Trainer, _step: u64) -> Result<()> {
        Ok(())
    }

    /// Adds to the record of a step before it is logged.
    ///
    /// # Errors
    /// Ends the run; the step is not logged.
    fn measure(&mut self, _trainer: &Trainer, _record: &mut Record) -> Result<()> {
        Ok(())
    }

    /// Writes the record of a step.
    ///
    /// # Errors
    /// Ends the run.
    fn log(&mut self, _trainer: &Trainer, _record: &Record) -> Result<()> {
        Ok(())
    }

    /// After a step was logged.
    ///
    /// # Errors
    /// Ends the run when all hooks were called.
    fn after_step(&mut self, _: &Trainer, _: &StepReport, _: &Record) -> Result<()> {
        Ok(())
    }

    /// When the run has ended or was stopped, but not after an error.
    ///
    /// # Errors
    /// Fails the run when all hooks were called.
    fn end(&mut self, _trainer: &Trainer, _outcome: Outcome) -> Result<()> {
        Ok(())
    }
}

/// Trains a model: owns configuration, model, optimizer, the prefetched data and the hooks.
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
    /// Public, so that a program may change weights between steps.
    pub model: Model,
    executor: StepExecutor,
    /// After the last step whose results were read.
    state: TrainerState,
    dist: Arc<dyn Collective>,
    data: DataLoader,
    /// Steps launched.
    launched: u64,
    /// The last of them, where its results were not read yet.
    in_flight: Option<LaunchedStep>,
    /// When results were last read.
    last_read: Instant,
    hooks: Vec<Box<dyn Hook>>,
    pub(super) console: Console,
    stop_requested: Cell<bool>,
    /// On the run's folder.
    pub(super) lock: Option<FolderLock>,
}

/// A step that was launched and whose results were not read yet.
pub struct LaunchedStep {
    /// Steps before it.
    step: u64,
    rate: f64,
    begun: Instant,
    launched: Launched,
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
            console: Console::notes(),
            stop_requested: Cell::new(false),
            lock: None,
        })
    }

    /// The resolved configuration of the run.
    pub fn config(&self) -> &Config {
        &self.state.config
    }

    /// What a checkpoint holds beside weights and moments.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// Steps done, skipped ones included.
    pub fn steps_done(&self) -> u64 {
        self.state.step
    }

    /// The text that it trains on.
    pub fn corpus(&self) -> &Corpus {
        &self.data.corpus
    }

    /// The optimizer and what else a step needs.
    pub fn executor(&self) -> &StepExecutor {
        &self.executor
    }

    /// Ends [`run`](Self::run) after the present step.
    pub fn request_stop(&self) {
        self.stop_requested.set(true);
    }

    /// A line for the user, on standard error.
    pub fn note(&self, text: &str) {
        self.console.note(text);
    }

    /// The same, unless the run is quiet.
    pub fn info(&self, text: &str) {
        self.console.info(text);
    }

    pub(super) fn console(&self) -> &Console {
        &self.console
    }

    /// This rank's sequences of the next step to launch.
    pub fn next_batch(&self) -> Batch {
        self.data.read(self.launched)
    }

    /// Trains until the last step of the configuration, or until `stop` is set or a hook asked to stop. The present step is
    /// then finished, or on the CPU, where that would take more than 2 seconds, left undone after its present micro-batch.
    ///
    /// # Errors
    /// Those of a step and of the hooks.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<Summary> {
        let steps = self.state.config.train.steps;
        let (mut outcome, mut validation_loss) = (Outcome::Finished, None);
        let mut last = None;
        while self.state.step < steps {
            doing(format!("step {}", self.state.step + 1));
            let asked = stop.load(Ordering::SeqCst) || self.stop_requested.get();
            let stopping = match self.executor.ask_to_stop(asked) {
                None => dist::any(&*self.dist, asked)?,
                // All ranks read it in the report of the same step. Some may have launched the one behind it before, so
                // that all take that one too.
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

    /// One step and its hooks. Weights and moments may be read and changed when it returns.
    ///
    /// # Errors
    /// When an operation or a hook fails, or `train.max_skipped_steps` steps in a row were not finite.
    pub fn step(&mut self) -> Result<StepReport> {
        Ok(self.advance(false)?.0)
    }

    /// For measurements: a step on the first sequences of the next batch, in one micro-batch, which does not count.
    pub(crate) fn practise(&mut self, sequences: usize) -> Result<StepReport> {
        let (batch, rate) = (self.next_batch(), self.state.config.train.learning_rate);
        let first: Vec<_> = batch.chunks(sequences).take(1).collect();
        self.executor.step(&mut self.model, &first, rate)
    }

    /// As [`step`](Self::step); the next step may be launched before the results of this one are read, as in [`run`](Self::run).
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_overlapped(&mut self) -> Result<StepReport> {
        Ok(self.advance(true)?.0)
    }

    /// The next step; see [`conclude`](Self::conclude).
    fn advance(&mut self, overlap: bool) -> Result<(StepReport, Record)> {
        let next = match self.in_flight.take() {
            Some(next) => next,
            None => self.launch()?,
        };
        self.conclude(next, overlap)
    }

    /// Reads the results of `this` step, having launched the one behind it where `overlap` and the hooks allow it.
    fn conclude(&mut self, this: LaunchedStep, overlap: bool) -> Result<(StepReport, Record)> {
        let step = this.step + 1;
        let config = &self.state.config;
        let alone = !overlap
            || step >= config.train.steps
            || self.hooks.iter().any(|hook| hook.needs_model(config, step));
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

    /// Launches the next step without waiting for it, for measurements; [`finish`](Self::finish) reads its results.
    ///
    /// # Errors
    /// Those of a step.
    pub fn launch(&mut self) -> Result<LaunchedStep> {
        self.launch_until(None)
    }

    /// The same; the step is given up where `stop` is set on any rank and it would take long.
    fn launch_until(&mut self, stop: Option<&AtomicBool>) -> Result<LaunchedStep> {
        let step = self.launched;
        self.each_hook(|hook, trainer| hook.before_step(trainer, step + 1))?;
        let (begun, train) = (Instant::now(), &self.state.config.train);
        let batch = self.data.take(step, train.steps)?;
        self.launched = step + 1;
        let rate = learning_rate(train, step);
        let own = train.micro_batch / self.dist.size();
        let micro_batches: Vec<_> = batch.chunks(own).collect();
        let dist = &*self.dist;
        let mut give_up = |done: usize| {
            let Some(stop) = stop else {
                return Ok(false);
            };
            let left = (micro_batches.len() - done) as f64 / done as f64;
            let long = begun.elapsed().mul_f64(left) > PATIENCE;
            dist::any(dist, long && stop.load(Ordering::SeqCst))
        };
        let (model, executor) = (&mut self.model, &mut self.executor);
        let launched = executor.launch_until(model, &micro_batches, rate, &mut give_up)?;
        Ok(LaunchedStep {
            step,
            rate,
            begun,
            launched,
        })
    }

    /// Reads the results of a launched step, without the hooks.
    ///
    /// # Errors
    /// Those of a step.
    pub fn finish(&mut self, launched: LaunchedStep) -> Result<StepReport> {
        Ok(self.read_results(launched)?.0)
    }

    /// The report of a launched step, and the seconds since it or the report before.
    fn read_results(&mut self, this: LaunchedStep) -> Result<(StepReport, f64)> {
        let report = self.executor.report(&mut self.model, this.launched)?;
        let now = Instant::now();
        let seconds = now.duration_since(this.begun.max(self.last_read));
        self.last_read = now;
        self.state.step = this.step + 1;
        self.state.optimizer_steps = self.executor.optimizer.steps();
        let row = self.state.skipped_in_a_row + 1;
        self.state.skipped_in_a_row = report.skipped.as_ref().map_or(0, |_| row);
        Ok((report, seconds.as_secs_f64()))
    }

    /// Notes a skipped step; an error after too many in a row.
    fn check_finite(&self, report: &StepReport) -> Result<()> {
        let Some(what) = &report.skipped else {
            return Ok(());
        };
        let (row, most) = (
            self.state.skipped_in_a_row,
            self.state.config.train.max_skipped_steps,
        );
        let step = self.state.step;
        self.note(&format!(
            "step {step} was left out: {what} is not finite ({row} in a row)"
        ));
        if row < most.max(1) {
            return Ok(());
        }
        Err(Error::NonFinite {
            what: format!("{what} at step {step}, as in {row} steps in a row,"),
            help: "lower train.learning_rate or check the data; what was saved before stays".into(),
        })
    }

    /// Calls all hooks up to the first that fails.
    pub(super) fn each_hook(
        &mut self,
        mut call: impl FnMut(&mut dyn Hook, &Trainer) -> Result<()>,
    ) -> Result<()> {
        let mut hooks = std::mem::take(&mut self.hooks);
        let done = hooks.iter_mut().try_for_each(|h| call(&mut **h, self));
        self.hooks = hooks;
        done
    }

    /// Calls all hooks; gives the last error. The hook that saves comes last, and an error of it matters most.
    fn all_hooks(
        &mut self,
        mut call: impl FnMut(&mut dyn Hook, &Trainer) -> Result<()>,
    ) -> Result<()> {
        let mut last = Ok(());
        self.each_hook(|hook, trainer| {
            if let Err(e) = call(hook, trainer) {
                last = Err(e);
            }
            Ok(())
        })?;
        last
    }

    /// Name and digest of everything that a step may change: weights, moments, router state, the number of steps.
    ///
    /// # Errors
    /// When the device failed.
    pub fn digests(&self) -> Result<Vec<(String, blake3::Hash)>> {
        let all = |t: &Tensor| t.copied_bytes(0..t.elements() * t.dtype().size());
        let optimizer = &self.executor.optimizer;
        let mut found = Vec::new();
        let mut add = |name: String, bytes: &[u8]| found.push((name, blake3::hash(bytes)));
        for (p, moments) in (self.model.parameters.iter()).zip(optimizer.moments()) {
            add(p.name.clone(), &p.value.bytes(0..p.value.elements())?);
            add(format!("first moment of {}", p.name), &all(&moments.first)?);
            add(
                format!("second moment of {}", p.name),
                &all(&moments.second)?,
            );
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

impl LaunchedStep {
    /// Whether the step replayed a graph, so that the next one may be launched before its results are read.
    pub fn was_replayed(&self) -> bool {
        self.launched.was_replayed()
    }
}
