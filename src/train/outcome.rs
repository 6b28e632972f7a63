//! What a run comes to.

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was asked to stop.
    Stopped,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Why it ended.
    pub outcome: Outcome,
    /// Steps done.
    pub step: u64,
    /// Those of them that changed nothing, because something in them was not finite.
    pub left_out: u64,
    /// After the last step, if a hook evaluated there and it is finite.
    pub validation_loss: Option<f64>,
}
