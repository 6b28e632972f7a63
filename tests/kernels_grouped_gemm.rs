//! The grouped GEMMs on the simulator against float64: every product, tile and gather over ragged groups, every
//! schedule, NaN in a neighbour, exact counts of work and bytes.

mod support;

use half::bf16;
use routegrad::device::bindings::*;
use routegrad::launch;
use std::ptr::{null, null_mut};
use support::gemm::*;
use support::guarded::Guarded;
use support::schedules::{counted, schedules, table, with_options};

fn check_all_tiles(product: Product, accumulate: bool) {
    for shape in covering_shapes() {
        for &gather in gathers(product) {
            let problem = Problem::new(product, gather, accumulate, &shape);
            for tile in tiles(product) {
                problem.check(tile, &problem.run(tile));
            }
            problem.check(ROUTEGRAD_TILE_AUTO, &problem.run(ROUTEGRAD_TILE_AUTO));
        }
    }
}

#[test]
fn forward_is_within_half_an_ulp_of_float64() {
    check_all_tiles(Forward, false);
}

#[test]
fn input_gradient_is_within_half_an_ulp_of_float64() {
    check_all_tiles(InputGradient, false);
}

#[test]
fn weight_gradient_assigned_is_within_f32_roundoff_of_float64() {
    check_all_tiles(WeightGradient, false);
}

#[test]
fn weight_gradient_accumulated_is_within_f32_roundoff_of_float64() {
    check_all_tiles(WeightGradient, true);
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for product in [Forward, InputGradient, WeightGradient] {
        for shape in small_shapes() {
            for &gather in gathers(product) {
                let problem = Problem::new(product, gather, product == WeightGradient, &shape);
                for tile in tiles(product) {
                    let first = problem.run(tile);
                    problem.check(tile, &first);
                    for schedule in schedules() {
                        let label = || format!("{} under {schedule:?}", problem.label(tile));
                        assert!(schedule.run(|| problem.run(tile)) == first, "{}", label());
                    }
                }
            }
        }
    }
}

#[test]
fn the_number_of_multiprocessors_does_not_change_the_bytes() {
    let shape = Shape::new(&[0, 130, 0, 1, 127, 0, 400], 392, 136);
    for product in [Forward, InputGradient, WeightGradient] {
        let problem = Problem::new(product, Gather::None, false, &shape);
        for tile in tiles(product) {
            let first = problem.run(tile);
            for count in [1, 2, 3, 132] {
                let other = with_options(|o| o.multiprocessors = count, || problem.run(tile));
                assert!(
                    other == first,
                    "{} on {count} multiprocessors",
                    problem.label(tile)
                );
            }
        }
    }
}

#[test]
fn an_expert_full_of_nan_leaves_the_others_as_they_are() {
    let shape = Shape::new(&[100, 70, 90], 136, 72);
    for product in [Forward, InputGradient, WeightGradient] {
        for tile in tiles(product) {
            let mut problem = Problem::new(product, Gather::None, false, &shape);
            let clean = problem.run(tile);
            let width = if product == Forward { 72 } else { 136 };
            problem.a.as_mut_slice()[100 * width..170 * width].fill(bf16::NAN);
            if product == WeightGradient {
                problem.b.as_mut_slice()[100 * 72..170 * 72].fill(bf16::INFINITY);
            } else {
                problem.b.as_mut_slice()[136 * 72..2 * 136 * 72].fill(bf16::INFINITY);
            }
            let spoilt = problem.run(tile);
            let (first, last) = match product {
                Forward => (100 * 136 * 2, 170 * 136 * 2),
                InputGradient => (100 * 72 * 2, 170 * 72 * 2),
                WeightGradient => (136 * 72 * 4, 2 * 136 * 72 * 4),
            };
            assert!(
                spoilt[..first] == clean[..first] && spoilt[last..] == clean[last..],
                "{}",
                problem.label(tile)
            );
            assert!(
                spoilt[first..last] != clean[first..last],
                "{}: the NaN went nowhere",
                problem.label(tile)
            );
        }
    }
}

#[test]
fn an_empty_expert_gets_zeros_assigned_and_keeps_what_it_has_accumulated() {
    let shape = Shape::new(&[0, 70, 0, 3, 0], 72, 40);
    for tile in tiles(WeightGradient) {
        for accumulate in [false, true] {
            let problem = Problem::new(WeightGradient, Gather::None, accumulate, &shape);
            let bytes = problem.run(tile);
            let got: &[f32] = bytemuck::cast_slice(&bytes);
            for expert in [0, 2, 4] {
                for i in expert * 72 * 40..(expert + 1) * 72 * 40 {
                    let want = problem.added_to.as_ref().map_or(0.0, |before| before[i]);
                    assert!(
                        got[i].to_bits() == want.to_bits(),
                        "{}: element {i}",
                        problem.label(tile)
                    );
                }
            }
        }
    }
}

#[test]
fn a_group_of_one_without_offsets_is_the_dense_product() {
    let shape = Shape::new(&[333], 200, 136);
    for product in [Forward, InputGradient, WeightGradient] {
        let mut problem = Problem::new(product, Gather::None, false, &shape);
        let grouped = problem.run(ROUTEGRAD_TILE_AUTO);
        problem.rows_given = 333;
        let dense = {
            let Shape { n, k, .. } = shape;
            let (n, k, rows) = (n as i32, k as i32, 333);
            let (a, b) = (problem.a.as_ptr().cast(), problem.b.as_ptr().cast());
            let mut narrow = Guarded::<bf16>::poisoned(336 * 200);
            let mut wide = Guarded::<f32>::poisoned(200 * 136);
            let out = narrow.as_mut_ptr().cast();
            // Safety: as in `run`; no offsets means one group of all rows.
            unsafe {
                match product {
                    Forward => launch!(
                        table(),
                        grouped_gemm_forward(
                            out,
                            a,
                            b,
                            null(),
                            null(),
                            rows,
                            336,
                            1,
                            n,
                            k,
                            0,
                            null_mut()
                        )
                    ),
                    InputGradient => launch!(
                        table(),
                        grouped_gemm_input_gradient(
                            out,
                            a,
                            b,
                            null(),
                            null(),
                            rows,
                            336,
                            1,
                            n,
                            k,
                            0,
                            null_mut()
                        )
                    ),
                    WeightGradient => launch!(
                        table(),
                        grouped_gemm_weight_gradient(
                            wide.as_mut_ptr(),
                            a,
                            b,
                            null(),
                            null(),
                            null(),
                            rows,
                            336,
                            336,
                            1,
                            n,
                            k,
                            0,
                            0,
                            null_mut()
                        )
                    ),
                }
            }
            .unwrap_or_else(|e| panic!("{product:?}: {e}"));
            if product == WeightGradient {
                wide.as_bytes().to_vec()
            } else {
                narrow.as_bytes().to_vec()
            }
        };
        let same = dense.len().min(grouped.len());
        assert!(dense[..same] == grouped[..same], "{product:?}");
    }
}

#[test]
fn every_output_byte_is_written_once_and_tails_of_64_rows_cost_64_rows() {
    let counts = [0, 130, 0, 1, 127, 0, 257, 320];
    let shape = Shape::new(&counts, 392, 136);
    for product in [Forward, InputGradient] {
        let problem = Problem::new(product, Gather::None, false, &shape);
        let (columns, depth) = if product == Forward {
            (392, 136)
        } else {
            (136, 392)
        };
        for (tile, rows, tile_columns) in TILES {
            let counters = counted(|| drop(problem.run(tile)));
            let label = problem.label(tile);
            assert_eq!(
                counters.bytes_written,
                (shape.rows() * columns * 2) as u64,
                "{label}"
            );
            // 64-row products of a tile: all that hold a row; tiles of 176 columns multiply a warpgroup's pair together.
            let pair = if tile_columns == 176 { 128 } else { 64 };
            let computed: usize = counts
                .iter()
                .map(|&count| {
                    let whole = count / rows * rows;
                    whole + (count - whole).next_multiple_of(pair)
                })
                .sum();
            let flops = 2
                * computed
                * columns.next_multiple_of(tile_columns)
                * usize::next_multiple_of(depth, 64);
            assert_eq!(counters.tensor_flops, flops as u64, "{label}");
        }
    }
    let problem = Problem::new(WeightGradient, Gather::None, false, &shape);
    for tile in tiles(WeightGradient) {
        let counters = counted(|| drop(problem.run(tile)));
        assert_eq!(
            counters.bytes_written,
            (counts.len() * 392 * 136 * 4) as u64,
            "{}",
            problem.label(tile)
        );
    }
}
