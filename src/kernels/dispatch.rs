//! `kernels/dispatch.cu`: the slots of a batch sorted by expert, so that in a grouped product the tokens of each
//! expert are consecutive rows.
//!
//! A token has W slots, each of which may name an expert: K choices, or E scores, of which the positive ones name
//! experts. The rows are the named slots, ordered by (expert, slot): a stable counting sort.
//! `offsets[e] … offsets[e + 1] − 1` are the rows of expert e.

use super::cost::{Cost, Sizes};
use super::{In, Out, host_function, kernel};

kernel! {
    /// Builds the maps of `choices [T, K]`. The maps are assigned; the fault bits are combined with a bitwise or.
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
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// K, the number of choices per token.
        choices_per_token: usize;
        /// Number of rows that the maps can hold; if there are more rows, a fault bit is set.
        row_capacity: usize;
    }
}

host_function! {
    /// Number of bytes of the workspace for `width` slots per token: K, or E with scores.
    pub fn workspace = dispatch_workspace(tokens: usize, experts: usize, width: usize) -> u64
}

impl DispatchChoices<'_> {
    /// The cost with `slots` choices per token.
    pub fn cost(s: &Sizes) -> Cost {
        Cost::new(0, 12 * s.tokens * s.slots + 8 * s.rows)
    }
}

kernel! {
    /// Builds the maps of the positive `scores [T, E]`. The maps are assigned; the fault bits are combined with a
    /// bitwise or.
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
        /// `[T, E]`; if absent, every token names every expert.
        scores: Option<In<'a, f32>> [tokens * experts];
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// Number of rows that the maps can hold; if there are more rows, a fault bit is set.
        row_capacity: usize;
    }
}
