//! `kernels/ranks.cu`: what several ranks gathered into rows, added up in rank order; sums of f32 are formed in f64 and rounded
//! once. Every rank adds the same rows, so that all have the same bytes.

use super::cost::Cost;
use super::{In, Out, kernel};

kernel! {
    /// `out = Σ_r rows[r]`.
    pub struct RankSums = rank_sums {
        /// `[elements]`.
        out: Out<'a, f32> [elements];
        /// `[ranks, stride]`, of which the first `elements` of each row count.
        rows: In<'a, f32> [(ranks.max(1) - 1) * stride + elements];
        /// Ranks: rows of the input.
        ranks: usize;
        /// Elements from the start of a rank's row to that of the next.
        stride: usize;
        /// Elements of the sum.
        elements: usize;
    }
}

impl RankSums<'_> {
    /// Of so many elements.
    pub fn cost(ranks: usize, elements: usize) -> Cost {
        Cost::new(0, 4 * (ranks + 1) * elements)
    }
}

kernel! {
    /// `out = Σ_r rows[r]`.
    pub struct RankSumsF64 = rank_sums_f64 {
        /// `[elements]`.
        out: Out<'a, f64> [elements];
        /// `[ranks, stride]`, of which the first `elements` of each row count.
        rows: In<'a, f64> [(ranks.max(1) - 1) * stride + elements];
        /// Ranks: rows of the input.
        ranks: usize;
        /// Elements from the start of a rank's row to that of the next.
        stride: usize;
        /// Elements of the sum.
        elements: usize;
    }
}

kernel! {
    /// `out = Σ_r rows[r]`.
    pub struct RankSumsI32 = rank_sums_i32 {
        /// `[elements]`.
        out: Out<'a, i32> [elements];
        /// `[ranks, stride]`, of which the first `elements` of each row count.
        rows: In<'a, i32> [(ranks.max(1) - 1) * stride + elements];
        /// Ranks: rows of the input.
        ranks: usize;
        /// Elements from the start of a rank's row to that of the next.
        stride: usize;
        /// Elements of the sum.
        elements: usize;
    }
}

kernel! {
    /// The flags of a step of all ranks: the least first token whose logits are not finite, the fault bits of all.
    pub struct RankFlags = rank_flags {
        /// `[layers, 2]`.
        flags: Out<'a, i32> [2 * layers];
        /// `[ranks, layers, 2]`.
        rows: In<'a, i32> [ranks * 2 * layers];
        /// Ranks: rows of the input.
        ranks: usize;
        /// MoE layers.
        layers: usize;
    }
}

kernel! {
    /// `f_e = load_e / max(1, Σ load)`.
    pub struct LoadShares = load_shares {
        /// `[E]`.
        fractions: Out<'a, f32> [experts];
        /// `[E]`.
        load: In<'a, f64> [experts];
        /// E.
        experts: usize;
    }
}
