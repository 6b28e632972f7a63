//! `metrics.jsonl` and the event file for TensorBoard.

use crate::error::Result;
use crate::report::events::Events;
use crate::report::metrics::{Log, Record};
use crate::train::{Hook, METRICS_FILE, Trainer};
use std::path::PathBuf;

/// Appends the record of each step to `metrics.jsonl`.
pub struct MetricsLog {
    folder: PathBuf,
    log: Option<Log>,
}

impl MetricsLog {
    /// Creates the hook for this folder, which must exist when training starts.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        MetricsLog {
            folder: folder.into(),
            log: None,
        }
    }
}

impl Hook for MetricsLog {
    fn start(&mut self, trainer: &Trainer) -> Result<()> {
        let path = self.folder.join(METRICS_FILE);
        self.log = Some(Log::open(&path, trainer.steps_done())?);
        Ok(())
    }

    fn log(&mut self, _trainer: &Trainer, record: &Record) -> Result<()> {
        self.log.as_mut().map_or(Ok(()), |log| log.append(record))
    }
}

/// Writes the numbers of each step to an event file that TensorBoard reads.
pub struct TensorBoard {
    folder: PathBuf,
    events: Option<Events>,
}

impl TensorBoard {
    /// Creates the hook for this folder, which must exist when training starts.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        TensorBoard {
            folder: folder.into(),
            events: None,
        }
    }
}

impl Hook for TensorBoard {
    fn start(&mut self, trainer: &Trainer) -> Result<()> {
        let config = trainer.config().to_toml()?;
        let events = Events::begin(&self.folder, trainer.steps_done(), &config)?;
        self.events = Some(events);
        Ok(())
    }

    fn log(&mut self, _trainer: &Trainer, record: &Record) -> Result<()> {
        self.events
            .as_mut()
            .map_or(Ok(()), |events| events.record(record))
    }
}
