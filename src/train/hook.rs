//! What happens during training beside the steps themselves.

use super::step::StepReport;
use super::{Outcome, Trainer};
use crate::config::Config;
use crate::error::Result;
use crate::report::metrics::Record;

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
