//! Figures drawn from the run's log.

use super::super::{Hook, METRICS_FILE, Outcome, StepReport, Trainer};
use crate::data::tokenizer::loss_unit;
use crate::error::Result;
use crate::report::metrics::Record;
use crate::report::plots;
use std::path::PathBuf;

/// Draws the figures of a run's folder when the log has new evaluations or benchmark scores, and when the run is stopped.
pub struct Plots {
    folder: PathBuf,
}

impl Plots {
    /// Creates the hook for this run's folder.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Plots {
            folder: folder.into(),
        }
    }

    fn draw(&self, trainer: &Trainer) -> Result<()> {
        let unit = loss_unit(&trainer.config().data.tokenizer);
        plots::write(&self.folder.join(METRICS_FILE), &self.folder, unit)
    }
}

impl Hook for Plots {
    fn after_step(&mut self, trainer: &Trainer, _: &StepReport, record: &Record) -> Result<()> {
        let train = &trainer.config().train;
        match train.evaluates_after(record.step) || train.scores_after(record.step) {
            true => self.draw(trainer),
            false => Ok(()),
        }
    }

    fn end(&mut self, trainer: &Trainer, outcome: Outcome) -> Result<()> {
        match outcome == Outcome::Stopped && trainer.steps_done() > 0 {
            true => self.draw(trainer),
            false => Ok(()),
        }
    }
}
