//! Steps that are launched, and finished when their results are read.

use super::super::learning_rate;
use super::super::step::{Launched, StepReport};
use super::Trainer;
use crate::device::Device;
use crate::dist;
use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A run that is requested to stop finishes the current step if that takes no longer than this.
const PATIENCE: Duration = Duration::from_secs(2);

/// A step that was launched and whose results have not been read yet.
#[must_use = "the next step needs its results"]
pub struct LaunchedStep {
    /// Number of steps before it.
    pub(super) step: u64,
    pub(super) rate: f64,
    begun: Instant,
    pub(super) launched: Launched,
}

impl LaunchedStep {
    /// Returns whether the step replayed a graph, so that the next step may be launched before the results of this
    /// step are read.
    pub fn was_replayed(&self) -> bool {
        self.launched.was_replayed()
    }
}

impl Trainer {
    /// Launches the next step without waiting for it, for measurements; [`finish`](Self::finish) reads its results. On the CPU
    /// the results of a step are read before the next one is launched.
    ///
    /// # Errors
    /// The errors of a step; also on the CPU, when the results of the step before were not read.
    pub fn launch(&mut self) -> Result<LaunchedStep> {
        self.launch_until(None)
    }

    /// Like [`launch`](Self::launch), but abandons the step if `stop` is set on any rank and the rest of the step
    /// would take long.
    pub(super) fn launch_until(&mut self, stop: Option<&AtomicBool>) -> Result<LaunchedStep> {
        let step = self.launched;
        if step != self.state.step && self.state.config.train.device == Device::Cpu {
            return Err(unfinished(step, "launched after it"));
        }
        self.each_hook(|hook, trainer| hook.before_step(trainer, step + 1))?;
        let (begun, train) = (Instant::now(), &self.state.config.train);
        let batch = self.data.take(step, train.steps)?;
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
        self.launched = step + 1;
        Ok(LaunchedStep {
            step,
            rate,
            begun,
            launched,
        })
    }

    /// Reads the results of a launched step, without the hooks. Steps are finished in the order in which they were launched.
    ///
    /// # Errors
    /// The errors of a step; also when an earlier step is not finished.
    pub fn finish(&mut self, launched: LaunchedStep) -> Result<StepReport> {
        Ok(self.read_results(launched)?.0)
    }

    /// Returns the report of a launched step, and the seconds since its launch or since the previous report,
    /// whichever is later.
    pub(super) fn read_results(&mut self, this: LaunchedStep) -> Result<(StepReport, f64)> {
        if this.step != self.state.step {
            return Err(unfinished(self.state.step + 1, "finished before it"));
        }
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
}

/// The error when step `step`, counted from 1, has to be finished first.
fn unfinished(step: u64, what: &str) -> Error {
    Error::invalid(
        "Trainer",
        format!("a call of finish with step {step}"),
        format!("a step that is {what}"),
        "call finish with each step that launch returned, in order",
    )
}
