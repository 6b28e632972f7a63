//! Times whole training steps of `tiny`, `topk` and `default` in turn, against the peak of the GEMM
//! crate measured in the same run on the same threads.
//!
//! `cargo bench --bench step` prints tokens/s, the share of that peak which the step's counted
//! operations reach (6 a parameter and token, the causal half of attention, nothing recomputed), and
//! what `default` costs over `topk`.

use criterion::{Criterion, Throughput, criterion_group};
use routegrad::device::Device;
use routegrad::train::Trainer;
use routegrad::verify::bench::steps::Step;
use routegrad::verify::bench::{ceilings, steps};
use std::time::Instant;

const SEQUENCES: usize = 16;
const TINY: Step = Step {
    preset: "tiny",
    experts: "8c1",
    routers: &["topk", "default"],
    sequences: SEQUENCES,
};
const TOKENS: u64 = SEQUENCES as u64 * 256;

fn training(router: &str) -> Trainer {
    steps::training(&TINY, router, Device::Cpu).expect("a preset")
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// Interleaved steps, so that a drift of the machine meets both routers.
fn compare() {
    const STEPS: usize = 30;
    let mut both = ["topk", "default"].map(training);
    let mut times = [vec![], vec![]];
    let step = |training: &mut Trainer| {
        training.step().expect("a step");
    };
    both.iter_mut().for_each(|t| (0..3).for_each(|_| step(t)));
    for _ in 0..STEPS {
        for (training, times) in both.iter_mut().zip(&mut times) {
            times.push(seconds(|| step(training)));
        }
    }
    let peak = ceilings::of_cpu().expect("a clock").flops / 1e9;
    let threads = rayon::current_num_threads();
    println!("GEMM peak on {threads} threads: {peak:.0} GFLOP/s");
    let ratios = times[0]
        .iter()
        .zip(&times[1])
        .map(|(topk, default)| default / topk);
    let ratio = median(ratios.collect());
    let [topk, default] = times.map(median);
    for (name, time) in [("topk", topk), ("default", default)] {
        let flops = steps::flops(&TINY, name).expect("a preset");
        println!(
            "tiny {name:8} {:6.0} tokens/s, {:4.1}% of the GEMM peak (median of {STEPS} steps)",
            TOKENS as f64 / time,
            100.0 * flops / time / 1e9 / peak,
        );
    }
    println!(
        "default over topk: {:+.1}% (median over pairs of steps)",
        100.0 * (ratio - 1.0)
    );
}

fn tiny_steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("tiny step");
    group.sample_size(10);
    group.throughput(Throughput::Elements(TOKENS));
    for router in ["topk", "default"] {
        let mut training = training(router);
        group.bench_function(router, |b| b.iter(|| training.step().expect("a step")));
    }
    group.finish();
}

criterion_group!(benches, tiny_steps);

fn main() {
    // On a thread of the pool, as `train` works.
    rayon::scope(|_| {
        benches();
        // Not when the harness only lists or tests its benchmarks.
        if std::env::args().any(|a| a == "--bench") {
            compare();
        }
    });
}
