//! The kernels for GPUs without TMA and wgmma, on the simulator as compute capability 8.0 (163 KB of shared memory for a
//! block) and 8.6 (99 KB): every case of the library, every schedule, the same bytes as the kernels for Hopper, no bank
//! conflicts, and what the launchers refuse.

use crate::support::refusals::{OUT_OF_RANGE, refused};
use crate::support::schedules::{counted, is_plain, schedules, table, with_options};
use crate::support::{check, outputs, problems_of, simulator};
use routegrad::kernels::bindings::*;
use routegrad::verify::kernels::Problem;
use routegrad::verify::kernels::experts::{covering_layers, small_layers};
use routegrad::verify::kernels::grouped_gemm::{self, Operands, Product, Product::*, Shape};
use routegrad::verify::kernels::grouped_swiglu::{Backward, backward_problem};
use routegrad::verify::kernels::operands::Gather;
use std::sync::Arc;

const ARCHS: [i32; 2] = [80, 86];

/// Every launcher with tensor cores, but `grouped_swiglu_backward`, whose cases name tiles.
const LAUNCHERS: [&str; 12] = [
    "grouped_gemm_forward",
    "grouped_gemm_input_gradient",
    "grouped_gemm_weight_gradient",
    "grouped_swiglu_forward",
    "grouped_down_forward",
    "head_logits",
    "qkv_rope_forward",
    "router_forward",
    "router_backward",
    "combine",
    "gate_gradient",
    "attention_backward",
];

fn on<R>(arch: i32, body: impl FnOnce() -> R) -> R {
    with_options(|o| o.arch = arch, body)
}

/// The problems of a launcher that leave the tile to it.
fn problems(launcher: &str, small: bool) -> impl Iterator<Item = Problem> {
    let of_a_tile = |p: &Problem| p.label.contains("tile ") && !p.label.contains("tile 0");
    problems_of(launcher, small).filter(move |p| !of_a_tile(p))
}

/// Problems of `grouped_swiglu_backward` on a tile of 128 columns.
fn swiglu_backward_problems(small: bool) -> impl Iterator<Item = Problem> {
    let layers = if small {
        small_layers()
    } else {
        covering_layers()
    };
    layers.into_iter().flat_map(|layer| {
        [Gather::A, Gather::None].map(|gather| {
            let backward = Arc::new(Backward::new(&layer, gather));
            backward_problem(&backward, (ROUTEGRAD_TILE_MMA_128X128, 128))
        })
    })
}

fn check_on_every_arch(launcher: &str) {
    for small in [true, false] {
        if !small && !is_plain() {
            continue;
        }
        for problem in problems(launcher, small) {
            ARCHS.iter().for_each(|&arch| on(arch, || check(&problem)));
        }
    }
}

#[test]
fn grouped_products_are_within_roundoff_of_float64() {
    LAUNCHERS[..3].iter().copied().for_each(check_on_every_arch);
}

#[test]
fn fused_products_are_within_roundoff_of_float64() {
    LAUNCHERS[3..7]
        .iter()
        .copied()
        .for_each(check_on_every_arch);
}

#[test]
fn swiglu_backward_is_within_half_an_ulp_of_float64() {
    for small in [true, false] {
        if small || is_plain() {
            for problem in swiglu_backward_problems(small) {
                ARCHS.iter().for_each(|&arch| on(arch, || check(&problem)));
            }
        }
    }
}

#[test]
fn the_router_is_within_f32_roundoff_of_float64() {
    LAUNCHERS[7..9]
        .iter()
        .copied()
        .for_each(check_on_every_arch);
}

#[test]
fn combine_and_gate_gradient_are_within_roundoff_of_float64() {
    LAUNCHERS[9..11]
        .iter()
        .copied()
        .for_each(check_on_every_arch);
}

#[test]
fn attention_is_within_its_bounds_of_float64() {
    check_on_every_arch("attention_forward");
    check_on_every_arch("attention_backward");
}

/// Every small problem gives the same bytes, which agree, under every schedule.
fn check_schedules(problem: &Problem, arch: i32) {
    let first = on(arch, || outputs(problem));
    problem.judged(&first).unwrap_or_else(|e| panic!("{e}"));
    for schedule in schedules() {
        let other = on(arch, || schedule.run(|| outputs(problem)));
        assert!(
            other == first,
            "{} on sm_{arch} under {schedule:?}",
            problem.label
        );
    }
}

#[test]
fn every_schedule_gives_the_same_bytes() {
    for launcher in LAUNCHERS.into_iter().chain(["attention_forward"]) {
        for problem in problems(launcher, true) {
            check_schedules(&problem, 86);
        }
    }
    for problem in swiglu_backward_problems(true) {
        check_schedules(&problem, 86);
    }
}

/// Both kinds of code add the same terms in the same order. Not so attention forward, whose maxima are of other tiles of
/// keys, and the router with more than 128 experts, which adds term by term.
#[test]
fn outputs_are_those_of_the_kernels_for_hopper_bit_for_bit() {
    for launcher in LAUNCHERS {
        for problem in problems(launcher, true) {
            if launcher.starts_with("router") && problem.label.contains("256 experts") {
                continue;
            }
            let hopper = outputs(&problem);
            for arch in ARCHS {
                let other = on(arch, || outputs(&problem));
                assert!(
                    other == hopper,
                    "{launcher}, {} on sm_{arch}",
                    problem.label
                );
            }
        }
    }
}

#[test]
fn no_read_or_write_of_a_matrix_waits_for_a_bank() {
    for launcher in LAUNCHERS.into_iter().chain(["attention_forward"]) {
        for problem in problems(launcher, true) {
            for arch in ARCHS.into_iter().chain([90]) {
                let counters = counted(|| drop(on(arch, || outputs(&problem))));
                assert_eq!(
                    counters.bank_conflicts, 0,
                    "{launcher}, {} on sm_{arch}",
                    problem.label
                );
            }
        }
    }
}

/// Tiles of one architecture and of the other.
#[test]
fn a_tile_of_another_architecture_is_refused() {
    let shape = Shape::new(&[300, 70], 136, 72);
    let operands = Arc::new(Operands::new(Forward, Gather::None, false, &shape));
    let run = |tile, arch| {
        let problem = grouped_gemm::problem(&operands, tile);
        on(arch, || problem.outputs(&simulator()).map(drop))
    };
    for (tile, archs) in [
        (ROUTEGRAD_TILE_PINGPONG_128X128, [80, 86, 120]),
        (ROUTEGRAD_TILE_MMA_128X128, [90, 90, 90]),
        (ROUTEGRAD_TILE_MMA_256X128, [86, 89, 120]),
    ] {
        for arch in archs {
            refused(|| run(tile, arch), OUT_OF_RANGE, "tile");
        }
    }
    for arch in [80, 86, 89, 100, 120] {
        run(ROUTEGRAD_TILE_MMA_128X128, arch).unwrap_or_else(|e| panic!("sm_{arch}: {e}"));
    }
    for arch in [80, 100] {
        run(ROUTEGRAD_TILE_MMA_256X128, arch).unwrap_or_else(|e| panic!("sm_{arch}: {e}"));
    }
}

#[test]
fn both_tiles_give_the_same_bytes_on_any_number_of_multiprocessors() {
    let shape = Shape::new(&[0, 130, 0, 1, 127, 0, 400], 392, 136);
    for product in Product::ALL {
        let operands = Arc::new(Operands::new(product, Gather::None, false, &shape));
        let run = |tile, multiprocessors| {
            let set = |o: &mut routegrad_sim_options| {
                o.arch = 80;
                o.multiprocessors = multiprocessors;
            };
            with_options(set, || outputs(&grouped_gemm::problem(&operands, tile)))
        };
        let first = run(ROUTEGRAD_TILE_MMA_128X128, 8);
        for tile in [ROUTEGRAD_TILE_MMA_128X128, ROUTEGRAD_TILE_MMA_256X128] {
            for multiprocessors in [1, 3, 132] {
                assert!(
                    run(tile, multiprocessors) == first,
                    "{product:?}, tile {tile} on {multiprocessors} multiprocessors"
                );
            }
        }
    }
}

#[test]
fn an_architecture_without_kernels_is_refused() {
    for arch in [0, 70, 75, 95, 130] {
        let mut options = table().options().expect("a simulator");
        options.arch = arch;
        assert!(table().set_options(&options).is_err(), "sm_{arch}");
    }
}
