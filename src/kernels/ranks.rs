//! `kernels/ranks.cu`: sums of rows gathered from several ranks. Rows 0 and 1, 2 and 3 and so on are added, then their sums
//! in the same way, until one is left. Every rank adds the same rows, so all ranks get the same bytes.

use super::cost::Cost;
use super::{In, Out, kernel};

kernel! {
    /// `out = Σ_r rows[r]`.
    pub struct RankSums = rank_sums {
        /// `[elements]`.
        out: Out<'a, f32> [elements];
        /// `[ranks, stride]`, of which the first `elements` of each row are summed.
        rows: In<'a, f32> [(ranks.max(1) - 1) * stride + elements];
        /// Number of ranks, which is the number of rows of the input.
        ranks: usize;
        /// Elements from the start of a rank's row to the start of the next row.
        stride: usize;
        /// Number of elements of the sum.
        elements: usize;
    }
}

impl RankSums<'_> {
    /// The cost for this many elements.
    pub fn cost(ranks: usize, elements: usize) -> Cost {
        Cost::new(0, 4 * (ranks + 1) * elements)
    }
}

kernel! {
    /// `out = Σ_r rows[r]`.
    pub struct RankSumsF64 = rank_sums_f64 {
        /// `[elements]`.
        out: Out<'a, f64> [elements];
        /// `[ranks, stride]`, of which the first `elements` of each row are summed.
        rows: In<'a, f64> [(ranks.max(1) - 1) * stride + elements];
        /// Number of ranks, which is the number of rows of the input.
        ranks: usize;
        /// Elements from the start of a rank's row to the start of the next row.
        stride: usize;
        /// Number of elements of the sum.
        elements: usize;
    }
}

kernel! {
    /// `out = Σ_r rows[r]`.
    pub struct RankSumsI32 = rank_sums_i32 {
        /// `[elements]`.
        out: Out<'a, i32> [elements];
        /// `[ranks, stride]`, of which the first `elements` of each row are summed.
        rows: In<'a, i32> [(ranks.max(1) - 1) * stride + elements];
        /// Number of ranks, which is the number of rows of the input.
        ranks: usize;
        /// Elements from the start of a rank's row to the start of the next row.
        stride: usize;
        /// Number of elements of the sum.
        elements: usize;
    }
}

kernel! {
    /// Combines the flags of a step over all ranks: the smallest index of a token whose logits are not finite, and
    /// the bitwise or of the fault bits.
    pub struct RankFlags = rank_flags {
        /// `[layers, 2]`.
        flags: Out<'a, i32> [2 * layers];
        /// `[ranks, layers, 2]`.
        rows: In<'a, i32> [ranks * 2 * layers];
        /// Number of ranks, which is the number of rows of the input.
        ranks: usize;
        /// Number of MoE layers.
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
        /// E, the number of experts.
        experts: usize;
    }
}
