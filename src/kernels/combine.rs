//! `kernels/combine.cu`: every token's sum of its rows, and of the default vectors of the experts that it did not choose.

use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `y_t (+)= Σ rows of t, each times its gate + Σ_{i∉A_t} gate_ti ê_i`.
    pub struct Combine = combine {
        /// `[T, D]`, assigned, or added to.
        y: Out<'a, bf16> [tokens * hidden];
        /// `[R, D]`, sorted by expert.
        rows_in: In<'a, bf16> [rows * hidden];
        /// `[T, E]`; without, every row counts 1.
        gates: Option<In<'a, f32>> [tokens * experts];
        /// `[T, slots]`: each slot's row, negative where it has none.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; without, slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// ê `[E, D]`.
        vectors: Option<In<'a, f32>> [experts * hidden];
        tokens: usize;
        rows: usize;
        experts: usize;
        hidden: usize;
        slots: usize;
        accumulate: bool;
    }
}
