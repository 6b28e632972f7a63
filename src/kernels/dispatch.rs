//! `kernels/dispatch.cu`: the slots of a batch sorted by expert, so that a grouped product sees each expert's tokens as one
//! run of rows.
//!
//! A token has W slots, in each of which it may name an expert: K choices, or E scores, of which positive ones count. Rows are
//! the named slots in order (expert, slot): a stable counting sort. `offsets[e] … offsets[e + 1] − 1` are the rows of expert e.

use super::cost::{Cost, Sizes};
use super::{In, Out, host_function, kernel};

kernel! {
    /// The maps of `choices [T, K]`, assigned; the fault bits are or-ed.
    pub struct DispatchChoices = dispatch_choices {
        /// `[E + 1]`.
        offsets: Out<'a, i32> [experts + 1];
        /// `[row_capacity]`; not written from `offsets[E]` on.
        row_token: Out<'a, i32> [row_capacity];
        /// `[row_capacity]`; not written from `offsets[E]` on.
        row_slot: Out<'a, i32> [row_capacity];
        /// `[T, K]`; −1 where a choice has no row.
        slot_row: Out<'a, i32> [tokens * choices_per_token];
        /// `[1]`: bits of `routegrad_fault`.
        fault: Out<'a, i32> [1];
        /// [`workspace`] bytes.
        workspace: Out<'a, u8> => workspace(tokens, experts, choices_per_token);
        /// `[T, K]`.
        choices: In<'a, i32> [tokens * choices_per_token];
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// K.
        choices_per_token: usize;
        /// Rows that the maps have room for; more set a fault bit.
        row_capacity: usize;
    }
}

host_function! {
    /// Bytes of the workspace for `width` slots a token: K, or E with scores.
    pub fn workspace = dispatch_workspace(tokens: usize, experts: usize, width: usize) -> u64
}

impl DispatchChoices<'_> {
    /// Of `slots` choices a token.
    pub fn cost(s: &Sizes) -> Cost {
        Cost::new(0, 12 * s.tokens * s.slots + 8 * s.rows)
    }
}

kernel! {
    /// The maps of the positive ones among `scores [T, E]`, assigned; the fault bits are or-ed.
    pub struct DispatchPositive = dispatch_positive {
        /// `[E + 1]`.
        offsets: Out<'a, i32> [experts + 1];
        /// `[row_capacity]`; not written from `offsets[E]` on.
        row_token: Out<'a, i32> [row_capacity];
        /// `[row_capacity]`; not written from `offsets[E]` on.
        row_slot: Out<'a, i32> [row_capacity];
        /// `[T, E]`; −1 where a score has no row.
        slot_row: Out<'a, i32> [tokens * experts];
        /// `[1]`: bits of `routegrad_fault`.
        fault: Out<'a, i32> [1];
        /// [`workspace`] bytes, with E slots a token.
        workspace: Out<'a, u8> => workspace(tokens, experts, experts);
        /// `[T, E]`; without, every token names every expert.
        scores: Option<In<'a, f32>> [tokens * experts];
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// Rows that the maps have room for; more set a fault bit.
        row_capacity: usize;
    }
}
