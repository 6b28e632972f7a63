//! The ring of stages in the grouped GEMM, where one of two cooperating warpgroups has no rows and only gives its stages
//! back: every lane must see every phase, under any order of the threads. All inputs are one, so the results are counts.

use half::bf16;
use routegrad::device::Device;
use routegrad::kernels::bindings::*;
use routegrad::kernels::launchers;
use routegrad::kernels::{GroupedGemmForward, GroupedGemmWeightGradient, In, Out, Stream};

fn stream() -> Stream {
    Stream::of(Device::Sim).unwrap_or_else(|e| panic!("{e}"))
}

fn input<T, S>(values: &[S]) -> In<'_, T> {
    // SAFETY: the simulator reads host memory, and the values outlive the launch.
    unsafe {
        In::from_address(
            values.as_ptr() as usize,
            size_of_val(values) / size_of::<T>(),
        )
    }
}

fn output<T, S>(values: &mut [S]) -> Out<'_, T> {
    // SAFETY: as above.
    unsafe {
        Out::from_address(
            values.as_mut_ptr() as usize,
            size_of_val(values) / size_of::<T>(),
        )
    }
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
fn offsets(counts: &[i32]) -> Vec<i32> {
    let mut offsets = vec![0];
    for count in counts {
        offsets.push(offsets[offsets.len() - 1] + count);
    }
    offsets
}

/// `len` ones in bf16, in units that are 16-byte aligned.
fn ones(len: usize) -> Vec<u128> {
    vec![u128::MAX / 0xffff * u128::from(bf16::ONE.to_bits()); len.div_ceil(8)]
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
            let mut dw = vec![u128::MAX; counts.len() * n * k / 4];
            GroupedGemmWeightGradient {
                dw: output(&mut dw),
                dout: input(&dout),
                x: input(&x),
                offsets: Some(input(&offsets)),
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
            for (i, value) in bytemuck::cast_slice::<_, f32>(&dw).iter().enumerate() {
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
            let mut out = vec![u128::MAX; rows * n / 8];
            GroupedGemmForward {
                out: output(&mut out),
                x: input(&x),
                w: input(&w),
                offsets: Some(input(&offsets)),
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
            let wrong = bytemuck::cast_slice::<_, bf16>(&out)
                .iter()
                .position(|v| v.to_f32() != k as f32);
            assert_eq!(
                wrong, None,
                "tile {tile}, seed {seed}: the first wrong element"
            );
        }
    });
}
