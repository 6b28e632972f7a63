//! What is to be done after a step, before the next one may change the model.

use crate::config::TrainConfig;

/// What a step is followed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub evaluate: bool,
    /// By benchmarks.
    pub score: bool,
    pub analyze: bool,
    pub save: bool,
}

impl Due {
    /// After step `step`, counted from 1: at the intervals of the configuration, and everything after the last.
    pub fn after(step: u64, train: &TrainConfig) -> Self {
        let at = |interval: u64| step == train.steps || step % interval == 0;
        Due {
            evaluate: at(train.eval_interval),
            score: train.tasks_interval > 0 && at(train.tasks_interval),
            analyze: train.analyze_interval > 0 && at(train.analyze_interval),
            save: at(train.checkpoint_interval),
        }
    }

    /// Whether it is anything.
    pub fn any(self) -> bool {
        let Due {
            evaluate,
            score,
            analyze,
            save,
        } = self;
        evaluate || score || analyze || save
    }
}
