//! `kernels/gates.cu`: gates of chosen experts and of sampled experts, and the gradients of their scores and logits.
//!
//! For chosen experts A: `w = p / S` on A, 0 elsewhere, `S = Σ_A p` or 1. For the experts a_r sampled in stage r:
//! `w_i = Σ_r [i = a_r] h_r q^r_i`, q^r the softmax over the experts that the stage keeps. A slot of a token has a
//! row if its `slot_row` is not negative; E is at most 256.

use super::{In, Out, kernel};

kernel! {
    /// `w[i] = p[i] / S` on A, else 0.
    pub struct SelectedGates = selected_gates {
        /// `[T, E]`.
        w: Out<'a, f32> [tokens * experts];
        /// Scores `[T, E]`.
        p: In<'a, f32> [tokens * experts];
        /// `[T, slots]`: each slot's row, negative if the slot has no row.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; if absent, slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// T, the number of tokens.
        tokens: usize;
        /// Upper bound of the number of rows.
        rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// Number of slots of a token: K with `choices`, else E.
        slots: usize;
        /// Whether S is Σ_A p; otherwise it is 1.
        renormalize: bool;
    }
}

kernel! {
    /// `dp[i] = (dw[i] − Σ_A w dw) / S` on A (not renormalised: `dw[i]`); elsewhere `dw[i] / S` with `through`, else 0.
    pub struct SelectedGatesBackward = selected_gates_backward {
        /// `[T, E]`.
        dp: Out<'a, f32> [tokens * experts];
        /// `[T, E]`.
        dw: In<'a, f32> [tokens * experts];
        /// Scores `[T, E]`.
        p: In<'a, f32> [tokens * experts];
        /// `[T, slots]`: each slot's row, negative if the slot has no row.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; if absent, slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// T, the number of tokens.
        tokens: usize;
        /// Upper bound of the number of rows.
        rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// Number of slots of a token: K with `choices`, else E.
        slots: usize;
        /// Whether S is Σ_A p; otherwise it is 1.
        renormalize: bool;
        /// Whether gradients pass to the scores of experts that were not chosen.
        through: bool;
    }
}

kernel! {
    /// `w[i] = Σ_r [i = a_r] h_r q^r_i`.
    pub struct SampledGates = sampled_gates {
        /// `[T, E]`.
        w: Out<'a, f32> [tokens * experts];
        /// h `[R, T]`.
        factors: In<'a, f32> [stages * tokens];
        /// `[T, E]`.
        logits: In<'a, f32> [tokens * experts];
        /// a `[R, T]`.
        experts_chosen: In<'a, i32> [stages * tokens];
        /// `[R, T, E]`, 0 or 1.
        kept: In<'a, i32> [stages * tokens * experts];
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// R, the number of stages: 1 or 2.
        stages: usize;
    }
}

kernel! {
    /// `dz[j] = c Σ_r dw[a_r] q^r_{a_r} ([j = a_r] − q^r_j)`.
    pub struct SampledGatesBackward = sampled_gates_backward {
        /// `[T, E]`.
        dz: Out<'a, f32> [tokens * experts];
        /// `[T, E]`.
        dw: In<'a, f32> [tokens * experts];
        /// `[T, E]`.
        logits: In<'a, f32> [tokens * experts];
        /// a `[R, T]`.
        experts_chosen: In<'a, i32> [stages * tokens];
        /// `[R, T, E]`, 0 or 1.
        kept: In<'a, i32> [stages * tokens * experts];
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// R, the number of stages: 1 or 2.
        stages: usize;
        /// c, the factor of the gradient estimate.
        estimator: f32;
    }
}
