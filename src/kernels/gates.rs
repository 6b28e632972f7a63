//! `kernels/gates.cu`: gates of chosen and of sampled experts, and the gradients of what they are made of.
//!
//! Of chosen experts A: `w = p / S` on A, 0 elsewhere, `S = Σ_A p` or 1. Of the experts a_r that stage r sampled: `w_i =
//! Σ_r [i = a_r] h_r q^r_i`, q^r the softmax over the experts that the stage keeps. A token's slot has a row where
//! `slot_row` is not negative; E is at most 256.

use super::{In, Out, kernel};

kernel! {
    /// `w[i] = p[i] / S` on A, else 0.
    pub struct SelectedGates = selected_gates {
        /// `[T, E]`.
        w: Out<'a, f32> [tokens * experts];
        /// Scores `[T, E]`.
        p: In<'a, f32> [tokens * experts];
        /// `[T, slots]`: each slot's row, negative where it has none.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; absent: slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// T.
        tokens: usize;
        /// Rows, at most.
        rows: usize;
        /// E.
        experts: usize;
        /// Slots of a token: K with choices, else E.
        slots: usize;
        /// S is Σ_A p, or 1.
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
        /// `[T, slots]`: each slot's row, negative where it has none.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; absent: slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// T.
        tokens: usize;
        /// Rows, at most.
        rows: usize;
        /// E.
        experts: usize;
        /// Slots of a token: K with choices, else E.
        slots: usize;
        /// S is Σ_A p, or 1.
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
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// R, 1 or 2.
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
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// R, 1 or 2.
        stages: usize;
        /// c.
        estimator: f32;
    }
}
