//! The kernels for GPUs without TMA and wgmma, on the simulator as compute capability 8.6 (99 KB of shared memory for a
//! block) and, where a launcher may take a larger tile, 8.0 (163 KB): every case of the library, every schedule, the bytes
//! of the kernels for Hopper, no bank conflicts, and what the launchers refuse.

use crate::support::refusals::{OUT_OF_RANGE, refused};
use crate::support::schedules::{counted, is_plain, schedules, table, with_options};
use crate::support::{check, outputs, problems_of, simulator};
use routegrad::kernels::bindings::*;
use routegrad::verify::kernels::Problem;

fn on<R>(arch: i32, body: impl FnOnce() -> R) -> R {
    with_options(|o| o.arch = arch, body)
}

/// The problems of a launcher that leave the tile to it.
fn problems(launcher: &str, small: bool) -> impl Iterator<Item = Problem> {
    let of_a_tile = |p: &Problem| p.label.contains("tile ") && !p.label.contains("tile 0");
    problems_of(launcher, small).filter(move |p| !of_a_tile(p))
}

/// What the problem's outputs hold, and that no read or write of a matrix in shared memory waits for a bank.
fn without_conflicts(problem: &Problem, arch: i32) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let counters = counted(|| found = on(arch, || outputs(problem)));
    let label = &problem.label;
    assert_eq!(counters.bank_conflicts, 0, "{label} on sm_{arch}");
    found
}

/// Whether both kinds of kernels add the same terms in the same order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    AsHopper,
    Other,
}

/// Agrees with float64, and in the plain build gives the bytes of the kernels for Hopper.
fn agrees(problem: &Problem, order: Order) {
    let found = without_conflicts(problem, 86);
    problem.judged(&found).unwrap_or_else(|e| panic!("{e}"));
    if is_plain() {
        let hopper = without_conflicts(problem, 90);
        let label = &problem.label;
        assert!(order == Order::Other || found == hopper, "{label}");
    }
}

fn same_bytes_under_every_schedule(problem: &Problem) {
    let first = on(86, || outputs(problem));
    problem.judged(&first).unwrap_or_else(|e| panic!("{e}"));
    for schedule in schedules() {
        let other = on(86, || schedule.run(|| outputs(problem)));
        assert!(other == first, "{} under {schedule:?}", problem.label);
    }
}

/// The larger cases agree; the instrumented builds are slow and leave them out.
fn covering_problems_agree(launcher: &str, arch: i32) {
    if is_plain() {
        problems(launcher, false).for_each(|problem| on(arch, || check(&problem)));
    }
}

mod products {
    use super::*;
    use routegrad::verify::kernels::Run;
    use routegrad::verify::kernels::experts::{Layer, covering_layers, small_layers};
    use routegrad::verify::kernels::grouped_gemm::{self, Operands, Product, Product::*, Shape};
    use routegrad::verify::kernels::grouped_swiglu::{Backward, backward_problem};
    use routegrad::verify::kernels::operands::Gather;
    use std::sync::Arc;

    /// All but `grouped_swiglu_backward`, whose cases name tiles.
    const LAUNCHERS: [&str; 7] = [
        "grouped_gemm_forward",
        "grouped_gemm_input_gradient",
        "grouped_gemm_weight_gradient",
        "grouped_swiglu_forward",
        "grouped_down_forward",
        "head_logits",
        "qkv_rope_forward",
    ];

    fn swiglu_backward(layers: Vec<Layer>, tile: u32) -> impl Iterator<Item = Problem> {
        layers.into_iter().flat_map(move |layer| {
            [Gather::A, Gather::None].map(|gather| {
                let backward = Arc::new(Backward::new(&layer, gather));
                backward_problem(&backward, (tile, 128))
            })
        })
    }

    #[test]
    fn small_ones_are_within_roundoff_of_float64_and_equal_those_of_hopper() {
        for launcher in LAUNCHERS {
            problems(launcher, true).for_each(|p| agrees(&p, Order::AsHopper));
        }
        // The tiles of Hopper have other names.
        let hopper = swiglu_backward(small_layers(), ROUTEGRAD_TILE_PINGPONG_128X128);
        for (problem, hopper) in
            swiglu_backward(small_layers(), ROUTEGRAD_TILE_MMA_128X128).zip(hopper)
        {
            let found = without_conflicts(&problem, 86);
            problem.judged(&found).unwrap_or_else(|e| panic!("{e}"));
            assert!(
                !is_plain() || found == without_conflicts(&hopper, 90),
                "{}",
                problem.label
            );
        }
    }

    /// On 8.0, where both tiles are taken.
    #[test]
    #[ignore = "slow"]
    fn covering_ones_are_within_roundoff_of_float64() {
        LAUNCHERS
            .into_iter()
            .for_each(|launcher| covering_problems_agree(launcher, 80));
        if is_plain() {
            swiglu_backward(covering_layers(), ROUTEGRAD_TILE_MMA_128X128)
                .for_each(|problem| on(80, || check(&problem)));
        }
    }

    #[test]
    #[ignore = "slow"]
    fn every_schedule_gives_the_same_bytes() {
        for launcher in LAUNCHERS {
            problems(launcher, true).for_each(|p| same_bytes_under_every_schedule(&p));
        }
        swiglu_backward(small_layers(), ROUTEGRAD_TILE_MMA_128X128)
            .for_each(|p| same_bytes_under_every_schedule(&p));
    }

    #[test]
    fn a_tile_of_another_architecture_is_refused() {
        let shape = Shape::new(&[300, 70], 136, 72);
        let operands = Arc::new(Operands::new(Forward, Gather::None, false, &shape));
        let run = |tile, arch| {
            let problem = grouped_gemm::problem(&operands, tile);
            on(arch, || Run::new(&simulator(), &problem)?.launch())
        };
        for (tile, archs) in [
            (ROUTEGRAD_TILE_PINGPONG_128X128, &[80, 86, 120][..]),
            (ROUTEGRAD_TILE_MMA_128X128, &[90]),
            (ROUTEGRAD_TILE_MMA_256X128, &[86, 89, 120]),
        ] {
            for &arch in archs {
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
            for (tile, multiprocessors) in [
                (ROUTEGRAD_TILE_MMA_128X128, 3),
                (ROUTEGRAD_TILE_MMA_256X128, 1),
                (ROUTEGRAD_TILE_MMA_256X128, 132),
            ] {
                assert!(
                    run(tile, multiprocessors) == first,
                    "{product:?}, tile {tile} on {multiprocessors} multiprocessors"
                );
            }
        }
    }
}

mod router {
    use super::*;
    use routegrad::verify::kernels::router::{self, Kind};
    use routegrad::verify::kernels::router_backward;

    const LAUNCHERS: [&str; 2] = ["router_forward", "router_backward"];

    /// There shared memory holds one bf16 term of an f32 matrix at a time.
    #[test]
    fn one_with_more_than_128_experts_is_within_f32_roundoff_of_float64_in_every_build() {
        let (tokens, experts, hidden, score) = (70, 200, 136, ROUTEGRAD_SCORE_SOFTMAX);
        let forward = router::problem(router::Shape {
            tokens,
            experts,
            hidden,
            choices: 3,
            score,
            kind: Kind::Ordinary,
        });
        let backward = router_backward::problem(router_backward::Shape {
            tokens,
            experts,
            hidden,
            score,
            accumulate: true,
            given: [true; 3],
        });
        for problem in [forward, backward] {
            let problem = problem.unwrap();
            problem
                .judged(&without_conflicts(&problem, 86))
                .unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// With more than 128 experts the sums are term by term.
    #[test]
    fn small_ones_are_within_f32_roundoff_of_float64_and_equal_those_of_hopper() {
        for launcher in LAUNCHERS {
            problems(launcher, true).for_each(|p| agrees(&p, Order::AsHopper));
        }
    }

    #[test]
    fn covering_ones_are_within_f32_roundoff_of_float64() {
        LAUNCHERS
            .into_iter()
            .for_each(|launcher| covering_problems_agree(launcher, 86));
    }

    #[test]
    fn every_schedule_gives_the_same_bytes() {
        for launcher in LAUNCHERS {
            problems(launcher, true).for_each(|p| same_bytes_under_every_schedule(&p));
        }
    }
}

/// Combine, and the gradient of the gates.
mod gates {
    use super::*;

    const LAUNCHERS: [&str; 2] = ["combine", "default_dots"];

    #[test]
    fn small_ones_are_within_roundoff_of_float64_and_equal_those_of_hopper() {
        for launcher in LAUNCHERS {
            problems(launcher, true).for_each(|p| agrees(&p, Order::AsHopper));
        }
    }

    #[test]
    fn covering_ones_are_within_roundoff_of_float64() {
        LAUNCHERS
            .into_iter()
            .for_each(|launcher| covering_problems_agree(launcher, 86));
    }

    #[test]
    fn every_schedule_gives_the_same_bytes() {
        for launcher in LAUNCHERS {
            problems(launcher, true).for_each(|p| same_bytes_under_every_schedule(&p));
        }
    }
}

mod attention {
    use super::*;

    /// The forward takes keys in other tiles than on Hopper, so that maxima are of others.
    const LAUNCHERS: [(&str, Order); 2] = [
        ("attention_forward", Order::Other),
        ("attention_backward", Order::AsHopper),
    ];

    #[test]
    fn small_ones_are_within_their_bounds_of_float64() {
        for (launcher, order) in LAUNCHERS {
            problems(launcher, true).for_each(|p| agrees(&p, order));
        }
    }

    #[test]
    fn covering_ones_are_within_their_bounds_of_float64() {
        for (launcher, _) in LAUNCHERS {
            covering_problems_agree(launcher, 86);
        }
    }

    #[test]
    #[ignore = "slow"]
    fn every_schedule_gives_the_same_bytes() {
        for (launcher, _) in LAUNCHERS {
            problems(launcher, true).for_each(|p| same_bytes_under_every_schedule(&p));
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
