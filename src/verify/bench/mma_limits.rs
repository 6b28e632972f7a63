//! Computes from data sheets what limits the main loop of a product on GPUs without wgmma (`kernels/common/mma_tile.cuh`).
//!
//! A k-tile of 64 takes time for its operations on the tensor cores, and for its transfers through shared memory:
//! `cp.async` writes both operands once; `ldmatrix` reads A once, and B once for each warp in a column of warps. The
//! longer of the two times is a lower bound for a k-tile. Waits at the barrier of each k-tile, the epilogue and the last
//! wave are not included.

use crate::device::machine::Chip;
use crate::error::Result;
use crate::report::page::{Cell, Table, replace_between};
use std::path::Path;

/// Marks around the table in a page.
const MARKS: [&str; 2] = [
    "<!-- limits of mma.sync: routegrad bench --predict --update writes what follows -->",
    "<!-- end of limits -->",
];

/// Dense bf16 FLOPs with f32 accumulation per clock and multiprocessor: the peak in the data sheet divided by the number
/// of multiprocessors and the boost clock.
const FLOPS_PER_CLOCK: [(&str, f64); 5] = [
    ("a100", 2048.0),
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
            let row: [Cell; 6] = [
                format!("`{key}`").into(),
                format!("{rows} x {COLUMNS}").into(),
                format!("{tensor:.0}").into(),
                format!("{shared:.0}").into(),
                limit.into(),
                format!("{:.0}%", 100.0 * tensor / tensor.max(shared)).into(),
            ];
            table.rows.push(row.into());
        }
    }
    table
}

/// Returns the table in Markdown.
pub fn markdown() -> String {
    limits().markdown()
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
