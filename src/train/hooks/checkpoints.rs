//! Checkpoints of a run, and the time that training waits for them.

use crate::config::Config;
use crate::dist::{doing, doing_alone};
use crate::error::Result;
use crate::report::events::EVENTS_FILE;
use crate::report::metrics::{Record, Saved};
use crate::report::size;
use crate::train::checkpoint::{self, Place, SHARD_BYTES, Saver, Snapshot};
use crate::train::{
    CHECKPOINTS, Hook, METRICS_FILE, Outcome, StepReport, Trainer, available_memory,
};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Saves checkpoints at the interval of the configuration, after the last step, and when the run is stopped. With
/// several ranks, rank 0 writes.
pub struct Checkpoints {
    folder: PathBuf,
    saving: Option<Saving>,
    ended: Vec<Saved>,
}

impl Checkpoints {
    /// Creates the hook for this run's folder.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Checkpoints {
            folder: folder.into(),
            saving: None,
            ended: Vec::new(),
        }
    }

    /// Saves in the background. The `last` save has ended when this function returns.
    fn save(&mut self, trainer: &Trainer, last: bool) -> Result<()> {
        let step = trainer.steps_done();
        doing(format!("the checkpoint after step {step}"));
        let snapshot =
            checkpoint::snapshot_of_ranks(&trainer.model, trainer.executor(), trainer.state())?;
        let (Some(saving), Some(snapshot)) = (&mut self.saving, snapshot) else {
            return Ok(());
        };
        // The last save, and a save whose copy does not fit in memory, are written before this returns.
        doing_alone(format!("the checkpoint after step {step}"));
        if !last {
            return saving.saver.save(&snapshot, available_memory);
        }
        trainer.info(&saving.last(&snapshot)?);
        Ok(())
    }
}

impl Hook for Checkpoints {
    fn on_every_rank(&self) -> bool {
        true
    }

    fn needs_model(&self, config: &Config, step: u64) -> bool {
        config.train.saves_after(step)
    }

    fn start(&mut self, trainer: &Trainer) -> Result<()> {
        let keep = trainer.config().train.keep_checkpoints;
        self.saving = (trainer.model.dist().rank() == 0).then(|| Saving::new(&self.folder, keep));
        Ok(())
    }

    /// A save that failed in the background ends the run here.
    fn before_step(&mut self, trainer: &Trainer, _step: u64) -> Result<()> {
        let Some(saving) = &mut self.saving else {
            return Ok(());
        };
        let ended = saving.saver.ended()?;
        saving.count(&ended);
        if let Some(waited) = ended.iter().find(|s| !s.background && !saving.noted) {
            saving.noted = true;
            trainer.note(&format!(
                "step {}: training waits while a checkpoint is written, {:.1} s: a copy of {} does not fit in the free memory",
                waited.step,
                waited.blocked_seconds,
                size(waited.bytes),
            ));
        }
        self.ended.extend(ended);
        Ok(())
    }

    fn measure(&mut self, _trainer: &Trainer, record: &mut Record) -> Result<()> {
        record.saved = std::mem::take(&mut self.ended);
        Ok(())
    }

    fn after_step(&mut self, trainer: &Trainer, _: &StepReport, record: &Record) -> Result<()> {
        let train = &trainer.config().train;
        match train.saves_after(record.step) {
            true => self.save(trainer, record.step == train.steps),
            false => Ok(()),
        }
    }

    fn end(&mut self, trainer: &Trainer, outcome: Outcome) -> Result<()> {
        match outcome == Outcome::Stopped && trainer.steps_done() > 0 {
            true => self.save(trainer, true),
            false => Ok(()),
        }
    }
}

struct Saving {
    saver: Saver,
    begun: Instant,
    /// Seconds that training has paused so far.
    blocked: f64,
    /// Whether the user was told that a copy does not fit.
    noted: bool,
}

impl Saving {
    /// Saves to the run's folder `out`, and keeps the `keep` newest checkpoints.
    fn new(out: &Path, keep: usize) -> Self {
        let place = Place {
            folder: out.join(CHECKPOINTS),
            // A resumed run continues both files after the step of its checkpoint.
            logs: [METRICS_FILE, EVENTS_FILE].map(|f| out.join(f)).into(),
            keep,
            shard_bytes: SHARD_BYTES,
        };
        Saving {
            saver: Saver::new(place),
            begun: Instant::now(),
            blocked: 0.0,
            noted: false,
        }
    }

    /// Adds the time that training has paused for these saves.
    fn count(&mut self, ended: &[Saved]) {
        self.blocked += ended.iter().map(|s| s.blocked_seconds).sum::<f64>();
    }

    /// Saves when training has ended, and returns a summary of all saves.
    ///
    /// # Errors
    /// The errors of [`Saver::save_now`].
    fn last(&mut self, snapshot: &Snapshot) -> Result<String> {
        let (trained, begun) = (self.begun.elapsed().as_secs_f64(), Instant::now());
        self.saver.save_now(snapshot)?;
        let waited = begun.elapsed().as_secs_f64();
        let mut ended = self.saver.ended()?;
        // The wait for the previous save and the write of this save happened after training ended.
        ended.retain(|s| s.background);
        self.count(&ended);
        Ok(format!(
            "checkpoints: saving paused training for {:.3} s of {trained:.1} s ({:.3}%); the last save took {waited:.1} s after training ended",
            self.blocked,
            100.0 * self.blocked / trained,
        ))
    }
}
