//! The experts' fused products on the simulator: every case of the library, every schedule, NaN in a neighbour, exact
//! counts of work and bytes.

use crate::support::schedules::{counted, is_plain, with_options};
use crate::support::{check_cases, check_schedules, outputs};
use half::bf16;
use routegrad::kernels::cost::{Cost, Sizes};
use routegrad::kernels::{GroupedDownForward, GroupedSwigluBackward, GroupedSwigluForward};
use routegrad::verify::kernels::Problem;
use routegrad::verify::kernels::experts::Layer;
use routegrad::verify::kernels::grouped_down::{self, Down, Sums};
use routegrad::verify::kernels::grouped_swiglu::{
    BACKWARD_TILES, Backward, FORWARD_TILES, Forward, backward_problem, forward_problem,
};
use routegrad::verify::kernels::operands::{Gather, TILES};
use std::sync::Arc;

#[test]
#[ignore = "slow"]
fn swiglu_forward_is_within_half_an_ulp_of_float64() {
    check_cases("grouped_swiglu_forward");
}

#[test]
fn swiglu_backward_is_within_half_an_ulp_of_float64() {
    check_cases("grouped_swiglu_backward");
}

#[test]
fn down_and_its_column_sums_are_within_roundoff_of_float64() {
    check_cases("grouped_down_forward");
}

#[test]
#[ignore = "slow"]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for launcher in [
        "grouped_swiglu_forward",
        "grouped_swiglu_backward",
        "grouped_down_forward",
    ] {
        check_schedules(launcher);
    }
}

/// The outputs of the three launchers, tile by tile.
struct Everything {
    forward: Vec<Vec<Vec<u8>>>,
    down: Vec<Vec<Vec<u8>>>,
    backward: Vec<Vec<Vec<u8>>>,
}

/// What the three launchers are given.
struct Inputs {
    forward: Forward,
    down: Down,
    backward: Backward,
}

impl Inputs {
    /// Rows in order, so that those of one expert can be spoilt apart.
    fn new(layer: &Layer) -> Self {
        Self {
            forward: Forward::new(layer, Gather::None),
            down: Down::new(layer, Sums::Gated),
            backward: Backward::new(layer, Gather::None),
        }
    }

    fn run(self) -> Everything {
        let (forward, down) = (Arc::new(self.forward), Arc::new(self.down));
        let backward = Arc::new(self.backward);
        let forward = |&tile| outputs(&forward_problem(&forward, tile));
        let down = |&tile| outputs(&grouped_down::problem(&down, tile));
        let backward = |&tile| outputs(&backward_problem(&backward, tile));
        Everything {
            forward: FORWARD_TILES.iter().map(forward).collect(),
            down: grouped_down::TILES.iter().map(down).collect(),
            backward: BACKWARD_TILES.iter().map(backward).collect(),
        }
    }
}

#[test]
fn neither_the_tile_nor_the_number_of_multiprocessors_changes_the_bytes() {
    let layer = Layer::new(&[0, 130, 0, 1, 127, 0, 300], 136, 392);
    let first = Inputs::new(&layer).run();
    assert!(first.forward.iter().all(|tile| *tile == first.forward[0]));
    assert!(first.down.iter().all(|tile| *tile == first.down[0]));
    let counts: &[i32] = if is_plain() { &[1, 2, 132] } else { &[1] };
    for &count in counts {
        let run = || Inputs::new(&layer).run();
        let other = with_options(|o| o.multiprocessors = count, run);
        assert!(other.forward == first.forward, "{count} multiprocessors");
        assert!(other.down == first.down, "{count} multiprocessors");
        assert!(other.backward == first.backward, "{count} multiprocessors");
    }
}

/// Whether `spoilt` differs from `clean` in every line of `lines` and in no other, lines being `bytes` long.
fn differ_in(clean: &[u8], spoilt: &[u8], bytes: usize, lines: std::ops::Range<usize>) -> bool {
    clean
        .chunks(bytes)
        .zip(spoilt.chunks(bytes))
        .enumerate()
        .all(|(i, (clean, spoilt))| (clean != spoilt) == lines.contains(&i))
}

#[test]
fn an_expert_full_of_nan_leaves_the_others_as_they_are() {
    let (hidden, ffn, spoilt) = (72, 136, 100..170);
    let layer = Layer::new(&[100, 70, 90], hidden, ffn);
    let mut inputs = Inputs::new(&layer);
    let clean = Inputs::new(&layer).run();
    let rows = |width: usize| spoilt.start * width..spoilt.end * width;
    inputs.forward.operands.a[rows(hidden)].fill(bf16::NAN);
    inputs.forward.operands.b[2 * ffn * hidden..4 * ffn * hidden].fill(bf16::INFINITY);
    inputs.down.operands.a[rows(ffn)].fill(bf16::NAN);
    inputs.down.operands.b[ffn * hidden..2 * ffn * hidden].fill(bf16::INFINITY);
    inputs.backward.operands.a[rows(hidden)].fill(bf16::NAN);
    inputs.backward.h[rows(2 * ffn)].fill(bf16::NAN);
    let got = inputs.run();
    for (clean, got) in clean.forward.iter().zip(&got.forward) {
        assert!(differ_in(&clean[0], &got[0], ffn * 4, spoilt.clone()));
        assert!(differ_in(&clean[1], &got[1], ffn * 2, spoilt.clone()));
    }
    for (clean, got) in clean.down.iter().zip(&got.down) {
        assert!(differ_in(&clean[0], &got[0], hidden * 2, spoilt.clone()));
        // Blocks offsets[e] / 64 + e + b of expert 1: two from 100 / 64 + 1.
        assert!(differ_in(&clean[1], &got[1], hidden * 4, 2..4));
    }
    for (i, (clean, got)) in clean.backward.iter().zip(&got.backward).enumerate() {
        let dots = ffn.div_ceil(BACKWARD_TILES[i].1) * 4;
        assert!(differ_in(&clean[0], &got[0], ffn * 4, spoilt.clone()));
        assert!(differ_in(&clean[1], &got[1], ffn * 2, spoilt.clone()));
        assert!(differ_in(&clean[2], &got[2], dots, spoilt.clone()));
    }
}

#[test]
fn a_row_of_nan_or_infinity_leaves_its_neighbours_as_they_are() {
    let (hidden, ffn, row) = (72, 136, 41);
    let layer = Layer::new(&[100], hidden, ffn);
    let clean = Inputs::new(&layer).run();
    for bad in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
        let mut inputs = Inputs::new(&layer);
        inputs.forward.operands.a[row * hidden..][..hidden].fill(bad);
        inputs.down.operands.a[row * ffn..][..ffn].fill(bad);
        inputs.backward.operands.a[row * hidden..][..hidden].fill(bad);
        let got = inputs.run();
        for (clean, got) in clean.forward.iter().zip(&got.forward) {
            assert!(differ_in(&clean[0], &got[0], ffn * 4, row..row + 1));
            assert!(differ_in(&clean[1], &got[1], ffn * 2, row..row + 1));
        }
        for (clean, got) in clean.down.iter().zip(&got.down) {
            assert!(differ_in(&clean[0], &got[0], hidden * 2, row..row + 1));
            assert!(differ_in(&clean[1], &got[1], hidden * 4, 0..1));
        }
        for (clean, got) in clean.backward.iter().zip(&got.backward) {
            assert!(differ_in(&clean[0], &got[0], ffn * 4, row..row + 1));
            // A comes from h, which is as it was.
            assert!(clean[1] == got[1]);
        }
    }
}

/// Holds counted bytes and FLOPs against the header's formula: work and writes exactly, all bytes within 2%. `index`: what
/// reading the rows' index again from cache takes.
fn holds(problem: &Problem, cost: Cost, index: usize, written: usize) {
    let counters = counted(|| drop(outputs(problem)));
    let label = &problem.label;
    assert_eq!(counters.tensor_flops as f64, cost.flops, "{label}: FLOPs");
    assert_eq!(counters.bytes_written, written as u64, "{label}: written");
    let bytes = (counters.bytes_read + counters.bytes_written) as f64;
    let formula = cost.bytes + index as f64;
    assert!(
        (bytes / formula - 1.0).abs() <= 0.02,
        "{label}: {bytes} bytes, {formula} by the formula"
    );
}

/// At one tile per expert each operand is read once, and the headers' formulas hold as they stand.
#[test]
fn work_and_bytes_are_what_the_headers_say() {
    if !is_plain() {
        return;
    }
    let shape_of = |tile| TILES.into_iter().find(|t| t.0 == tile).unwrap();
    let (experts, depth) = (2, 2048);
    // An index is read by the 8 threads of a gathered row in every k-tile of 64.
    let index = |rows| rows * depth / 64 * 8 * 4;
    let sizes = |rows, hidden, ffn| Sizes {
        tokens: rows,
        hidden,
        ffn,
        experts,
        slots: 1,
        rows,
    };
    for tile in FORWARD_TILES {
        let (_, tile_rows, columns) = shape_of(tile);
        let (f, r) = (columns / 2, experts * tile_rows);
        let layer = Layer::new(&[tile_rows; 2], depth, f);
        let problem = forward_problem(&Arc::new(Forward::new(&layer, Gather::A)), tile);
        let cost = GroupedSwigluForward::cost(&sizes(r, depth, f));
        holds(&problem, cost, index(r), 6 * r * f);
    }
    for tile in grouped_down::TILES {
        let (_, tile_rows, d) = shape_of(tile);
        let r = experts * tile_rows;
        let layer = Layer::new(&[tile_rows; 2], d, depth);
        let problem = grouped_down::problem(&Arc::new(Down::new(&layer, Sums::Gated)), tile);
        let cost = GroupedDownForward::cost(&sizes(r, d, depth), true);
        holds(&problem, cost, 0, 2 * r * d + 4 * d * (r / 64));
    }
    for (tile, f) in BACKWARD_TILES {
        let (_, tile_rows, _) = shape_of(tile);
        let r = experts * tile_rows;
        let layer = Layer::new(&[tile_rows; 2], depth, f);
        let backward = Arc::new(Backward::new(&layer, Gather::A));
        let problem = backward_problem(&backward, (tile, f));
        let cost = GroupedSwigluBackward::cost(&sizes(r, depth, f), 1);
        holds(&problem, cost, index(r), 6 * r * f + 4 * r);
    }
}
