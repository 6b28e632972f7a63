//! The checkpoints of a run, and how long training stood still for them.

use super::{CHECKPOINTS, METRICS_FILE, memory};
use crate::error::Result;
use crate::report::events::EVENTS_FILE;
use crate::report::metrics::Saved;
use crate::train::checkpoint::{Place, SHARD_BYTES, Saver, Snapshot};
use std::path::Path;
use std::time::Instant;

pub(super) struct Saving {
    saver: Saver,
    begun: Instant,
    /// Seconds for which training stood still so far.
    blocked: f64,
    /// Whether it was said that a copy does not fit.
    told: bool,
}

impl Saving {
    /// Into the run's folder, the `keep` newest.
    pub fn new(out: &Path, keep: usize) -> Self {
        let place = Place {
            folder: out.join(CHECKPOINTS),
            // A resumed run goes on in both behind its checkpoint.
            logs: [METRICS_FILE, EVENTS_FILE].map(|f| out.join(f)).into(),
            keep,
            shard_bytes: SHARD_BYTES,
        };
        Saving {
            saver: Saver::new(place),
            begun: Instant::now(),
            blocked: 0.0,
            told: false,
        }
    }

    /// Saves while training goes on, if there is the memory for it.
    ///
    /// # Errors
    /// Those of [`Saver::save`].
    pub fn save(&mut self, snapshot: &Snapshot) -> Result<()> {
        self.saver.save(snapshot, memory::available)
    }

    /// The saves that have ended since the last call, and what is to be said of them.
    ///
    /// # Errors
    /// When one failed in the background.
    pub fn ended(&mut self) -> Result<(Vec<Saved>, Option<String>)> {
        let ended = self.saver.ended()?;
        self.blocked += ended.iter().map(|s| s.blocked_seconds).sum::<f64>();
        let waited = ended.iter().find(|s| !s.background && !self.told);
        let said = waited.map(|s| {
            format!(
                "step {}: training waits while a checkpoint is written, {:.1} s: a copy of {:.1} GB does not fit into the free memory",
                s.step,
                s.blocked_seconds,
                s.bytes as f64 / 1e9,
            )
        });
        self.told |= said.is_some();
        Ok((ended, said))
    }

    /// Saves when training has ended; what to say of all saves.
    ///
    /// # Errors
    /// Those of [`Saver::save_now`].
    pub fn last(&mut self, snapshot: &Snapshot) -> Result<String> {
        let (trained, begun) = (self.begun.elapsed().as_secs_f64(), Instant::now());
        self.saver.save_now(snapshot)?;
        let waited = begun.elapsed().as_secs_f64();
        let mut ended = self.saver.ended()?;
        // What it waited for the save before, and its own writing, fell behind the end.
        ended.retain(|s| s.background);
        self.blocked += ended.iter().map(|s| s.blocked_seconds).sum::<f64>();
        Ok(format!(
            "checkpoints: training stood still for {:.3} s of {trained:.1} s ({:.3}%); the last took {waited:.1} s behind its end",
            self.blocked,
            100.0 * self.blocked / trained,
        ))
    }
}
