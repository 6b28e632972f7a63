//! `kernels/expert_mean.cu`: the mean output of every expert and its moving average, the default vectors (Default MoE,
//! arXiv 2504.12463, eq. 10).
//!
//! `sums_e = Σ column_sums[block]` over the blocks of 64 rows of expert e, as grouped_down wrote them;
//! `masses_e = (Σ gates[t(r), e], number of rows)`. `ê_e ← β ê_e + (1 − β) sums_e / divisor_e`, where the divisor, the first
//! or the second mass by the weighting, is not 0.

use super::cost::{Cost, Sizes};
use super::{In, Out, kernel};

kernel! {
    /// Sums and masses, assigned.
    pub struct ExpertSums = expert_sums {
        /// `[E, D]`.
        sums: Out<'a, f32> [experts * hidden];
        /// `[E, 2]`.
        masses: Out<'a, f32> [2 * experts];
        /// `[R / 64 + E, D]`.
        column_sums: In<'a, f32> [(rows / 64 + experts) * hidden];
        /// `[T, E]`; without, every row counts 1.
        gates: Option<In<'a, f32>> [tokens * experts];
        /// `[E + 1]`.
        offsets: In<'a, i32> [experts + 1];
        /// `[R]`.
        row_token: In<'a, i32> [rows];
        /// R.
        rows: usize;
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// D.
        hidden: usize;
    }
}

impl ExpertSums<'_> {
    /// At most: an expert's last block of 64 rows may be short.
    pub fn cost(s: &Sizes) -> Cost {
        let lines = s.rows / 64 + s.experts;
        Cost::new(
            0,
            4 * s.hidden * (lines + s.experts) + 8 * s.rows + 16 * s.experts,
        )
    }
}

kernel! {
    /// The moving average, changed in place.
    pub struct ExpertMeanUpdate = expert_mean_update {
        /// ê `[E, D]`.
        average: Out<'a, f32> [experts * hidden];
        /// `[E, D]`.
        sums: In<'a, f32> [experts * hidden];
        /// `[E, 2]`.
        masses: In<'a, f32> [2 * experts];
        /// β `[1]`.
        beta: In<'a, f32> [1];
        /// E.
        experts: usize;
        /// D.
        hidden: usize;
        /// `routegrad_weighting`.
        weighting: i32;
    }
}

impl ExpertMeanUpdate<'_> {
    /// When every expert has rows.
    pub fn cost(s: &Sizes) -> Cost {
        Cost::new(0, 12 * s.experts * s.hidden)
    }
}

kernel! {
    /// The moving average, changed in place by the sums of [`ExpertSums`], which are written nowhere.
    pub struct ExpertMean = expert_mean {
        /// ê `[E, D]`.
        average: Out<'a, f32> [experts * hidden];
        /// `[R / 64 + E, D]`.
        column_sums: In<'a, f32> [(rows / 64 + experts) * hidden];
        /// `[T, E]`; read where the weighting divides by their sum.
        gates: Option<In<'a, f32>> [tokens * experts];
        /// `[E + 1]`.
        offsets: In<'a, i32> [experts + 1];
        /// `[R]`.
        row_token: In<'a, i32> [rows];
        /// β `[1]`.
        beta: In<'a, f32> [1];
        /// R.
        rows: usize;
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// D.
        hidden: usize;
        /// `routegrad_weighting`.
        weighting: i32;
    }
}

impl ExpertMean<'_> {
    /// At most, divided by the sum of the gates.
    pub fn cost(s: &Sizes) -> Cost {
        let lines = s.rows / 64 + 3 * s.experts;
        Cost::new(0, 4 * s.hidden * lines + 8 * s.rows + 8 * s.experts)
    }
}
