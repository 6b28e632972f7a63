//! The sequences that a rank trains on.

use crate::config::Config;
use crate::data::{Corpus, Prefetch};
use crate::dist::Collective;
use crate::error::Result;
use crate::model::batch::Batch;
use std::ops::Range;
use std::sync::Arc;

/// The sequences of each step, read before they are needed.
pub struct DataLoader {
    pub corpus: Arc<Corpus>,
    /// This rank's sequences of each micro-batch, as offsets into the sequences of a step.
    pub parts: Vec<Range<u64>>,
    /// Number of sequences of a step, over all ranks.
    pub sequences: u64,
    /// The prefetcher, which the first step starts.
    pub prefetch: Option<Prefetch<Batch>>,
}

impl DataLoader {
    pub fn new(corpus: Arc<Corpus>, config: &Config, dist: &dyn Collective) -> Result<Self> {
        let train = &config.train;
        let (sequences, micro_batch) = (train.sequences_per_step as u64, train.micro_batch as u64);
        let part = |first| dist.part(first..(first + micro_batch).min(sequences));
        let parts = (0..sequences).step_by(micro_batch.max(1) as usize);
        Ok(DataLoader {
            corpus,
            parts: parts.map(part).collect::<Result<_>>()?,
            sequences,
            prefetch: None,
        })
    }

    /// Returns this rank's sequences of the step that follows the first `step` steps.
    pub fn read(&self, step: u64) -> Batch {
        batch(&self.corpus, &self.parts, self.sequences, step)
    }

    /// Returns the same sequences, prefetched up to the last of `steps` steps.
    pub fn take(&mut self, step: u64, steps: u64) -> Result<Batch> {
        if step >= steps {
            return Ok(self.read(step));
        }
        let prefetch = match &mut self.prefetch {
            Some(prefetch) => prefetch,
            none => {
                let (corpus, parts, n) = (self.corpus.clone(), self.parts.clone(), self.sequences);
                let read = move |step| batch(&corpus, &parts, n, step);
                none.insert(Prefetch::new(step..steps, read)?)
            }
        };
        Ok(prefetch.take(step))
    }
}

/// Returns a rank's parts of the micro-batches of a step. With n sequences per step, step t uses the sequences t · n
/// … t · n + n − 1.
fn batch(corpus: &Corpus, parts: &[Range<u64>], n: u64, step: u64) -> Batch {
    let own = parts.iter().cloned().flatten();
    corpus.sequences(own.map(|sequence| step * n + sequence))
}
