//! `kernels/grouped_swiglu.cu`: the gate and up projection of the experts with SwiGLU, and its backward from the gradient of
//! the layer's output.
//!
//! Rows r of expert e are `offsets[e] <= r < offsets[e + 1]`; t(r) is `row_token[r]`, or r without it.
//! `h_r = W_e x_t(r)` with W `[E, 2F, D]`, gate above up; `a = silu(gate) ⊙ up`. Backward, with the down projection W
//! `[E, D, F]` and `w_r = gates[t(r), e]`: `dA' = dout W_e`, `A = silu(gate) ⊙ up`, `scaled_a = w_r A`,
//! `dh = w_r dA' ⊙ (up silu'(gate), silu(gate))`, `dots[r, c] = Σ dA' A` over column tile c; the sum over c is ⟨dout,
//! e(x)⟩.

use super::cost::{Cost, Sizes};
use super::{In, Out, host_function, kernel};
use half::bf16;

kernel! {
    /// `h_r = W_e x_t(r)`, `a_r = silu(gate) ⊙ up`, assigned.
    pub struct GroupedSwigluForward = grouped_swiglu_forward {
        /// `[R, 2F]`.
        h: Out<'a, bf16> [2 * rows * ffn];
        /// `[R, F]`.
        a: Out<'a, bf16> [rows * ffn];
        /// `[X, D]`.
        x: In<'a, bf16> [x_rows * hidden];
        /// `[E, 2F, D]`: gate above up.
        w: In<'a, bf16> [experts * (2 * ffn) * hidden];
        /// `[E + 1]`; if absent, one expert has all rows.
        offsets: Option<In<'a, i32>> [experts + 1];
        /// `[R]`.
        row_token: Option<In<'a, i32>> [rows];
        /// R, the number of rows.
        rows: usize;
        /// X, the number of rows of x.
        x_rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// F, the inner width of the feed-forward network.
        ffn: usize;
        /// D, the width of the model.
        hidden: usize;
        /// `routegrad_gemm_tile`: the tile of the product.
        tile: i32;
    }
}

impl GroupedSwigluForward<'_> {
    /// The cost for this many rows through all experts.
    pub fn cost(s: &Sizes) -> Cost {
        let Sizes {
            rows,
            hidden,
            ffn,
            experts,
            ..
        } = *s;
        Cost::new(
            4 * rows * ffn * hidden,
            2 * rows * (hidden + 3 * ffn) + 4 * experts * ffn * hidden,
        )
    }
}

kernel! {
    /// Computes dh, the scaled activations and the dot products of each row; all are assigned.
    pub struct GroupedSwigluBackward = grouped_swiglu_backward {
        /// `[R, 2F]`; must not be h.
        dh: Out<'a, bf16> [2 * rows * ffn];
        /// `[R, F]`.
        scaled_a: Out<'a, bf16> [rows * ffn];
        /// `[R, dot_columns]`.
        dots: Out<'a, f32> [rows * dot_columns];
        /// `[X, D]`.
        dout: In<'a, bf16> [dout_rows * hidden];
        /// The down projection `[E, D, F]`.
        w: In<'a, bf16> [experts * hidden * ffn];
        /// `[R, 2F]`.
        h: In<'a, bf16> [2 * rows * ffn];
        /// `[T, E]`.
        gates: In<'a, f32>;
        /// `[E + 1]`; if absent, one expert has all rows.
        offsets: Option<In<'a, i32>> [experts + 1];
        /// `[R]`: the token of each row, which is its row in `gates`.
        row_token: Option<In<'a, i32>> [rows];
        /// `[R]`: the row of dout for each row.
        dout_row_token: Option<In<'a, i32>> [rows];
        /// R, the number of rows.
        rows: usize;
        /// X, the number of rows of dout.
        dout_rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// F, the inner width of the feed-forward network.
        ffn: usize;
        /// Partial dot products per row, as returned by [`dot_columns`].
        dot_columns: usize;
        /// `routegrad_gemm_tile`: the tile of the product.
        tile: i32;
    }
}

host_function! {
    /// The number of partial dot products per row with this tile on the current device.
    pub fn dot_columns = grouped_swiglu_dot_columns(rows: usize, experts: usize, hidden: usize, ffn: usize, tile: i32) -> i32
}

impl GroupedSwigluBackward<'_> {
    /// The cost with `dot_columns` partial dot products per row.
    pub fn cost(s: &Sizes, dot_columns: usize) -> Cost {
        let Sizes {
            rows,
            hidden,
            ffn,
            experts,
            ..
        } = *s;
        Cost::new(
            2 * rows * ffn * hidden,
            2 * rows * (hidden + 5 * ffn)
                + 2 * experts * ffn * hidden
                + 4 * rows * (dot_columns + 2),
        )
    }
}
