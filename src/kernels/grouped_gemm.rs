//! `kernels/grouped_gemm.cu`: the three products of a linear layer whose rows are sorted by expert.
//!
//! Rows r of expert e are `offsets[e] <= r < offsets[e + 1]`; t(r) is `row_token[r]`, or r without it; W `[E, N, K]`.
//! `out_r = W_e x_t(r)`, `dx_r = W_eᵀ dout_t(r)`, `dW_e = Σ_r dout_t(r) x_t'(r)ᵀ`, r ascending. Without offsets there is one
//! expert: the dense product. R = `rows` may be more than `offsets[E]`.

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
        /// R.
        rows: usize;
        /// X: rows of x.
        x_rows: usize;
        /// E.
        experts: usize;
        /// N.
        n: usize;
        /// K.
        k: usize;
        /// `routegrad_gemm_tile`.
        tile: i32;
    }
}

impl GroupedGemmForward<'_> {
    /// `rows` times W `[groups, n, k]` in bf16.
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
        /// R.
        rows: usize;
        /// X: rows of dout.
        dout_rows: usize;
        /// E.
        experts: usize;
        /// N.
        n: usize;
        /// K.
        k: usize;
        /// `routegrad_gemm_tile`.
        tile: i32;
    }
}

impl GroupedGemmInputGradient<'_> {
    /// `rows` times W `[groups, n, k]` in bf16.
    pub fn cost(rows: usize, groups: usize, n: usize, k: usize) -> Cost {
        GroupedGemmForward::cost(rows, groups, n, k)
    }
}

kernel! {
    /// `dW_e (+)= Σ_r dout_t(r) x_t'(r)ᵀ`, at most one of the two gathered.
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
        /// R.
        rows: usize;
        /// Rows of dout.
        dout_rows: usize;
        /// X: rows of x.
        x_rows: usize;
        /// E.
        experts: usize;
        /// N.
        n: usize;
        /// K.
        k: usize;
        /// Whether `dw` is added to, or assigned.
        accumulate: bool;
        /// `routegrad_gemm_tile`.
        tile: i32;
    }
}

impl GroupedGemmWeightGradient<'_> {
    /// Parts into which the rows of a dense weight gradient `[n, k]` are divided: of 1024 rows or more, and as many as take the
    /// least time on an H200 by the cost model of `routegrad bench --predict`: a multiprocessor takes its tiles of 128 x 256 one
    /// after another, and [`SumParts`] adds the parts. The same on every device, since it decides the order of a sum.
    pub fn parts(rows: usize, n: usize, k: usize) -> usize {
        /// Seconds of a row in a tile's main loop, of a tile besides, and of a further launch: fitted to the records of 2026-11-24.
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

    /// Where each of `parts` parts of so many rows begins, and the last ends: whole k-tiles of 64 rows, but for the last.
    pub fn part_offsets(rows: usize, parts: usize) -> Vec<i32> {
        let height = rows.div_ceil(parts).next_multiple_of(64);
        (0..=parts).map(|p| (p * height).min(rows) as i32).collect()
    }

    /// Gradient of W `[groups, n, k]` in f32.
    pub fn cost(rows: usize, groups: usize, n: usize, k: usize, accumulate: bool) -> Cost {
        let weights = if accumulate { 8 } else { 4 } * groups * n * k;
        Cost::new(2 * rows * n * k, 2 * rows * (n + k) + weights)
    }
}

/// The tile and grid for a product (`routegrad_gemm_product`) of these sizes: a pure function.
///
/// # Errors
/// When the launcher refuses a size.
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
        // Queries, keys and values of 1.96b have 96 tiles: four parts of them are three waves, 97% full, in place of 73%.
        let cases = [
            ((16_384, 3072, 1024), 4),
            ((16_384, 1024, 1024), 4),
            ((16_384, 768, 768), 7),
            // 384 tiles are three waves as they are; 1023 rows are too few for two parts; the head has enough tiles.
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
