//! `kernels/grouped_down.cu`: the down projection of the experts, with column sums, from which the mean of each
//! expert's outputs is computed.
//!
//! `out_r = W_e a_r` for the rows r of expert e; `column_sums[offsets[e] / 64 + e + b] = Σ_r w_r W_e a_r` over the rows of
//! block b of 64 rows of the expert, `w_r = gates[t(r), e]`, or 1 without gates.

use super::cost::{Cost, Sizes};
use super::grouped_gemm::GroupedGemmForward;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `out_r = W_e a_r`, assigned.
    pub struct GroupedDownForward = grouped_down_forward {
        /// `[R, D]`.
        out: Out<'a, bf16> [rows * hidden];
        /// `[R / 64 + E, D]`; if absent, `gates` and `row_token` are not read.
        column_sums: Option<Out<'a, f32>> [(rows / 64 + experts) * hidden];
        /// `[R, F]`.
        a: In<'a, bf16> [rows * ffn];
        /// `[E, D, F]`.
        w: In<'a, bf16> [experts * hidden * ffn];
        /// `[T, E]`; if absent, every row has weight 1.
        gates: Option<In<'a, f32>> [tokens * experts];
        /// `[E + 1]`; if absent, one expert has all rows.
        offsets: Option<In<'a, i32>> [experts + 1];
        /// `[R]`.
        row_token: Option<In<'a, i32>> [rows];
        /// R, the number of rows.
        rows: usize;
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// F, the inner width of the feed-forward network.
        ffn: usize;
        /// `routegrad_gemm_tile`: the tile of the product.
        tile: i32;
    }
}

impl GroupedDownForward<'_> {
    /// Returns the number of rows of `column_sums`: one per block of 64 rows of each expert.
    pub fn column_sum_lines(rows: usize, experts: usize) -> usize {
        rows / 64 + experts
    }

    /// The cost with or without the column sums.
    pub fn cost(s: &Sizes, column_sums: bool) -> Cost {
        let forward = GroupedGemmForward::cost(s.rows, s.experts, s.hidden, s.ffn);
        let sums = 4 * s.hidden * Self::column_sum_lines(s.rows, s.experts) + 8 * s.rows;
        forward + Cost::new(0, if column_sums { sums } else { 0 })
    }
}
