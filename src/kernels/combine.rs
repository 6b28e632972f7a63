//! `kernels/combine.cu`: for every token, the sum of its rows and of the default vectors of the experts that it did
//! not choose.
//!
//! `y_t (+)= Σ_{i∈A_t} gate_ti e_i(x_t) + Σ_{i∉A_t} gate_ti ê_i` (Default MoE, arXiv 2504.12463, eq. 11); the rows are e.

use super::cost::{Cost, Sizes, padded_experts};
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `y_t (+)= Σ rows of t, each times its gate + Σ_{i∉A_t} gate_ti ê_i`.
    pub struct Combine = combine {
        /// `[T, D]`, assigned, or added to.
        y: Out<'a, bf16> [tokens * hidden];
        /// `[R, D]`, sorted by expert.
        rows_in: In<'a, bf16> [rows * hidden];
        /// `[T, E]`; if absent, every row has weight 1.
        gates: Option<In<'a, f32>> [tokens * experts];
        /// `[T, slots]`: each slot's row, negative if the slot has no row.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; if absent, slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// ê `[E, D]`.
        vectors: Option<In<'a, f32>> [experts * hidden];
        /// T, the number of tokens.
        tokens: usize;
        /// R, the number of rows.
        rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// Number of slots of a token: K with `choices`, else E.
        slots: usize;
        /// Whether to add to `y` instead of assigning it.
        accumulate: bool;
    }
}

impl Combine<'_> {
    /// The cost with a list of choices.
    pub fn cost(s: &Sizes, gates: bool, vectors: bool, accumulate: bool) -> Cost {
        let mut bytes = 2 * s.hidden * (s.rows + s.tokens) + 4 * s.slots * s.tokens;
        if accumulate {
            bytes += 2 * s.hidden * s.tokens;
        }
        if gates {
            bytes += 4 * s.slots * s.tokens;
        }
        if !vectors {
            return Cost::new(0, bytes + if gates { 4 * s.rows } else { 0 });
        }
        let flops = 6
            * s.tokens.next_multiple_of(64)
            * padded_experts(s.experts)
            * s.hidden.next_multiple_of(128);
        Cost::new(flops, bytes + 4 * s.experts * (s.tokens + s.hidden))
    }
}
