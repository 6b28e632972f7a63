//! The result of a run.

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// The run was requested to stop.
    Stopped,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How the run ended.
    pub outcome: Outcome,
    /// Steps done.
    pub step: u64,
    /// Number of these steps that were skipped because a value was not finite.
    pub left_out: u64,
    /// Validation loss after the last step, if a hook evaluated then and the loss is finite.
    pub validation_loss: Option<f64>,
}
