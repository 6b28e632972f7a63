//! `kernels/gate_gradient.cu`: the gradient of every gate (Default MoE, arXiv 2504.12463: the gradient of eq. 11).
//!
//! With default vectors ê, [`DefaultDots`] computes `⟨g_t, ê_i⟩` for every gate, g = dy, and the rows of g sorted by
//! expert. Then [`GateGradient`] assigns `Σ_c dots[r, c]` if token t has a row r of expert i. Without default vectors
//! it assigns 0 to the other gates.

use super::cost::{Cost, Sizes};
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `dgates[t, i] = ⟨g_t, ê_i⟩`, assigned, and g sorted by expert.
    pub struct DefaultDots = default_dots {
        /// `[T, E]`.
        dgates: Out<'a, f32> [tokens * experts];
        /// `[R, D]`: g of each row's token, assigned; rows that no slot names do not change.
        g_rows: Option<Out<'a, bf16>> [rows * hidden];
        /// dy `[T, D]`.
        g: In<'a, bf16> [tokens * hidden];
        /// ê `[E, D]`.
        vectors: In<'a, f32> [experts * hidden];
        /// `[T, slots]`: each slot's row, negative if the slot has no row; given with `g_rows`.
        slot_row: Option<In<'a, i32>> [tokens * slots];
        /// T, the number of tokens.
        tokens: usize;
        /// R, the number of rows.
        rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// Number of slots of a token.
        slots: usize;
    }
}

kernel! {
    /// `dgates[t, i] = Σ_c dots[r, c]` where token t has a row r of expert i, assigned.
    pub struct GateGradient = gate_gradient {
        /// `[T, E]`.
        dgates: Out<'a, f32> [tokens * experts];
        /// `[R, dot_columns]`: partial sums of ⟨g, e_i(x)⟩.
        dots: In<'a, f32> [rows * dot_columns];
        /// `[T, slots]`: each slot's row, negative if the slot has no row.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; if absent, slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// T, the number of tokens.
        tokens: usize;
        /// R, the number of rows.
        rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// Number of slots of a token: K with `choices`, else E.
        slots: usize;
        /// Number of partial sums per row in `dots`.
        dot_columns: usize;
        /// Whether `dgates` keeps its value for gates without a row; otherwise it becomes 0.
        keep: bool;
    }
}

impl DefaultDots<'_> {
    /// The cost with or without `g_rows`.
    pub fn cost(s: &Sizes, sorts: bool) -> Cost {
        let experts = match s.experts {
            0..=16 => 16,
            17..=32 => 32,
            e => e.next_multiple_of(64),
        };
        let flops = 4 * s.tokens.next_multiple_of(128) * experts * s.hidden.next_multiple_of(64);
        let bytes = 2 * s.tokens * s.hidden + 4 * s.experts * (s.tokens + s.hidden);
        let sorted = 2 * s.rows * s.hidden + 4 * s.tokens * s.slots;
        Cost::new(flops, bytes + if sorts { sorted } else { 0 })
    }
}

impl GateGradient<'_> {
    /// The cost with a list of choices and `dot_columns` partial dot products per row.
    pub fn cost(s: &Sizes, keep: bool, dot_columns: usize) -> Cost {
        let gates = if keep { s.rows } else { s.tokens * s.experts };
        let dots = s.rows * dot_columns;
        Cost::new(0, 4 * (2 * s.tokens * s.slots + dots + gates))
    }
}
