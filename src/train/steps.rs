//! The steps of a run: launched, reported and put down. On a device with kernels the next step is launched before this one is
//! reported, where nothing has to be done in between, so that the device has work while the host reads and writes.

use super::due::Due;
use super::{Run, learning_rate};
use crate::device::timeline;
use crate::error::Result;
use crate::report::metrics::Record;
use crate::routers::LayerStats;
use crate::train::step::{Launched, StepReport};
use std::time::Instant;

/// A step that was launched and not reported yet.
pub(super) struct UnderWay {
    /// Steps before it.
    step: u64,
    rate: f64,
    begun: Instant,
    launched: Launched,
}

impl Run<'_> {
    /// Reports the next step, having launched the one behind it where nothing has to wait for this one; none is when the
    /// run is `stopping`.
    pub(super) fn step(&mut self, stopping: bool) -> Result<(StepReport, Record)> {
        let this = match self.under_way.take() {
            Some(this) => this,
            None => self.launch(self.state.step)?,
        };
        let step = this.step + 1;
        let alone =
            stopping || self.recorded(step) || Due::after(step, &self.state.config.train).any();
        if this.launched.was_replayed() && !alone {
            self.under_way = Some(self.launch(step)?);
        }
        let report = self.trainer.report(&mut self.model, this.launched)?;
        let now = Instant::now();
        let seconds = now
            .duration_since(this.begun.max(self.reported))
            .as_secs_f64();
        self.reported = now;
        self.state.step = step;
        self.state.optimizer_steps = self.trainer.optimizer.steps();
        self.state.skipped_in_a_row = match report.refused {
            None => 0,
            Some(_) => self.state.skipped_in_a_row + 1,
        };
        // It waits for the GPU, so only where it is asked for.
        if self.recorded(this.step)
            && let Some(timeline) = timeline::finish()?
        {
            self.keep_timeline(&timeline)?;
        }
        let record = self.record(&report, this.rate, seconds);
        Ok((report, record))
    }

    /// Launches the step behind `step` steps, over the next sequences.
    fn launch(&mut self, step: u64) -> Result<UnderWay> {
        let train = &self.state.config.train;
        let (begun, rate) = (Instant::now(), learning_rate(train, step));
        let batch = self.ahead.take(step);
        let micro_batches: Vec<_> = batch.chunks(train.micro_batch / self.dist.size()).collect();
        if self.recorded(step) {
            timeline::start()?;
        }
        Ok(UnderWay {
            step,
            rate,
            begun,
            launched: self.trainer.launch(&mut self.model, &micro_batches, rate)?,
        })
    }

    /// Whether the timeline of the step behind `step` steps is recorded: of the last, when it is asked for.
    fn recorded(&self, step: u64) -> bool {
        self.options.timeline && step + 1 == self.state.config.train.steps
    }

    fn record(&self, report: &StepReport, learning_rate: f64, seconds: f64) -> Record {
        let config = &self.state.config;
        let per_step = config.train.sequences_per_step * config.model.sequence_length;
        let finite = |x: f64| Some(x).filter(|x| x.is_finite());
        Record {
            step: self.state.step,
            tokens: self.state.step * per_step as u64,
            loss: finite(report.cross_entropy),
            auxiliary_loss: finite(report.auxiliary),
            z_loss: finite(report.z),
            gradient_norm: finite(report.gradient_norm),
            learning_rate,
            applied: report.refused.is_none(),
            load: report
                .layers
                .iter()
                .map(|l| l.counts.iter().map(|c| *c as u64).collect())
                .collect(),
            router_entropy: report
                .layers
                .iter()
                .map(|l| finite(l.entropy / l.tokens))
                .collect(),
            sparsity: sparsity(&report.layers),
            router_state: (report.router_state.iter())
                .map(|(name, vectors)| (name.to_string(), vectors.clone()))
                .collect(),
            validation_loss: None,
            tasks: Default::default(),
            validation_by_source: Default::default(),
            seconds,
            tokens_per_second: per_step as f64 / seconds,
            saved: Vec::new(),
        }
    }
}

/// The mean over layers of the share of (token, expert) pairs that were not chosen.
fn sparsity(layers: &[LayerStats]) -> Option<f64> {
    let chosen = layers.iter().map(|l| {
        let pairs = l.tokens * l.counts.len() as f64;
        l.counts.iter().sum::<f64>() / pairs
    });
    let mean = 1.0 - chosen.sum::<f64>() / layers.len() as f64;
    Some(mean).filter(|s| s.is_finite())
}
