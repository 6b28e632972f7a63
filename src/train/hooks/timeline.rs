//! The timeline of a step: kernel times on a GPU, or the bytes and operations of the kernels on the simulator.

use crate::config::Config;
use crate::device::{Device, timeline};
use crate::error::{Error, Result};
use crate::kernels::launchers::{self, Launchers};
use crate::kernels::trace;
use crate::report::files::publish;
use crate::report::metrics::Record;
use crate::train::{Hook, Trainer};
use serde::Serialize;
use std::fmt::Display;
use std::path::PathBuf;

/// Records a timeline of the last step's kernels (on the simulator, their bytes and operations) and writes it to
/// `timeline.json`.
pub struct KernelTimeline {
    folder: PathBuf,
}

impl KernelTimeline {
    /// Creates the hook for this run's folder.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        KernelTimeline {
            folder: folder.into(),
        }
    }

    fn write(&self, trainer: &Trainer, found: &(impl Serialize + Display)) -> Result<()> {
        let path = self.folder.join("timeline.json");
        let bytes = serde_json::to_vec_pretty(found);
        let bytes = bytes.map_err(|e| Error::io("write", &path, e.into()))?;
        publish(&path, &bytes)?;
        trainer.note(&found.to_string());
        Ok(())
    }
}

impl Hook for KernelTimeline {
    /// All ranks launch the recorded step in the same way: NCCL requires that all of them replay a graph, or none.
    fn on_every_rank(&self) -> bool {
        true
    }

    /// The last step must not overlap with another step.
    fn needs_model(&self, config: &Config, step: u64) -> bool {
        step + 1 >= config.train.steps
    }

    fn before_step(&mut self, trainer: &Trainer, step: u64) -> Result<()> {
        match (
            step == trainer.config().train.steps,
            trainer.config().train.device,
        ) {
            (true, Device::Sim) => launchers::sim().map(Launchers::trace),
            (true, _) => timeline::start(),
            _ => Ok(()),
        }
    }

    fn measure(&mut self, trainer: &Trainer, record: &mut Record) -> Result<()> {
        // This waits for the GPU, so it is done only after the recorded step.
        if record.step != trainer.config().train.steps {
            return Ok(());
        }
        match (timeline::finish()?, trace::finish()) {
            _ if trainer.model.dist().rank() != 0 => Ok(()),
            (Some(timeline), _) => self.write(trainer, &timeline),
            (None, Some(trace)) => self.write(trainer, &trace),
            (None, None) => Ok(()),
        }
    }
}
