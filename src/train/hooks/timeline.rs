//! Where the time of a step goes on a GPU.

use crate::config::Config;
use crate::device::timeline;
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::metrics::Record;
use crate::train::{Hook, Trainer};
use std::path::PathBuf;

/// Records a timeline of the last step's kernels, and writes it to `timeline.json`.
pub struct KernelTimeline {
    folder: PathBuf,
}

impl KernelTimeline {
    /// In this run's folder.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        KernelTimeline {
            folder: folder.into(),
        }
    }
}

impl Hook for KernelTimeline {
    /// The last step is launched alone.
    fn needs_model(&self, config: &Config, step: u64) -> bool {
        step + 1 >= config.train.steps
    }

    fn before_step(&mut self, trainer: &Trainer, step: u64) -> Result<()> {
        match step == trainer.config().train.steps {
            true => timeline::start(),
            false => Ok(()),
        }
    }

    fn measure(&mut self, trainer: &Trainer, record: &mut Record) -> Result<()> {
        // It waits for the GPU, so only after the recorded step.
        if record.step != trainer.config().train.steps {
            return Ok(());
        }
        let Some(timeline) = timeline::finish()? else {
            return Ok(());
        };
        let path = self.folder.join("timeline.json");
        let bytes = serde_json::to_vec_pretty(&timeline);
        let bytes = bytes.map_err(|e| Error::io("write", &path, e.into()))?;
        publish(&path, &bytes)?;
        trainer.note(&timeline.to_string());
        Ok(())
    }
}
