//! Times whole training steps of `tiny`, `topk` and `default` in turn, against the peak of the GEMM
//! crate measured in the same run on the same threads.
//!
//! `cargo bench --bench step` prints tokens/s, the share of that peak which the step's counted
//! operations reach (6 a parameter and token, the causal half of attention, nothing recomputed), and
//! what `default` costs over `topk`.

use criterion::{Criterion, Throughput, criterion_group};
use rayon::prelude::*;
use routegrad::config::{Config, Layers, count};
use routegrad::cpu::{Accumulate, Mat, MatMut, gemm};
use routegrad::data::Corpus;
use routegrad::model::Model;
use routegrad::routers;
use routegrad::step::Trainer;
use std::time::Instant;

/// A model and its next step.
struct Training {
    model: Model,
    trainer: Trainer,
    corpus: Corpus,
    sequences: usize,
    step: u64,
    flops_per_step: f64,
    tokens: u64,
}

impl Training {
    fn new(router: &str) -> Self {
        let mut layers = Layers::preset("tiny");
        layers.set = vec![format!("router.name=\"{router}\"")];
        let config = Config::load(&layers, &routers::resolve).expect("a preset");
        let model = Model::new(&config).expect("a preset");
        let sequences = config.train.sequences_per_step;
        let tokens = (sequences * config.model.sequence_length) as u64;
        Training {
            trainer: Trainer::new(&config.train, &model),
            model,
            corpus: Corpus::load(&config.data, &config.model, 0).expect("the embedded corpus"),
            sequences,
            step: 0,
            flops_per_step: count::flops_per_token(&config.model) as f64 * tokens as f64,
            tokens,
        }
    }

    fn step(&mut self) {
        let first = self.step * self.sequences as u64;
        let tokens = self.corpus.sequences(first..first + self.sequences as u64);
        let report = self
            .trainer
            .step(&mut self.model, &[&tokens], self.sequences, 1e-3);
        assert!(report.expect("a step").refused.is_none());
        self.step += 1;
    }
}

/// GFLOP/s of one 1024³ product a thread, all threads at once.
fn gemm_peak() -> f64 {
    const N: usize = 1024;
    let a: Vec<f32> = (0..N * N).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
    let threads = rayon::current_num_threads();
    let run = || {
        (0..threads).into_par_iter().for_each(|_| {
            let mut c = vec![0f32; N * N];
            gemm(
                MatMut::new(&mut c, N, N),
                Accumulate::Assign,
                Mat::new(&a, N, N),
                Mat::new(&a, N, N),
            );
        });
    };
    run();
    let best = (0..10).map(|_| seconds(run)).fold(f64::MAX, f64::min);
    2.0 * (N * N * N * threads) as f64 / best / 1e9
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
    let mut both = ["topk", "default"].map(Training::new);
    let mut times = [vec![], vec![]];
    both.iter_mut().for_each(|t| (0..3).for_each(|_| t.step()));
    for _ in 0..STEPS {
        for (training, times) in both.iter_mut().zip(&mut times) {
            times.push(seconds(|| training.step()));
        }
    }
    let peak = gemm_peak();
    let threads = rayon::current_num_threads();
    println!("GEMM peak on {threads} threads: {peak:.0} GFLOP/s");
    let ratios = times[0]
        .iter()
        .zip(&times[1])
        .map(|(topk, default)| default / topk);
    let ratio = median(ratios.collect());
    let [topk, default] = times.map(median);
    for (name, time, training) in [("topk", topk, &both[0]), ("default", default, &both[1])] {
        println!(
            "tiny {name:8} {:6.0} tokens/s, {:4.1}% of the GEMM peak (median of {STEPS} steps)",
            training.tokens as f64 / time,
            100.0 * training.flops_per_step / time / 1e9 / peak,
        );
    }
    println!(
        "default over topk: {:+.1}% (median over pairs of steps)",
        100.0 * (ratio - 1.0)
    );
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("tiny step");
    group.sample_size(10);
    for router in ["topk", "default"] {
        let mut training = Training::new(router);
        group.throughput(Throughput::Elements(training.tokens));
        group.bench_function(router, |b| b.iter(|| training.step()));
    }
    group.finish();
}

criterion_group!(benches, steps);

fn main() {
    benches();
    // Not when the harness only lists or tests its benchmarks.
    if std::env::args().any(|a| a == "--bench") {
        compare();
    }
}
