//! The experts' fused products' host side: which tile each gets, and what the launchers refuse.

use crate::support::outputs;
use crate::support::refusals::{input, optional, output, stream};
use crate::support::schedules::{counted, table};
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

/// The arguments of the three launchers; each takes those that it has.
#[derive(Clone)]
struct Call {
    outputs: [usize; 3],
    inputs: [usize; 3],
    gates: usize,
    offsets: usize,
    row_token: usize,
    rows: usize,
    tokens: usize,
    experts: usize,
    hidden: usize,
    ffn: usize,
    dot_columns: usize,
    tile: i32,
}

fn dot_columns(
    rows: usize,
    experts: usize,
    hidden: usize,
    ffn: usize,
    tile: routegrad_gemm_tile,
) -> Result<usize> {
    grouped_swiglu::dot_columns(table(), rows, experts, hidden, ffn, tile as i32)
}

fn call(launcher: &str, c: &Call) -> Result<()> {
    let (offsets, row_token) = (optional(c.offsets), optional(c.row_token));
    match launcher {
        "grouped_swiglu_forward" => GroupedSwigluForward {
            h: output(c.outputs[0]),
            a: output(c.outputs[1]),
            x: input(c.inputs[0]),
            w: input(c.inputs[1]),
            offsets,
            row_token,
            rows: c.rows,
            x_rows: c.tokens,
            experts: c.experts,
            ffn: c.ffn,
            hidden: c.hidden,
            tile: c.tile,
        }
        .launch(&stream()),
        "grouped_down_forward" => GroupedDownForward {
            out: output(c.outputs[0]),
            column_sums: (c.outputs[1] != 0).then(|| output(c.outputs[1])),
            a: input(c.inputs[0]),
            w: input(c.inputs[1]),
            gates: optional(c.gates),
            offsets,
            row_token,
            rows: c.rows,
            tokens: c.tokens,
            experts: c.experts,
            hidden: c.hidden,
            ffn: c.ffn,
            tile: c.tile,
        }
        .launch(&stream()),
        _ => GroupedSwigluBackward {
            dh: output(c.outputs[0]),
            scaled_a: output(c.outputs[1]),
            dots: output(c.outputs[2]),
            dout: input(c.inputs[0]),
            w: input(c.inputs[1]),
            h: input(c.inputs[2]),
            gates: input(c.gates),
            offsets,
            row_token,
            dout_row_token: row_token,
            rows: c.rows,
            dout_rows: c.tokens,
            experts: c.experts,
            hidden: c.hidden,
            ffn: c.ffn,
            dot_columns: c.dot_columns,
            tile: c.tile,
        }
        .launch(&stream()),
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 64];
    let at = |i: usize| &room[8 * i] as *const u128 as usize;
    let valid = Call {
        outputs: [at(0), at(1), at(2)],
        inputs: [at(3), at(4), at(5)],
        gates: at(6),
        offsets: at(7),
        row_token: 0,
        rows: 4,
        tokens: 4,
        experts: 2,
        hidden: 8,
        ffn: 16,
        dot_columns: 1,
        tile: 0,
    };
    let null = "is a null pointer";
    let misaligned = "is not 16-byte aligned";
    let range = "is outside what the kernel can do";
    let overflow = "makes a product of sizes overflow";
    let multiple = "is not a multiple of 8";
    /// Launcher, outputs, inputs, the size that bounds a gather, and a tile that it has no kernel for.
    type Signature<'a> = (&'a str, &'a [&'a str], &'a [&'a str], &'a str, i32);
    let launchers: [Signature; 3] = [
        (
            "grouped_swiglu_forward",
            &["h", "a"],
            &["x", "w"],
            "x_rows",
            ROUTEGRAD_TILE_PINGPONG_128X128 as i32,
        ),
        (
            "grouped_down_forward",
            &["out"],
            &["a", "w"],
            "tokens",
            ROUTEGRAD_TILE_PINGPONG_128X176 as i32,
        ),
        (
            "grouped_swiglu_backward",
            &["dh", "scaled_a", "dots"],
            &["dout", "w", "h"],
            "dout_rows",
            ROUTEGRAD_TILE_COOPERATIVE_128X256 as i32,
        ),
    ];
    for (launcher, output_names, input_names, height, no_kernel) in launchers {
        let refused = |change: &dyn Fn(&mut Call), why: &str, name: &str| {
            let mut arguments = valid.clone();
            change(&mut arguments);
            let mut text = String::new();
            let run = || text = call(launcher, &arguments).expect_err(name).to_string();
            assert_eq!(
                counted(run).launches,
                0,
                "{launcher} {name}: something was launched"
            );
            assert!(
                text.contains(&format!("argument `{name}` {why}")),
                "{launcher} {name} {why}: {text}"
            );
        };
        for (i, name) in output_names.iter().enumerate() {
            refused(&|c| c.outputs[i] = 0, null, name);
            refused(&|c| c.outputs[i] += 8, misaligned, name);
        }
        for (i, name) in input_names.iter().enumerate() {
            refused(&|c| c.inputs[i] = 0, null, name);
            refused(&|c| c.inputs[i] += 2, misaligned, name);
        }
        refused(&|c| c.offsets = 0, null, "offsets");
        refused(&|c| c.hidden = 20, multiple, "hidden");
        refused(&|c| c.ffn = 1, multiple, "ffn");
        refused(&|c| c.hidden = 0, range, "hidden");
        refused(&|c| c.ffn = 0, range, "ffn");
        refused(&|c| c.experts = 0, range, "experts");
        refused(&|c| c.rows = 0, range, "rows");
        refused(&|c| c.rows = 1 << 31, range, "rows");
        refused(&|c| c.tokens = 3, range, height);
        refused(&|c| c.tile = 6, range, "tile");
        refused(&|c| c.tile = no_kernel, range, "tile");
        let last = if launcher == "grouped_swiglu_forward" {
            "hidden"
        } else {
            "ffn"
        };
        refused(&|c| (c.hidden, c.ffn) = (1 << 20, 1 << 20), overflow, last);
        let many = |c: &mut Call| {
            (c.rows, c.tokens, c.hidden, c.ffn) = (1 << 30, 1 << 30, 1 << 16, 1 << 16)
        };
        refused(&many, overflow, "rows");
        match launcher {
            "grouped_down_forward" => refused(&|c| c.outputs[1] += 4, misaligned, "column_sums"),
            "grouped_swiglu_backward" => {
                refused(&|c| c.inputs[2] = c.outputs[0], range, "h");
                refused(&|c| c.gates = 0, null, "gates");
                refused(&|c| c.dot_columns = 2, range, "dot_columns");
            }
            _ => {}
        }
    }
    let wrong_tile = dot_columns(4, 2, 8, 16, ROUTEGRAD_TILE_COOPERATIVE_128X256);
    assert!(
        wrong_tile
            .unwrap_err()
            .to_string()
            .contains("argument `tile`")
    );
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
