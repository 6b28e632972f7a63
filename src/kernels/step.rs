//! `kernels/step.cu`: the work before and after the update of an optimizer step, done on the device so that the host
//! need not wait.
//!
//! The losses of the micro-batches are summed; the step is accepted when no layer raised a flag and loss and gradient
//! norm are finite; in that case the states that a step may change are committed, and otherwise restored.

use super::bindings::{routegrad_state, routegrad_step_outcome, routegrad_step_settings};
use super::{In, Out, kernel};

kernel! {
    /// Computes `sums = share (cross-entropy, auxiliary, z)`, or adds these values to `sums`.
    pub struct LossesAdd = losses_add {
        /// `[3]`, assigned by the first micro-batch, added to by later ones.
        sums: Out<'a, f64> [3];
        /// `[1]`.
        cross_entropy: In<'a, f32> [1];
        /// `[1]`; if absent, 0.
        auxiliary: Option<In<'a, f32>> [1];
        /// `[1]`; if absent, 0.
        z: Option<In<'a, f32>> [1];
        /// Weight of this micro-batch in the step.
        share: f64;
        /// Whether this is the first micro-batch, which assigns `sums`.
        first: bool;
    }
}

kernel! {
    /// Decides whether the step is accepted, and computes the coefficients of its update.
    pub struct StepDecide = step_decide {
        /// `[1]`, changed.
        outcome: Out<'a, routegrad_step_outcome> [1];
        /// `[1]`.
        settings: In<'a, routegrad_step_settings> [1];
        /// `[3]`.
        losses: In<'a, f64> [3];
        /// `[layers, 2]`: the first token whose logits are not finite (`i32::MAX` if there is none), and fault bits.
        flags: Option<In<'a, i32>> [2 * layers];
        /// `[count]` of [`SquareSums`](super::adamw::SquareSums).
        parts: In<'a, f64> [count];
        /// Number of elements of `parts`.
        count: usize;
        /// Number of MoE layers.
        layers: usize;
    }
}

kernel! {
    /// Copies pending states to committed states if the step is accepted, and committed to pending states otherwise.
    pub struct StateCommit = state_commit {
        /// `[count]`: rows with addresses of device memory, which the caller keeps alive.
        states: In<'a, routegrad_state> [count];
        /// `[1]`.
        outcome: In<'a, routegrad_step_outcome> [1];
        /// Number of rows of `states`.
        count: usize;
        /// Number of words of the longest state.
        most_words: usize;
    }
}
