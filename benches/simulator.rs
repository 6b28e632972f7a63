//! Times the grouped GEMM on the simulator, one thread: 8 experts with 128 rows each, N = K = 1024, and as
//! much in one dense product.
//!
//! `cargo bench --bench simulator` prints floating-point operations a second as criterion's "elem/s".

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use routegrad::device::Device;
use routegrad::error::Result;
use routegrad::kernels::launchers::TILE_AUTO;
use routegrad::kernels::{GroupedGemmForward, Stream};
use routegrad::tensor::Tensor;

const ROWS: usize = 1024;
const N: usize = 1024;
const K: usize = 1024;

/// `len` bf16 numbers between −1 and 1.
fn numbers(len: usize) -> Tensor {
    let number = |i: usize| bf16::from_f32((i % 251) as f32 / 125.0 - 1.0);
    let numbers: Vec<bf16> = (0..len).map(number).collect();
    Tensor::from_slice([len], &numbers).on(Device::Sim)
}

fn products(c: &mut Criterion) {
    let stream = Stream::of(Device::Sim).unwrap_or_else(|e| panic!("{e}"));
    let mut group = c.benchmark_group("simulator");
    group
        .sample_size(10)
        .throughput(Throughput::Elements((2 * ROWS * N * K) as u64));
    for (name, experts) in [("8 groups", 8), ("dense", 1)] {
        let offsets: Vec<i32> = (0..=experts).map(|e| (e * ROWS / experts) as i32).collect();
        let offsets = Tensor::from_slice([experts + 1], &offsets).on(Device::Sim);
        let (x, w) = (numbers(ROWS * K), numbers(experts * N * K));
        let mut out = numbers(ROWS * N);
        group.bench_function(format!("grouped_gemm_forward 1024³, {name}"), |b| {
            let mut product = || -> Result<()> {
                let kernel = GroupedGemmForward {
                    out: out.output()?,
                    x: x.input()?,
                    w: w.input()?,
                    offsets: Some(offsets.input()?),
                    row_token: None,
                    rows: ROWS,
                    x_rows: ROWS,
                    experts,
                    n: N,
                    k: K,
                    tile: TILE_AUTO,
                };
                kernel.launch(&stream)
            };
            b.iter(|| product().unwrap_or_else(|e| panic!("{e}")));
        });
    }
    group.finish();
}

criterion_group!(benches, products);
criterion_main!(benches);
