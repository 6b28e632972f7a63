//! The grouped GEMMs' host side: which tile a product gets, and what the launchers refuse.

use crate::support::refusals::refuses;
use crate::support::schedules::table;
use routegrad::device::machine::H200_MULTIPROCESSORS;
use routegrad::kernels::bindings::*;
use routegrad::kernels::grouped_gemm::{self, Plan};
use routegrad::kernels::{GroupedGemmForward, GroupedGemmInputGradient, GroupedGemmWeightGradient};

const FORWARD: u32 = ROUTEGRAD_GEMM_FORWARD;
const INPUT_GRADIENT: u32 = ROUTEGRAD_GEMM_INPUT_GRADIENT;
const WEIGHT_GRADIENT: u32 = ROUTEGRAD_GEMM_WEIGHT_GRADIENT;

fn plan(product: u32, rows: usize, experts: usize, n: usize, k: usize) -> Plan {
    grouped_gemm::plan(
        table(),
        product,
        [rows, experts, n, k],
        H200_MULTIPROCESSORS,
    )
    .unwrap_or_else(|e| panic!("{e}"))
}

/// The products of the paper's expert layers at 16 Ki tokens: (rows, experts, n, k).
fn paper_layers() -> Vec<(usize, usize, usize, usize)> {
    let mut layers = vec![];
    for (hidden, width8) in [(512, 1408), (1024, 2816), (2048, 5632)] {
        for (experts, width, top_k) in [
            (8, width8, 1),
            (8, width8, 2),
            (32, width8 / 4, 1),
            (32, width8 / 4, 4),
        ] {
            layers.push((16384 * top_k, experts, 2 * width, hidden)); // gate and up
            layers.push((16384 * top_k, experts, hidden, width)); // down
        }
    }
    layers
}

#[test]
fn the_plan_is_a_pure_function_with_a_grid_that_fits() {
    for (rows, experts, n, k) in paper_layers() {
        for product in [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT] {
            let (first, second) = (
                plan(product, rows, experts, n, k),
                plan(product, rows, experts, n, k),
            );
            assert_eq!(format!("{first:?}"), format!("{second:?}"));
            assert!(
                1 <= first.blocks && first.blocks as usize <= H200_MULTIPROCESSORS,
                "{first:?}"
            );
            assert!(first.stages >= 3, "{first:?}");
            let floor =
                2.0 * rows as f64 * n as f64 * k as f64 / (4096.0 * H200_MULTIPROCESSORS as f64);
            assert!(
                first.clocks as f64 >= floor,
                "{first:?}: fewer clocks than the tensor cores need, {floor}"
            );
        }
    }
}

#[test]
fn the_plan_wastes_little_of_the_papers_layers() {
    for (rows, experts, n, k) in paper_layers() {
        for product in [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT] {
            let p = plan(product, rows, experts, n, k);
            let columns = if product == FORWARD { n } else { k };
            let computed = columns.next_multiple_of(p.tile_columns as usize);
            let waste = computed as f64 / columns as f64 - 1.0;
            assert!(
                waste <= 0.1,
                "product {product}, {rows} rows, n {n}, k {k}: {p:?} computes {computed} columns"
            );
        }
    }
}

#[test]
fn the_plan_is_what_it_was() {
    // One number per paper layer (routegrad_gemm_tile); a change of the estimate must be meant.
    let tile = |product, (rows, experts, n, k)| plan(product, rows, experts, n, k).tile;
    let layers = paper_layers();
    let chosen = |product| {
        layers
            .iter()
            .map(|&layer| tile(product, layer))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        chosen(FORWARD),
        [
            5, 1, 5, 1, 5, 5, 5, 5, 3, 1, 1, 1, 3, 1, 3, 1, 1, 1, 1, 1, 3, 1, 1, 1
        ]
    );
    assert_eq!(
        chosen(INPUT_GRADIENT),
        [
            1, 5, 1, 5, 1, 5, 1, 5, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 1, 1, 3, 1, 3
        ]
    );
    assert_eq!(
        chosen(WEIGHT_GRADIENT),
        [
            1, 4, 1, 4, 4, 4, 2, 4, 1, 1, 1, 1, 4, 4, 1, 1, 1, 1, 1, 1, 4, 4, 1, 2
        ]
    );
}

#[test]
fn a_small_problem_gets_no_more_blocks_than_tiles() {
    assert_eq!(plan(FORWARD, 1, 1, 8, 8).blocks, 1);
    assert_eq!(plan(WEIGHT_GRADIENT, 1, 3, 8, 8).blocks, 3);
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        GroupedGemmForward {
            out, x, w, offsets[unaligned];
            row_token: None, rows: 4, x_rows: 4, experts: 2, n: 16, k: 8, tile: 0
        }
        OUT_OF_RANGE { n: 0; k: 0; experts: 0; rows: 0, 1 << 31; x_rows: 3; tile: 8, -1 }
        NOT_MULTIPLE { n: 20; k: 1 }
        OVERFLOW {
            [n: 1 << 20] k: 1 << 20;
            [x_rows: 1 << 30, n: 1 << 16, k: 1 << 16] rows: 1 << 30
        }
    );
    refuses!(
        GroupedGemmInputGradient {
            dx, dout, w, offsets[unaligned];
            row_token: None, rows: 4, dout_rows: 4, experts: 2, n: 16, k: 8, tile: 0
        }
        OUT_OF_RANGE { n: 0; k: 0; experts: 0; rows: 0, 1 << 31; dout_rows: 3; tile: 8, -1 }
        NOT_MULTIPLE { n: 20; k: 1 }
        OVERFLOW {
            [n: 1 << 20] k: 1 << 20;
            [dout_rows: 1 << 30, n: 1 << 16, k: 1 << 16] rows: 1 << 30
        }
    );
    refuses!(
        GroupedGemmWeightGradient {
            dw, dout, x, offsets[unaligned];
            dout_row_token: None, x_row_token: None, rows: 4, dout_rows: 4, x_rows: 4, experts: 2,
            n: 16, k: 8, accumulate: false, tile: 0
        }
        OUT_OF_RANGE {
            n: 0; k: 0; experts: 0; rows: 0, 1 << 31; dout_rows: 3; x_rows: 3;
            [dout_row_token: Pointer::good()] x_row_token: Pointer::good();
            tile: 8, -1, ROUTEGRAD_TILE_PINGPONG_128X176 as i32
        }
        NOT_MULTIPLE { n: 20; k: 1 }
        OVERFLOW {
            [n: 1 << 20] k: 1 << 20;
            [experts: 1 << 16, n: 1 << 17, k: 1 << 17] rows: 4
        }
    );
}
