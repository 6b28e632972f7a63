//! The ring of stages in the grouped GEMM, where one of two cooperating warpgroups has no rows and only gives its stages
//! back: every lane must see every phase, under any order of the threads. All inputs are one, so the results are counts.

use half::bf16;
use routegrad::device::Device;
use routegrad::kernels::bindings::*;
use routegrad::kernels::launchers;
use routegrad::kernels::{GroupedGemmForward, GroupedGemmWeightGradient, Stream};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::Element;

fn stream() -> Stream {
    Stream::of(Device::Sim).unwrap_or_else(|e| panic!("{e}"))
}

fn tensor<T: Element>(elements: &[T]) -> Tensor {
    Tensor::from_slice([elements.len()], elements).on(Device::Sim)
}

/// Runs `body` under ten random schedules on two multiprocessors, so that each block meets many tiles.
fn under_random_schedules(body: impl Fn(u64)) {
    let sim = launchers::sim().unwrap_or_else(|e| panic!("{e}"));
    let before = sim.options().expect("a simulator");
    for seed in 1..=10 {
        let options = launchers::Options {
            copies: ROUTEGRAD_SIM_RANDOM as i32,
            products: ROUTEGRAD_SIM_RANDOM as i32,
            order: ROUTEGRAD_SIM_SHUFFLED as i32,
            multiprocessors: 2,
            seed,
            ..before
        };
        sim.set_options(&options).unwrap_or_else(|e| panic!("{e}"));
        body(seed);
    }
    sim.set_options(&before).unwrap_or_else(|e| panic!("{e}"));
}

/// Offsets of groups of these sizes.
fn offsets(counts: &[i32]) -> Tensor {
    let mut offsets = vec![0];
    for count in counts {
        offsets.push(offsets[offsets.len() - 1] + count);
    }
    tensor(&offsets)
}

fn ones(len: usize) -> Tensor {
    tensor(&vec![bf16::ONE; len])
}

const COOPERATIVE: [routegrad_gemm_tile; 2] = [
    ROUTEGRAD_TILE_COOPERATIVE_128X256,
    ROUTEGRAD_TILE_COOPERATIVE_256X128,
];

#[test]
fn a_warpgroup_without_rows_keeps_step_over_a_long_reduction() {
    let counts = [1000, 1, 300];
    let (offsets, rows, n, k) = (offsets(&counts), 1301, 8, 8);
    let (dout, x) = (ones(rows * n), ones(rows * k));
    under_random_schedules(|seed| {
        for tile in COOPERATIVE {
            let mut dw = tensor(&vec![f32::NAN; counts.len() * n * k]);
            GroupedGemmWeightGradient {
                dw: dw.output().unwrap(),
                dout: dout.input().unwrap(),
                x: x.input().unwrap(),
                offsets: Some(offsets.input().unwrap()),
                dout_row_token: None,
                x_row_token: None,
                rows,
                dout_rows: rows,
                x_rows: rows,
                experts: counts.len(),
                n,
                k,
                accumulate: false,
                tile: tile as i32,
            }
            .launch(&stream())
            .unwrap_or_else(|e| panic!("tile {tile}, seed {seed}: {e}"));
            for (i, value) in dw.slice::<f32>().iter().enumerate() {
                assert_eq!(
                    *value,
                    counts[i / (n * k)] as f32,
                    "tile {tile}, seed {seed}, element {i}"
                );
            }
        }
    });
}

#[test]
fn a_warpgroup_without_rows_keeps_step_over_many_short_groups() {
    let counts = [40, 30, 20, 10, 64, 3, 50, 7];
    let (offsets, rows, n, k) = (offsets(&counts), 224, 136, 520);
    let (x, w) = (ones(rows * k), ones(counts.len() * n * k));
    under_random_schedules(|seed| {
        for tile in COOPERATIVE {
            let mut out = tensor(&vec![bf16::NAN; rows * n]);
            GroupedGemmForward {
                out: out.output().unwrap(),
                x: x.input().unwrap(),
                w: w.input().unwrap(),
                offsets: Some(offsets.input().unwrap()),
                row_token: None,
                rows,
                x_rows: rows,
                experts: counts.len(),
                n,
                k,
                tile: tile as i32,
            }
            .launch(&stream())
            .unwrap_or_else(|e| panic!("tile {tile}, seed {seed}: {e}"));
            let wrong = out
                .slice::<bf16>()
                .iter()
                .position(|v| v.to_f32() != k as f32);
            assert_eq!(
                wrong, None,
                "tile {tile}, seed {seed}: the first wrong element"
            );
        }
    });
}
