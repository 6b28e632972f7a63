//! `kernels/expert_mean.cu`: the mean output of every expert and its moving average, the default vectors (Default MoE,
//! arXiv 2504.12463, eq. 10).
//!
//! `sums_e = Σ column_sums[block]` over the blocks of 64 rows of expert e, as written by grouped_down;
//! `masses_e = (Σ gates[t(r), e], number of rows)`. `ê_e ← β ê_e + (1 − β) sums_e / divisor_e`, if the divisor is not
//! 0. The divisor is the first or the second mass, depending on the weighting.

use super::cost::{Cost, Sizes};
use super::{In, Out, kernel};

kernel! {
    /// Computes sums and masses; both are assigned.
    pub struct ExpertSums = expert_sums {
        /// `[E, D]`.
        sums: Out<'a, f32> [experts * hidden];
        /// `[E, 2]`.
        masses: Out<'a, f32> [2 * experts];
        /// `[R / 64 + E, D]`.
        column_sums: In<'a, f32> [(rows / 64 + experts) * hidden];
        /// `[T, E]`; if absent, every row has weight 1.
        gates: Option<In<'a, f32>> [tokens * experts];
        /// `[E + 1]`.
        offsets: In<'a, i32> [experts + 1];
        /// `[R]`.
        row_token: In<'a, i32> [rows];
        /// R, the number of rows.
        rows: usize;
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
    }
}

impl ExpertSums<'_> {
    /// An upper bound of the cost: the last block of an expert may have fewer than 64 rows.
    pub fn cost(s: &Sizes) -> Cost {
        let lines = s.rows / 64 + s.experts;
        Cost::new(
            0,
            4 * s.hidden * (lines + s.experts) + 8 * s.rows + 16 * s.experts,
        )
    }
}

kernel! {
    /// Updates the moving average in place.
    pub struct ExpertMeanUpdate = expert_mean_update {
        /// ê `[E, D]`.
        average: Out<'a, f32> [experts * hidden];
        /// `[E, D]`.
        sums: In<'a, f32> [experts * hidden];
        /// `[E, 2]`.
        masses: In<'a, f32> [2 * experts];
        /// β `[1]`.
        beta: In<'a, f32> [1];
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// `routegrad_weighting`: how rows are weighted and what the sum is divided by.
        weighting: i32;
    }
}

impl ExpertMeanUpdate<'_> {
    /// The cost when every expert has rows.
    pub fn cost(s: &Sizes) -> Cost {
        Cost::new(0, 12 * s.experts * s.hidden)
    }
}

kernel! {
    /// Updates the moving average in place with the sums of [`ExpertSums`], without writing the sums to memory.
    pub struct ExpertMean = expert_mean {
        /// ê `[E, D]`.
        average: Out<'a, f32> [experts * hidden];
        /// `[R / 64 + E, D]`.
        column_sums: In<'a, f32> [(rows / 64 + experts) * hidden];
        /// `[T, E]`; read if the weighting divides by the sum of the gates.
        gates: Option<In<'a, f32>> [tokens * experts];
        /// `[E + 1]`.
        offsets: In<'a, i32> [experts + 1];
        /// `[R]`.
        row_token: In<'a, i32> [rows];
        /// β `[1]`.
        beta: In<'a, f32> [1];
        /// R, the number of rows.
        rows: usize;
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// `routegrad_weighting`: how rows are weighted and what the sum is divided by.
        weighting: i32;
    }
}

impl ExpertMean<'_> {
    /// An upper bound of the cost, for the weighting that divides by the sum of the gates.
    pub fn cost(s: &Sizes) -> Cost {
        let lines = s.rows / 64 + 3 * s.experts;
        Cost::new(0, 4 * s.hidden * lines + 8 * s.rows + 8 * s.experts)
    }
}
