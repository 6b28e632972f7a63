//! `kernels/gate_gradient.cu`: the gradient of every gate (Default MoE, arXiv 2504.12463: the gradient of eq. 11).
//!
//! `dgates[t, i] = Σ_c dots[r, c]` where token t has a row r of expert i, else `⟨g_t, ê_i⟩`, g = dy; 0 without vectors.

use super::cost::{Cost, Sizes};
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// The gradient of the gates, assigned.
    pub struct GateGradient = gate_gradient {
        /// `[T, E]`.
        dgates: Out<'a, f32> [tokens * experts];
        /// `[R, dot_columns]`: partial sums of ⟨g, e_i(x)⟩.
        dots: In<'a, f32> [rows * dot_columns];
        /// dy `[T, D]`; read with vectors alone.
        g: Option<In<'a, bf16>> [tokens * hidden];
        /// ê `[E, D]`.
        vectors: Option<In<'a, f32>> [experts * hidden];
        /// `[T, slots]`: each slot's row, negative where it has none.
        slot_row: In<'a, i32> [tokens * slots];
        /// `[T, slots]`: each slot's expert; without, slot i is expert i.
        choices: Option<In<'a, i32>> [tokens * slots];
        /// T.
        tokens: usize;
        /// R.
        rows: usize;
        /// E.
        experts: usize;
        /// D.
        hidden: usize;
        /// Slots of a token: K with choices, else E.
        slots: usize;
        /// Partial sums of a row in `dots`.
        dot_columns: usize;
    }
}

impl GateGradient<'_> {
    /// With a list of choices and `dot_columns` partial dots a row.
    pub fn cost(s: &Sizes, vectors: bool, dot_columns: usize) -> Cost {
        let bytes = 4 * s.tokens * (s.experts + 2 * s.slots) + 4 * s.rows * dot_columns;
        if !vectors {
            return Cost::new(0, bytes);
        }
        let experts = match s.experts {
            0..=16 => 16,
            17..=32 => 32,
            e => e.next_multiple_of(64),
        };
        let flops = 4 * s.tokens.next_multiple_of(128) * experts * s.hidden.next_multiple_of(64);
        Cost::new(
            flops,
            bytes + 2 * s.tokens * s.hidden + 4 * s.experts * s.hidden,
        )
    }
}
