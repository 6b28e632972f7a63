//! `kernels/grouped_gemm.cu`: the three products of a linear layer whose rows are sorted by expert.
//!
//! Rows r of expert e are `offsets[e] <= r < offsets[e + 1]`; t(r) is `row_token[r]`, or r without it; W `[E, N, K]`.
//! `out_r = W_e x_t(r)`, `dx_r = W_eᵀ dout_t(r)`, `dW_e = Σ_r dout_t(r) x_t'(r)ᵀ`, r ascending. Without offsets there
//! is one expert, and the product is dense. R = `rows` may be more than `offsets[E]`.

use super::cost::Cost;
use super::launchers::{Launchers, missing};
use super::sum_parts::SumParts;
use super::{In, Out, bindings, kernel};
use crate::device::machine::H200_MULTIPROCESSORS;
use crate::error::Result;
use half::bf16;

pub use bindings::routegrad_gemm_plan as Plan;

kernel! {
    /// `out_r = W_e x_t(r)`, assigned.
    pub struct GroupedGemmForward = grouped_gemm_forward {
        /// `[R, N]`.
        out: Out<'a, bf16> [rows * n];
        /// `[X, K]`.
        x: In<'a, bf16> [x_rows * k];
        /// `[E, N, K]`.
        w: In<'a, bf16> [experts * n * k];
        /// `[E + 1]`.
        offsets: Option<In<'a, i32>> [experts + 1];
        /// `[R]`.
        row_token: Option<In<'a, i32>> [rows];
        /// R, the number of rows.
        rows: usize;
        /// X, the number of rows of x.
        x_rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// N, the output width of W.
        n: usize;
        /// K, the input width of W.
        k: usize;
        /// `routegrad_gemm_tile`: the tile of the product.
        tile: i32;
    }
}

impl GroupedGemmForward<'_> {
    /// The cost of the product of `rows` rows with W `[groups, n, k]` in bf16.
    pub fn cost(rows: usize, groups: usize, n: usize, k: usize) -> Cost {
        Cost::new(2 * rows * n * k, 2 * (rows * k + groups * n * k + rows * n))
    }
}

kernel! {
    /// `dx_r = W_eᵀ dout_t(r)`, assigned.
    pub struct GroupedGemmInputGradient = grouped_gemm_input_gradient {
        /// `[R, K]`.
        dx: Out<'a, bf16> [rows * k];
        /// `[X, N]`.
        dout: In<'a, bf16> [dout_rows * n];
        /// `[E, N, K]`.
        w: In<'a, bf16> [experts * n * k];
        /// `[E + 1]`.
        offsets: Option<In<'a, i32>> [experts + 1];
        /// `[R]`.
        row_token: Option<In<'a, i32>> [rows];
        /// R, the number of rows.
        rows: usize;
        /// X, the number of rows of dout.
        dout_rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// N, the output width of W.
        n: usize;
        /// K, the input width of W.
        k: usize;
        /// `routegrad_gemm_tile`: the tile of the product.
        tile: i32;
    }
}

impl GroupedGemmInputGradient<'_> {
    /// The cost of the product of `rows` rows with W `[groups, n, k]` in bf16.
    pub fn cost(rows: usize, groups: usize, n: usize, k: usize) -> Cost {
        GroupedGemmForward::cost(rows, groups, n, k)
    }
}

kernel! {
    /// `dW_e (+)= Σ_r dout_t(r) x_t'(r)ᵀ`. At most one of dout and x may be gathered.
    pub struct GroupedGemmWeightGradient = grouped_gemm_weight_gradient {
        /// `[E, N, K]`, assigned, or added to.
        dw: Out<'a, f32> [experts * n * k];
        /// `[dout_rows, N]`.
        dout: In<'a, bf16> [dout_rows * n];
        /// `[x_rows, K]`.
        x: In<'a, bf16> [x_rows * k];
        /// `[E + 1]`.
        offsets: Option<In<'a, i32>> [experts + 1];
        /// t(r) of dout, `[R]`.
        dout_row_token: Option<In<'a, i32>> [rows];
        /// t'(r) of x, `[R]`.
        x_row_token: Option<In<'a, i32>> [rows];
        /// R, the number of rows.
        rows: usize;
        /// Rows of dout.
        dout_rows: usize;
        /// X, the number of rows of x.
        x_rows: usize;
        /// E, the number of experts.
        experts: usize;
        /// N, the output width of W.
        n: usize;
        /// K, the input width of W.
        k: usize;
        /// Whether to add to `dw` instead of assigning it.
        accumulate: bool;
        /// `routegrad_gemm_tile`: the tile of the product.
        tile: i32;
    }
}

impl GroupedGemmWeightGradient<'_> {
    /// Returns the number of parts into which the rows of a dense weight gradient `[n, k]` are divided. A part has at
    /// least 1024 rows. The number is the one with the smallest time on an H200 according to the cost model of
    /// `routegrad bench --predict`: a multiprocessor computes its tiles of 128 x 256 one after another, and
    /// [`SumParts`] adds the parts. It is the same on every device, because it determines the order of a sum.
    pub fn parts(rows: usize, n: usize, k: usize) -> usize {
        /// Seconds per row in the main loop of a tile, per tile outside the main loop, and per additional launch,
        /// fitted to the records of 2026-11-24.
        const ROW: f64 = 12.1e-9;
        const TILE: f64 = 2.6e-6;
        const LAUNCH: f64 = 2e-6;
        let tiles = n.div_ceil(128) * k.div_ceil(256);
        let seconds = |parts: usize| {
            let waves = (tiles * parts).div_ceil(H200_MULTIPROCESSORS);
            let rows = rows.div_ceil(parts).next_multiple_of(64);
            let products = waves as f64 * (rows as f64 * ROW + TILE);
            match parts {
                1 => products,
                _ => products + LAUNCH + SumParts::cost(parts, n * k).floor(),
            }
        };
        let all = 1..=(rows / 1024).max(1);
        all.min_by(|&a, &b| seconds(a).total_cmp(&seconds(b)))
            .unwrap_or(1)
    }

    /// Returns the first row of each of `parts` parts of `rows` rows, and the end of the last part. All parts but the
    /// last consist of complete k-tiles of 64 rows.
    pub fn part_offsets(rows: usize, parts: usize) -> Vec<i32> {
        let height = rows.div_ceil(parts).next_multiple_of(64);
        (0..=parts).map(|p| (p * height).min(rows) as i32).collect()
    }

    /// The cost of the gradient of W `[groups, n, k]` in f32.
    pub fn cost(rows: usize, groups: usize, n: usize, k: usize, accumulate: bool) -> Cost {
        let weights = if accumulate { 8 } else { 4 } * groups * n * k;
        Cost::new(2 * rows * n * k, 2 * rows * (n + k) + weights)
    }
}

/// Returns the tile and grid for a product (`routegrad_gemm_product`) of these sizes. It is a pure function.
///
/// # Errors
/// Returns an error when the launcher refuses a size.
pub fn plan(
    launchers: &Launchers,
    product: bindings::routegrad_gemm_product,
    [rows, experts, n, k]: [usize; 4],
    multiprocessors: usize,
) -> Result<Plan> {
    use super::argument::Pass;
    const LAUNCHER: &str = "grouped_gemm_plan";
    let function = launchers
        .table()
        .grouped_gemm_plan
        .ok_or_else(|| missing(LAUNCHER))?;
    let rows = Pass::<i64>::pass(rows, LAUNCHER, "rows")?;
    let size = |value: usize, name| Pass::<i32>::pass(value, LAUNCHER, name);
    let (experts, n, k) = (size(experts, "experts")?, size(n, "n")?, size(k, "k")?);
    let multiprocessors = size(multiprocessors, "multiprocessors")?;
    let mut plan = Plan::default();
    // SAFETY: it computes on the host, and writes one struct.
    let status = unsafe {
        function(
            &mut plan,
            product as i32,
            rows,
            experts,
            n,
            k,
            multiprocessors,
        )
    };
    launchers.check(LAUNCHER, status)?;
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_weight_gradient_fill_the_multiprocessors() {
        // The projection to queries, keys and values of model 1.96b has 96 tiles. Four parts make three waves that
        // are 97% full; one part makes a wave that is 73% full.
        let cases = [
            ((16_384, 3072, 1024), 4),
            ((16_384, 1024, 1024), 4),
            ((16_384, 768, 768), 7),
            // 384 tiles make three waves without division; 1023 rows are too few for two parts; the output head has
            // enough tiles.
            ((16_384, 6144, 2048), 1),
            ((2047, 1024, 1024), 1),
            ((16_384, 128_256, 1024), 1),
        ];
        for ((rows, n, k), parts) in cases {
            assert_eq!(
                GroupedGemmWeightGradient::parts(rows, n, k),
                parts,
                "{rows} {n} {k}"
            );
        }
    }
}
