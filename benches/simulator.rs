//! Times the grouped GEMM on the simulator, one thread: 8 experts with 128 rows each, N = K = 1024, and as
//! much in one dense product.
//!
//! `cargo bench --bench simulator` prints floating-point operations a second as criterion's "elem/s".

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use routegrad::device::Device;
use routegrad::kernels::launchers::TILE_AUTO;
use routegrad::kernels::{GroupedGemmForward, In, Out, Stream};

const ROWS: usize = 1024;
const N: usize = 1024;
const K: usize = 1024;

/// `len` bf16 numbers between −1 and 1, in units that are 16-byte aligned.
fn numbers(len: usize) -> Vec<u128> {
    let number = |i: usize| u128::from(bf16::from_f32((i % 251) as f32 / 125.0 - 1.0).to_bits());
    let pack = |unit| (0..8).fold(0, |packed, i| packed << 16 | number(8 * unit + i));
    (0..len.div_ceil(8)).map(pack).collect()
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

fn products(c: &mut Criterion) {
    let stream = Stream::of(Device::Sim).unwrap_or_else(|e| panic!("{e}"));
    let mut group = c.benchmark_group("simulator");
    group
        .sample_size(10)
        .throughput(Throughput::Elements((2 * ROWS * N * K) as u64));
    for (name, experts) in [("8 groups", 8), ("dense", 1)] {
        let offsets: Vec<i32> = (0..=experts).map(|e| (e * ROWS / experts) as i32).collect();
        let (x, w) = (numbers(ROWS * K), numbers(experts * N * K));
        let mut out = numbers(ROWS * N);
        group.bench_function(format!("grouped_gemm_forward 1024³, {name}"), |b| {
            b.iter(|| {
                GroupedGemmForward {
                    out: output(&mut out),
                    x: input(&x),
                    w: input(&w),
                    offsets: Some(input(&offsets)),
                    row_token: None,
                    rows: ROWS,
                    x_rows: ROWS,
                    experts,
                    n: N,
                    k: K,
                    tile: TILE_AUTO,
                }
                .launch(&stream)
                .unwrap_or_else(|e| panic!("{e}"));
            });
        });
    }
    group.finish();
}

criterion_group!(benches, products);
criterion_main!(benches);
