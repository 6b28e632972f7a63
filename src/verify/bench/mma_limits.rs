//! What limits the main loop of a product on GPUs without wgmma (`kernels/common/mma_tile.cuh`), reckoned from data sheets.
//!
//! A k-tile of 64 costs the tensor cores its operations, and shared memory what goes through it: `cp.async` writes both operands
//! once, `ldmatrix` reads A once and B once for each warp of a column of warps. The longer of the two is the least that a k-tile
//! takes. Not counted: waits at the barrier of each k-tile, the epilogue, the last wave.

use crate::device::machine::Chip;
use crate::error::Result;
use crate::report::page::{Cell, Table, replace_between};
use std::path::Path;

/// Marks of the table in a page.
const MARKS: [&str; 2] = [
    "<!-- limits of mma.sync: routegrad bench --predict --update writes what follows -->",
    "<!-- end of limits -->",
];

/// Dense bf16 operations with f32 sums that a multiprocessor's tensor cores do in a clock: the peak of the chip's data sheet over
/// multiprocessors and the boost clock there.
const FLOPS_PER_CLOCK: [(&str, f64); 5] = [
    ("a100", 2048.0),
    ("rtx3090", 512.0),
    ("rtx4090", 512.0),
    ("rtx5090", 512.0),
    ("l40s", 1024.0),
];
/// Bytes that shared memory reads or writes in a clock (CUDA C++ programming guide: 32 banks of 4 bytes).
const SHARED_BYTES_PER_CLOCK: f64 = 128.0;
/// k of a k-tile, rows of a warp's product, and warps.
const DEPTH: f64 = 64.0;
const WARP_ROWS: f64 = 16.0;
const WARPS: f64 = 8.0;
/// Columns of both tiles. A block with the larger one needs 145 KB of shared memory.
const COLUMNS: f64 = 128.0;
const BF16: f64 = 2.0;

/// Clocks of a k-tile of a tile of so many rows: of the tensor cores, and of shared memory.
fn clocks(rows: f64, flops_per_clock: f64) -> (f64, f64) {
    let products_of_a_warp = rows / (WARPS * WARP_ROWS); // each reads its own rows of A, and B is kept for all of them
    let written = (rows + COLUMNS) * DEPTH * BF16;
    let read = WARPS * (products_of_a_warp * WARP_ROWS + COLUMNS) * DEPTH * BF16;
    (
        2.0 * rows * COLUMNS * DEPTH / flops_per_clock,
        (written + read) / SHARED_BYTES_PER_CLOCK,
    )
}

/// A row for each GPU and each tile that it has room for.
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

/// The table, in Markdown.
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
    fn a_k_tile_worked_by_hand() {
        // 128 x 128 on an A100: 128 · 128 · 64 multiply-adds, 1,024 a clock. Shared memory: 2 x 16 KB written; each of 8 warps
        // reads 2 KB of A and 16 KB of B.
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
