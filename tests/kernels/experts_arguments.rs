//! The experts' fused products' host side: which tile each gets, and what the launchers refuse.

use crate::support::outputs;
use crate::support::refusals::{refused, refuses, room};
use crate::support::schedules::table;
use routegrad::device::machine::H200_MULTIPROCESSORS;
use routegrad::error::Result;
use routegrad::kernels::bindings::*;
use routegrad::kernels::{
    GroupedDownForward, GroupedSwigluBackward, GroupedSwigluForward, grouped_gemm, grouped_swiglu,
};
use routegrad::verify::kernels::experts::Layer;
use routegrad::verify::kernels::grouped_swiglu::{BACKWARD_TILES, Backward, backward_problem};
use routegrad::verify::kernels::operands::Gather;
use std::sync::Arc;

fn dot_columns(
    rows: usize,
    experts: usize,
    hidden: usize,
    ffn: usize,
    tile: routegrad_gemm_tile,
) -> Result<usize> {
    grouped_swiglu::dot_columns(table(), rows, experts, hidden, ffn, tile as i32)
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        GroupedSwigluForward {
            h, a, x, w, offsets[unaligned];
            row_token: None, rows: 4, x_rows: 4, experts: 2, ffn: 16, hidden: 8, tile: 0
        }
        OUT_OF_RANGE {
            hidden: 0; ffn: 0; experts: 0; rows: 0, 1 << 31; x_rows: 3;
            tile: 6, ROUTEGRAD_TILE_PINGPONG_128X128 as i32
        }
        NOT_MULTIPLE { hidden: 20; ffn: 1 }
        OVERFLOW {
            [ffn: 1 << 20] hidden: 1 << 20;
            [x_rows: 1 << 30, hidden: 1 << 16, ffn: 1 << 16] rows: 1 << 30
        }
    );
    refuses!(
        GroupedDownForward {
            out, column_sums[optional], a, w, offsets[unaligned];
            gates: Pointer::good(), row_token: None, rows: 4, tokens: 4, experts: 2, hidden: 8,
            ffn: 16, tile: 0
        }
        OUT_OF_RANGE {
            hidden: 0; ffn: 0; experts: 0; rows: 0, 1 << 31; tokens: 3;
            tile: 6, ROUTEGRAD_TILE_PINGPONG_128X176 as i32
        }
        NOT_MULTIPLE { hidden: 20; ffn: 1 }
        OVERFLOW {
            [hidden: 1 << 20] ffn: 1 << 20;
            [tokens: 1 << 30, hidden: 1 << 16, ffn: 1 << 16] rows: 1 << 30
        }
    );
    refuses!(
        GroupedSwigluBackward {
            dh, scaled_a, dots, dout, w, h, gates[unaligned], offsets[unaligned];
            row_token: None, dout_row_token: None, rows: 4, dout_rows: 4, experts: 2, hidden: 8,
            ffn: 16, dot_columns: 1, tile: 0
        }
        OUT_OF_RANGE {
            // h may not be where dh is written.
            h: Pointer::at(room(true));
            hidden: 0; ffn: 0; experts: 0; rows: 0, 1 << 31; dout_rows: 3; dot_columns: 2;
            tile: 6, ROUTEGRAD_TILE_COOPERATIVE_128X256 as i32
        }
        NOT_MULTIPLE { hidden: 20; ffn: 1 }
        OVERFLOW {
            [hidden: 1 << 20] ffn: 1 << 20;
            [dout_rows: 1 << 30, hidden: 1 << 16, ffn: 1 << 16] rows: 1 << 30
        }
    );
    let wrong_tile = dot_columns(4, 2, 8, 16, ROUTEGRAD_TILE_COOPERATIVE_128X256);
    refused(|| wrong_tile.map(|_| ()), "", "tile");
}

#[test]
fn the_automatic_tile_gives_the_bytes_of_the_tile_whose_dot_columns_it_tells() {
    for ffn in [176, 352, 528] {
        let layer = Layer::new(&[200, 31], 64, ffn);
        let backward = Arc::new(Backward::new(&layer, Gather::A));
        let rows = backward.operands.rows_given;
        let told = dot_columns(rows, 2, 64, ffn, ROUTEGRAD_TILE_AUTO).unwrap();
        let [(tile, columns)] = BACKWARD_TILES;
        assert_eq!(told, ffn.div_ceil(columns));
        assert_eq!(dot_columns(rows, 2, 64, ffn, tile).unwrap(), told);
        let explicit = outputs(&backward_problem(&backward, (tile, columns)));
        let automatic = outputs(&backward_problem(&backward, (ROUTEGRAD_TILE_AUTO, columns)));
        assert!(explicit == automatic, "ffn {ffn}");
    }
}

/// The products of the paper's expert layers at 16 Ki tokens on an H200, by tile (routegrad_gemm_tile), in the order gate
/// and up, down, backward; a change of the estimate must be meant.
#[test]
fn the_plan_of_the_papers_layers_is_what_it_was() {
    let plan = |product, rows, experts, n, k| {
        let sizes = [rows, experts, n, k];
        let plan = grouped_gemm::plan(table(), product, sizes, H200_MULTIPROCESSORS)
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(plan.stages >= 3, "{plan:?}");
        plan.tile as u32
    };
    let mut chosen = vec![];
    for (hidden, width8) in [(512, 1408), (1024, 2816), (2048, 5632)] {
        for (experts, ffn, top_k) in [
            (8, width8, 1),
            (8, width8, 2),
            (32, width8 / 4, 1),
            (32, width8 / 4, 4),
        ] {
            let rows = 16384 * top_k;
            chosen.push([
                plan(
                    ROUTEGRAD_GEMM_SWIGLU_FORWARD,
                    rows,
                    experts,
                    2 * ffn,
                    hidden,
                ),
                plan(ROUTEGRAD_GEMM_DOWN_FORWARD, rows, experts, hidden, ffn),
                plan(ROUTEGRAD_GEMM_SWIGLU_BACKWARD, rows, experts, hidden, ffn),
            ]);
        }
    }
    let small = [[5, 1, 4]; 8];
    let large = [[1, 1, 4], [1, 1, 4], [3, 1, 4], [1, 1, 4]];
    assert_eq!(chosen[..8], small);
    assert_eq!(chosen[8..], large);
}
