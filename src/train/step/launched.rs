//! A step between its launch and its report.

use super::readback::Readback;

/// A step between its launch and its report.
pub struct Launched {
    pub(super) rate: f64,
    pub(super) sums: [f64; 3],
    pub(super) given_up: bool,
    pub(super) replayed: bool,
    /// The readback of the results, on a device with kernels.
    pub(super) readback: Option<Readback>,
}

impl Launched {
    /// Returns whether the step replayed a graph. If so, the next step does too, unless something changes in between,
    /// and does not depend on the report of this step.
    pub fn was_replayed(&self) -> bool {
        self.replayed
    }

    /// Returns whether the step was abandoned between two micro-batches. Nothing has changed then, and there is no
    /// report.
    pub fn is_given_up(&self) -> bool {
        self.given_up
    }
}
