//! The grouped GEMMs on the simulator: every case of the library, every schedule, NaN in a neighbour, exact counts of work
//! and bytes.

use crate::support::schedules::{counted, with_options};
use crate::support::tape::{close, tensor, var};
use crate::support::{check_cases, check_schedules, counts_agree, outputs, simulator};
use half::bf16;
use routegrad::device::Device;
use routegrad::kernels::bindings::{ROUTEGRAD_TILE_AUTO, routegrad_gemm_tile};
use routegrad::kernels::launchers::TILE_AUTO;
use routegrad::kernels::{GroupedGemmForward, GroupedGemmInputGradient, GroupedGemmWeightGradient};
use routegrad::ops::linear::linear;
use routegrad::tape::{Gradients, Tape};
use routegrad::verify::kernels::grouped_gemm::{
    Gather, Operands, Product, Product::*, Shape, TILES, problem,
};
use routegrad::verify::kernels::{Guarded, Machine, values};
use std::sync::Arc;

#[test]
fn forward_is_within_half_an_ulp_of_float64() {
    check_cases("grouped_gemm_forward");
}

#[test]
fn input_gradient_is_within_half_an_ulp_of_float64() {
    check_cases("grouped_gemm_input_gradient");
}

#[test]
#[ignore = "slow"]
fn weight_gradient_is_within_f32_roundoff_of_float64() {
    check_cases("grouped_gemm_weight_gradient");
}

#[test]
fn parts_are_summed_within_f32_roundoff_of_float64() {
    check_cases("sum_parts");
    check_schedules("sum_parts");
}

#[test]
#[ignore = "slow"]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for product in Product::ALL {
        check_schedules(product.launcher());
    }
}

fn operands(product: Product, accumulate: bool, shape: &Shape) -> Operands {
    Operands::new(product, Gather::None, accumulate, shape)
}

/// The bytes of the output.
fn run(operands: &Arc<Operands>, tile: routegrad_gemm_tile) -> Vec<u8> {
    outputs(&problem(operands, tile)).swap_remove(0)
}

#[test]
fn the_number_of_multiprocessors_does_not_change_the_bytes() {
    let shape = Shape::new(&[0, 130, 0, 1, 127, 0, 400], 392, 136);
    for product in Product::ALL {
        let operands = Arc::new(operands(product, false, &shape));
        for tile in product.tiles() {
            let first = run(&operands, tile);
            for count in [1, 2, 3, 132] {
                let other = with_options(|o| o.multiprocessors = count, || run(&operands, tile));
                assert!(
                    other == first,
                    "{} on {count} multiprocessors",
                    operands.label(tile)
                );
            }
        }
    }
}

#[test]
fn an_expert_full_of_nan_leaves_the_others_as_they_are() {
    let shape = Shape::new(&[100, 70, 90], 136, 72);
    for product in Product::ALL {
        for tile in product.tiles() {
            let clean = run(&Arc::new(operands(product, false, &shape)), tile);
            let width = if product == Forward { 72 } else { 136 };
            let mut operands = operands(product, false, &shape);
            operands.a[100 * width..170 * width].fill(bf16::NAN);
            if product == WeightGradient {
                operands.b[100 * 72..170 * 72].fill(bf16::INFINITY);
            } else {
                operands.b[136 * 72..2 * 136 * 72].fill(bf16::INFINITY);
            }
            let operands = Arc::new(operands);
            let spoilt = run(&operands, tile);
            let (first, last) = match product {
                Forward => (100 * 136 * 2, 170 * 136 * 2),
                InputGradient => (100 * 72 * 2, 170 * 72 * 2),
                WeightGradient => (136 * 72 * 4, 2 * 136 * 72 * 4),
            };
            assert!(
                spoilt[..first] == clean[..first] && spoilt[last..] == clean[last..],
                "{}",
                operands.label(tile)
            );
            assert!(
                spoilt[first..last] != clean[first..last],
                "{}: the NaN went nowhere",
                operands.label(tile)
            );
        }
    }
}

#[test]
fn an_empty_expert_gets_zeros_assigned_and_keeps_what_it_has_accumulated() {
    let shape = Shape::new(&[0, 70, 0, 3, 0], 72, 40);
    for tile in WeightGradient.tiles() {
        for accumulate in [false, true] {
            let operands = Arc::new(operands(WeightGradient, accumulate, &shape));
            let bytes = run(&operands, tile);
            let got: Vec<f32> = values(&bytes);
            for expert in [0, 2, 4] {
                for i in expert * 72 * 40..(expert + 1) * 72 * 40 {
                    let want = operands.added_to.as_ref().map_or(0.0, |before| before[i]);
                    assert!(
                        got[i].to_bits() == want.to_bits(),
                        "{}: element {i}",
                        operands.label(tile)
                    );
                }
            }
        }
    }
}

#[test]
fn a_group_of_one_without_offsets_is_the_dense_product() {
    let shape = Shape::new(&[333], 200, 136);
    for product in Product::ALL {
        let operands = Arc::new(operands(product, false, &shape));
        let grouped = run(&operands, ROUTEGRAD_TILE_AUTO);
        let dense = {
            let Shape { n, k, .. } = shape;
            let rows = 333;
            let machine = simulator();
            let guarded = |bytes: &[u8]| {
                let mut buffer = Guarded::new(&machine, bytes.len()).unwrap();
                buffer.write(bytes).unwrap();
                buffer
            };
            let (a, b) = (
                guarded(bytemuck::cast_slice(&operands.a)),
                guarded(bytemuck::cast_slice(&operands.b)),
            );
            let (a, b) = (a.buffer(), b.buffer());
            let result = Guarded::new(&machine, grouped.len()).unwrap();
            let (out, stream) = (result.buffer(), machine.stream().unwrap());
            match product {
                Forward => GroupedGemmForward {
                    out: out.output(),
                    x: a.input(),
                    w: b.input(),
                    offsets: None,
                    row_token: None,
                    rows,
                    x_rows: 336,
                    experts: 1,
                    n,
                    k,
                    tile: TILE_AUTO,
                }
                .launch(&stream),
                InputGradient => GroupedGemmInputGradient {
                    dx: out.output(),
                    dout: a.input(),
                    w: b.input(),
                    offsets: None,
                    row_token: None,
                    rows,
                    dout_rows: 336,
                    experts: 1,
                    n,
                    k,
                    tile: TILE_AUTO,
                }
                .launch(&stream),
                WeightGradient => GroupedGemmWeightGradient {
                    dw: out.output(),
                    dout: a.input(),
                    x: b.input(),
                    offsets: None,
                    dout_row_token: None,
                    x_row_token: None,
                    rows,
                    dout_rows: 336,
                    x_rows: 336,
                    experts: 1,
                    n,
                    k,
                    accumulate: false,
                    tile: TILE_AUTO,
                }
                .launch(&stream),
            }
            .unwrap_or_else(|e| panic!("{product:?}: {e}"));
            assert_eq!(result.overwritten().unwrap(), None);
            result.read().unwrap()
        };
        assert!(dense == grouped, "{product:?}");
    }
}

#[test]
fn every_output_byte_is_written_once_and_tails_of_64_rows_cost_64_rows() {
    let counts = [0, 130, 0, 1, 127, 0, 257, 320];
    let shape = Shape::new(&counts, 392, 136);
    for product in [Forward, InputGradient] {
        let operands = Arc::new(operands(product, false, &shape));
        let (columns, depth) = if product == Forward {
            (392, 136)
        } else {
            (136, 392)
        };
        for (tile, rows, tile_columns) in TILES {
            let counters = counted(|| drop(run(&operands, tile)));
            let label = operands.label(tile);
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
    let operands = Arc::new(operands(WeightGradient, false, &shape));
    for tile in WeightGradient.tiles() {
        let counters = counted(|| drop(run(&operands, tile)));
        assert_eq!(
            counters.bytes_written,
            (counts.len() * 392 * 136 * 4) as u64,
            "{}",
            operands.label(tile)
        );
    }
}

/// At one tile per expert each operand is read once, and the formulas hold as they stand.
#[test]
fn work_and_bytes_are_those_of_the_formula() {
    let (experts, depth) = (2, 2048);
    for product in Product::ALL {
        for (tile, rows, columns) in TILES {
            if !product.tiles().any(|t| t == tile) {
                continue;
            }
            let (shape, cost) = match product {
                Forward => (
                    Shape::new(&[rows; 2], columns, depth),
                    GroupedGemmForward::cost(experts * rows, experts, columns, depth),
                ),
                InputGradient => (
                    Shape::new(&[rows; 2], depth, columns),
                    GroupedGemmForward::cost(experts * rows, experts, depth, columns),
                ),
                WeightGradient => (
                    Shape::new(&[depth; 2], rows, columns),
                    GroupedGemmWeightGradient::cost(experts * depth, experts, rows, columns, false),
                ),
            };
            counts_agree(
                &problem(&Arc::new(operands(product, false, &shape)), tile),
                cost,
            );
        }
    }
}

/// Rows enough for two parts, the second of which ends inside a k-tile.
#[test]
fn the_weight_gradient_of_a_small_projection_of_many_rows_is_taken_in_parts_and_agrees_with_the_cpu()
 {
    const ROWS: usize = 2100;
    let run = |device| {
        let (x, w) = (
            var(0, [ROWS, 16], device, false),
            var(1, [24, 16], device, true),
        );
        let mut store = Gradients::new(2);
        for _ in 0..2 {
            let tape = Tape::new();
            let y = linear(&tape, &x, &w, None).unwrap();
            tape.backward_from(&[(&y, tensor(3, [ROWS, 24], device))], &mut store)
                .unwrap();
        }
        store.get(1).unwrap().to_f64().unwrap()
    };
    let mut device = None;
    let counters = counted(|| device = Some(run(Device::Sim)));
    // Twice: forward, input gradient, weight gradient, and the sum of its parts; once the sum of two input gradients.
    assert_eq!(counters.launches, 9);
    close("dW", &device.unwrap(), &run(Device::Cpu));
}
