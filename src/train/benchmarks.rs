//! Benchmark scores on the way. They change nothing that the training sees, and cost no entry of the log its bytes.

use super::progress::Progress;
use crate::config::TrainConfig;
use crate::data::{Corpus, Tokenizer};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::study::tasks::{self, Benchmark};
use crate::train::checkpoint::TrainerState;
use std::collections::BTreeMap;
use std::path::Path;

/// The questions that a run asks its model, read before the first step: what cannot be read is told at once.
pub(super) struct Benchmarks {
    tokenizer: Tokenizer,
    benchmarks: Vec<Benchmark>,
}

impl Benchmarks {
    /// Those of the configuration; none if it asks for none.
    ///
    /// # Errors
    /// When a name is unknown, or documents cannot be read.
    pub fn read(config: &TrainConfig, corpus: &Corpus) -> Result<Option<Self>> {
        if config.tasks_interval == 0 {
            return Ok(None);
        }
        let folder = Path::new(&config.task_data);
        let tasks = tasks::choose(&config.tasks, folder)?;
        Ok(Some(Benchmarks {
            tokenizer: corpus.load_tokenizer()?,
            benchmarks: tasks::read(&tasks, folder, config.tasks_limit)?,
        }))
    }

    /// Scores by task, as the log has them; none, with a note, where the model's likelihoods are not finite.
    ///
    /// # Errors
    /// Those of the model.
    pub fn score(
        &self,
        model: &Model,
        state: &TrainerState,
        progress: &Progress,
    ) -> Result<BTreeMap<String, BTreeMap<String, f64>>> {
        let (config, step) = (&state.config, state.step);
        let options = tasks::Options {
            tokens: config.train.micro_batch * config.model.sequence_length,
            quiet: true,
        };
        let results = match tasks::run(model, &self.tokenizer, &self.benchmarks, &options, None) {
            Err(e @ Error::NonFinite { .. }) => {
                progress.note(&format!("step {step}: no benchmark scores: {e}"));
                return Ok(BTreeMap::new());
            }
            results => results?,
        };
        progress.note(&format!("step {step}: {}", results.summary()));
        let scores = results.scores.iter();
        Ok(scores.map(|s| (s.task.to_owned(), s.numbers())).collect())
    }
}
