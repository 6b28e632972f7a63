//! `kernels/step.cu`: what stands around the update of an optimizer step, so that the host need not wait for it.
//!
//! The losses of the micro-batches are summed; the step is accepted when no layer raised a flag and loss and gradient norm
//! are finite; the states that a step may change are committed then, or else put back.

use super::bindings::{routegrad_state, routegrad_step_outcome, routegrad_step_settings};
use super::{In, Out, kernel};

kernel! {
    /// `sums = or += share (cross-entropy, auxiliary, z)`.
    pub struct LossesAdd = losses_add {
        /// `[3]`, assigned by the first micro-batch, added to by later ones.
        sums: Out<'a, f64> [3];
        /// `[1]`.
        cross_entropy: In<'a, f32> [1];
        /// `[1]`; absent: 0.
        auxiliary: Option<In<'a, f32>> [1];
        /// `[1]`; absent: 0.
        z: Option<In<'a, f32>> [1];
        /// Weight of this micro-batch in the step.
        share: f64;
        /// Whether this is the first micro-batch: `sums` are assigned.
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
        /// `[layers, 2]`: the first token whose logits are not finite (none: `i32::MAX`), and fault bits.
        flags: Option<In<'a, i32>> [2 * layers];
        /// `[count]` of [`SquareSums`](super::adamw::SquareSums).
        parts: In<'a, f64> [count];
        /// Elements of `parts`.
        count: usize;
        /// MoE layers.
        layers: usize;
    }
}

kernel! {
    /// Copies pending states to committed ones when the step is accepted, else the reverse.
    pub struct StateCommit = state_commit {
        /// `[count]`: rows with addresses of device memory, which the caller keeps alive.
        states: In<'a, routegrad_state> [count];
        /// `[1]`.
        outcome: In<'a, routegrad_step_outcome> [1];
        /// Rows of `states`.
        count: usize;
        /// Words of the longest state.
        most_words: usize;
    }
}
