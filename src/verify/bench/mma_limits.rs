//! Computes from data sheets what limits the main loop of a product on GPUs without wgmma (`kernels/common/mma_tile.cuh`).
//!
//! A k-tile of 64 takes time for its operations on the tensor cores, and for its transfers through shared memory:
//! `cp.async` writes both operands once; `ldmatrix` reads A once, and B once for each warp in a column of warps. The
//! longer of the two times is a lower bound for a k-tile. Waits at the barrier of each k-tile, the epilogue and the last
//! wave are not included; an estimate for the A100 adds them.

use super::case::{Set, Work};
use super::groups::groups;
use crate::device::machine::Chip;
use crate::error::Result;
use crate::report::page::{Table, replace_between};
use crate::verify::kernels::grouped_gemm::{Product, Shape};
use std::path::Path;

/// Marks around the table in a page.
const MARKS: [&str; 2] = [
    "<!-- limits of mma.sync: routegrad bench --predict --update writes what follows -->",
    "<!-- end of limits -->",
];

/// Dense bf16 FLOPs per clock and multiprocessor of an A100.
const A100_FLOPS_PER_CLOCK: f64 = 2048.0;
/// Dense bf16 FLOPs with f32 accumulation per clock and multiprocessor: the peak in the data sheet divided by the number
/// of multiprocessors and the boost clock.
const FLOPS_PER_CLOCK: [(&str, f64); 5] = [
    ("a100", A100_FLOPS_PER_CLOCK),
    ("rtx3090", 512.0),
    ("rtx4090", 512.0),
    ("rtx5090", 512.0),
    ("l40s", 1024.0),
];
/// Bytes per clock that shared memory reads or writes (CUDA C++ programming guide: 32 banks of 4 bytes).
const SHARED_BYTES_PER_CLOCK: f64 = 128.0;
/// Depth of a k-tile, rows of a warp's product, and number of warps.
const DEPTH: f64 = 64.0;
const WARP_ROWS: f64 = 16.0;
const WARPS: f64 = 8.0;
/// Number of columns of both tiles. A block with the larger tile needs 145 KB of shared memory.
const COLUMNS: f64 = 128.0;
const BF16: f64 = 2.0;
/// Assumed for the A100, not measured: clocks from the start of a tile until its first k-tile has arrived, and clocks that
/// tensor cores wait at the barrier of each k-tile.
const START: f64 = 1000.0;
const TURN: f64 = 60.0;
/// The share of an A100's peak that cuBLAS reaches with its best shape: 271.2 of 312 TFLOP/s (Bekman, Machine Learning
/// Engineering, "Maximum Achievable Matmul FLOPS", A100 SXM).
const CUBLAS_SHARE: f64 = 271.2 / 312.0;

/// Returns the clocks per k-tile of a tile with this number of rows: of the tensor cores, and of shared memory.
fn clocks(rows: f64, flops_per_clock: f64) -> (f64, f64) {
    let products_of_a_warp = rows / (WARPS * WARP_ROWS); // each reads its own rows of A, and B is kept for all of them
    let written = (rows + COLUMNS) * DEPTH * BF16;
    let read = WARPS * (products_of_a_warp * WARP_ROWS + COLUMNS) * DEPTH * BF16;
    (
        2.0 * rows * COLUMNS * DEPTH / flops_per_clock,
        (written + read) / SHARED_BYTES_PER_CLOCK,
    )
}

/// Returns a table with a row for each GPU and each tile that fits in its shared memory.
fn limits() -> Table {
    let mut table = Table::new(&[
        "GPU",
        "tile",
        "tensor cores, clocks",
        "shared memory, clocks",
        "limit",
        "share of the peak at most",
    ]);
    for (key, flops_per_clock) in FLOPS_PER_CLOCK {
        let chip = Chip::named(key).expect("a chip of the list");
        for rows in [128.0, 256.0] {
            if rows > 128.0 && chip.capability != (8, 0) {
                continue; // needs more shared memory than a block may have
            }
            let (tensor, shared) = clocks(rows, flops_per_clock);
            let limit = match tensor >= shared {
                true => "tensor cores",
                false => "shared memory",
            };
            table.rows.push(vec![
                format!("`{key}`").into(),
                format!("{rows} x {COLUMNS}").into(),
                format!("{tensor:.0}").into(),
                format!("{shared:.0}").into(),
                limit.into(),
                format!("{:.0}%", 100.0 * tensor / tensor.max(shared)).into(),
            ]);
        }
    }
    table
}

/// An estimate of a product on an A100.
struct Estimate {
    tile_rows: f64,
    waves: f64,
    /// FLOP/s relative to the peak.
    share: f64,
}

/// Estimates a product on an A100: each multiprocessor computes a tile at a time, and writes its result at its share of
/// the memory bandwidth before it begins the next one.
fn on_a100(product: Product, shape: &Shape) -> Estimate {
    let chip = Chip::named("a100").expect("a chip of the list");
    let processors = chip.multiprocessors as f64;
    let tiles = |n: usize, size: f64| (n as f64 / size).ceil();
    let groups = shape.counts.len() as f64;
    let (columns, depth) = match product {
        Product::Forward => (shape.n, Some(shape.k)),
        Product::InputGradient => (shape.k, Some(shape.n)),
        Product::WeightGradient => (shape.k, None),
    };
    let row_tiles = |rows: f64| match product {
        Product::WeightGradient => groups * tiles(shape.n, rows),
        _ => shape.counts.iter().map(|count| tiles(*count, rows)).sum(),
    };
    // As the launcher chooses (kernels/common/gemm_plan.cuh).
    let most = match product {
        Product::WeightGradient => row_tiles(256.0),
        _ => tiles(shape.rows(), 256.0),
    };
    let tile_rows = match most * tiles(columns, COLUMNS) >= processors {
        true => 256.0,
        false => 128.0,
    };
    let (tensor, shared) = clocks(tile_rows, A100_FLOPS_PER_CLOCK);
    let output = match product {
        Product::WeightGradient => 2.0 * BF16,
        _ => BF16,
    };
    let clock = chip.peak / processors / A100_FLOPS_PER_CLOCK;
    let bytes_per_clock = chip.bandwidth / processors / clock;
    let most_rows = shape.counts.iter().max().copied().unwrap_or_default();
    let k_tiles = tiles(depth.unwrap_or(most_rows), DEPTH);
    let epilogue = tile_rows * COLUMNS * output / bytes_per_clock;
    let tile = START + k_tiles * (tensor.max(shared) + TURN) + epilogue;
    let waves = row_tiles(tile_rows) * tiles(columns, COLUMNS) / processors;
    let flops = 2.0 * (shape.rows() * shape.n * shape.k) as f64;
    Estimate {
        tile_rows,
        waves,
        share: flops / chip.peak / (waves.ceil() * tile / clock),
    }
}

/// Returns the estimates for products of the benchmark's core set with groups of equal size.
fn estimates() -> Table {
    let mut table = Table::new(&[
        "product",
        "tile",
        "waves",
        "share of the peak",
        "of cuBLAS's best",
    ]);
    for group in groups() {
        let Work::Gemm { product, shape } = &group.work else {
            continue;
        };
        let alike = shape.counts.iter().all(|count| *count == shape.counts[0]);
        if group.set != Set::Core || !alike {
            continue;
        }
        let found = on_a100(*product, shape);
        table.rows.push(vec![
            format!("`{}`", group.name).into(),
            format!("{} x {COLUMNS}", found.tile_rows).into(),
            format!("{:.1}", found.waves).into(),
            format!("{:.0}%", 100.0 * found.share).into(),
            format!("{:.2}", found.share / CUBLAS_SHARE).into(),
        ]);
    }
    table
}

/// Returns both tables in Markdown.
pub fn markdown() -> String {
    let estimates = estimates();
    format!(
        "{}\nEstimates for an A100, none of them measured: {} products of the benchmark's core set. Besides the limit of a \
         k-tile they count {START} clocks until the first k-tile of a tile has arrived, {TURN} clocks at the barrier of each k-tile, \
         the write of the result at a multiprocessor's share of the bandwidth, and the last wave. They assume the clock of the \
         data sheet. cuBLAS's best is {:.0}% of the peak, measured by others with the best of many shapes (\
         [Machine Learning Engineering](https://github.com/stas00/ml-engineering/tree/master/compute/accelerator)).\n\n{}",
        limits().markdown(),
        estimates.rows.len(),
        100.0 * CUBLAS_SHARE,
        estimates.markdown()
    )
}

/// Writes the table into a page, between its marks.
///
/// # Errors
/// When the page has no marks, or cannot be written.
pub fn update(page: &Path) -> Result<()> {
    replace_between(page, MARKS, &markdown())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_the_tensor_cores_are_those_of_the_data_sheets_at_a_clock_that_chips_have() {
        for (key, flops_per_clock) in FLOPS_PER_CLOCK {
            let chip = Chip::named(key).unwrap();
            let clock = chip.peak / chip.multiprocessors as f64 / flops_per_clock;
            assert!((1.4e9..2.6e9).contains(&clock), "{key}: {clock}");
        }
    }

    #[test]
    fn a_product_on_an_a100_computed_by_hand() {
        // 4096³: 16 x 32 tiles in five waves of 108; 64 k-tiles of 2048 + 60 clocks; 64 KiB written at 13.4 bytes per clock.
        let found = on_a100(Product::Forward, &Shape::new(&[4096], 4096, 4096));
        assert_eq!(found.tile_rows, 256.0);
        assert!((found.waves - 512.0 / 108.0).abs() < 1e-12);
        let clock = 312e12 / 108.0 / 2048.0;
        let tile = 1000.0 + 64.0 * 2108.0 + 65536.0 / (2.039e12 / 108.0 / clock);
        let seconds = 5.0 * tile / clock;
        let share = 2.0 * 4096f64.powi(3) / 312e12 / seconds;
        assert!((found.share - share).abs() < 1e-9, "{}", found.share);
        // Too few tiles of 256 rows for all multiprocessors.
        let small = on_a100(Product::Forward, &Shape::new(&[1024], 1024, 1024));
        assert_eq!(small.tile_rows, 128.0);
    }

    #[test]
    fn a_k_tile_computed_by_hand() {
        // 128 x 128 on an A100: 128 · 128 · 64 multiply-adds, 1,024 per clock. Shared memory: 2 x 16 KB are written; each
        // of 8 warps reads 2 KB of A and 16 KB of B.
        let kb = 1024.0;
        assert_eq!(
            clocks(128.0, 2048.0),
            (1024.0, (32.0 + 8.0 * 18.0) * kb / 128.0)
        );
        assert_eq!(
            clocks(256.0, 2048.0),
            (2048.0, (48.0 + 8.0 * 20.0) * kb / 128.0)
        );
    }
}
