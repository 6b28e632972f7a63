//! Times the dense operations at the shapes of `tiny`: 16 sequences of 256 bytes, D 128, two heads of
//! 64, F 352, V 256, in f32, forward and backward together.
//!
//! `cargo bench --bench ops` prints time and throughput: for operations that are matrix products
//! floating-point operations a second (criterion's "elem/s"), for the others bytes read and written.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use routegrad::check::normal_numbers;
use routegrad::dtype::DType;
use routegrad::error::Result;
use routegrad::ops::add::add;
use routegrad::ops::attention::attention;
use routegrad::ops::cross_entropy::{cross_entropy, token_losses};
use routegrad::ops::embedding::embedding;
use routegrad::ops::heads::Heads;
use routegrad::ops::layernorm::layernorm;
use routegrad::ops::linear::linear;
use routegrad::ops::qk_norm::qk_norm;
use routegrad::ops::rmsnorm::rmsnorm;
use routegrad::ops::rope::{RopeTables, rope};
use routegrad::ops::swiglu::swiglu;
use routegrad::tape::{Gradients, Tape, Var};
use routegrad::tensor::Tensor;

const SEQUENCE: usize = 256;
const TOKENS: usize = 16 * SEQUENCE;
const HIDDEN: usize = 128;
const WIDTH: usize = 352;
const VOCABULARY: usize = 256;
const HEADS: Heads = Heads {
    query: 2,
    key_value: 2,
    dim: 64,
};

/// Standard normal numbers in f32.
fn random(shape: &[usize]) -> Tensor {
    let values = normal_numbers(shape.iter().product(), 1);
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Tensor::from_slice(shape, &values)
}

fn ids() -> Tensor {
    let ids: Vec<i32> = (0..TOKENS as i32).map(|i| i * i % 251).collect();
    Tensor::from_slice([TOKENS], &ids)
}

/// GFLOP of one product of `m x k` by `k x n`.
fn product(m: usize, k: usize, n: usize) -> u64 {
    2 * (m * k * n) as u64
}

/// Times forward and backward of `run` on leaves of the given shapes.
fn both(
    c: &mut Criterion,
    name: &str,
    throughput: Throughput,
    shapes: &[&[usize]],
    run: impl Fn(&Tape, &[Var]) -> Result<Var>,
) {
    let leaves: Vec<Var> = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| Var::leaf(random(shape), i))
        .collect();
    let mut store = Gradients::new(leaves.len());
    let mut dout = None;
    let mut group = c.benchmark_group("ops");
    group.throughput(throughput);
    group.bench_function(name, |b| {
        b.iter(|| {
            let tape = Tape::new();
            let out = run(&tape, &leaves).unwrap();
            let dout = dout.get_or_insert_with(|| random(&out.tensor().shape()));
            store.reset();
            tape.backward_from(&[(&out, dout.clone())], &mut store)
                .unwrap();
        });
    });
    group.finish();
}

/// Bytes of `passes` readings or writings of a `[tokens, width]` tensor.
fn bytes(passes: usize, width: usize) -> Throughput {
    Throughput::Bytes((passes * TOKENS * width * size_of::<f32>()) as u64)
}

fn benches(c: &mut Criterion) {
    let row = HEADS.row_width();
    let x: &[usize] = &[TOKENS, HIDDEN];
    let qkv: &[usize] = &[TOKENS, row];
    let eps = 1e-5;

    let flops = Throughput::Elements(3 * product(TOKENS, HIDDEN, row));
    both(
        c,
        "linear to qkv",
        flops,
        &[x, &[row, HIDDEN]],
        |tape, v| linear(tape, &v[0], &v[1], None),
    );
    // Two products forward, five backward, over the causal half.
    let flops = 7 * product(SEQUENCE, HEADS.dim, SEQUENCE) / 2;
    let flops = flops * (TOKENS / SEQUENCE * HEADS.query) as u64;
    both(
        c,
        "attention",
        Throughput::Elements(flops),
        &[qkv],
        |tape, v| attention(tape, &v[0], HEADS, SEQUENCE),
    );
    let targets = ids();
    let flops = Throughput::Elements(3 * product(TOKENS, HIDDEN, VOCABULARY));
    let head: &[usize] = &[VOCABULARY, HIDDEN];
    both(c, "cross_entropy", flops, &[x, head], |tape, v| {
        cross_entropy(tape, &v[0], &v[1], &targets, TOKENS as f64)
    });
    let (hidden, weight) = (random(x), random(head));
    let mut group = c.benchmark_group("ops");
    group.throughput(Throughput::Elements(product(TOKENS, HIDDEN, VOCABULARY)));
    group.bench_function("token_losses", |b| {
        b.iter(|| token_losses(&hidden, &weight, &targets).unwrap());
    });
    group.finish();

    both(c, "add", bytes(3, HIDDEN), &[x, x], |tape, v| {
        add(tape, &v[0], &v[1])
    });
    both(
        c,
        "rmsnorm",
        bytes(5, HIDDEN),
        &[x, &[HIDDEN]],
        |tape, v| rmsnorm(tape, &v[0], &v[1], eps),
    );
    let layernorm_shapes: [&[usize]; 3] = [x, &[HIDDEN], &[HIDDEN]];
    both(
        c,
        "layernorm",
        bytes(5, HIDDEN),
        &layernorm_shapes,
        |tape, v| layernorm(tape, &v[0], &v[1], &v[2], eps),
    );
    let tables = RopeTables::new(DType::F32, SEQUENCE, HEADS.dim, 10_000.0).unwrap();
    both(c, "rope", bytes(4, row), &[qkv], |tape, v| {
        rope(tape, &v[0], HEADS, SEQUENCE, &tables)
    });
    let norm_shapes: [&[usize]; 3] = [qkv, &[HEADS.dim], &[HEADS.dim]];
    both(c, "qk_norm", bytes(5, row), &norm_shapes, |tape, v| {
        qk_norm(tape, &v[0], &v[1], &v[2], HEADS, eps)
    });
    both(
        c,
        "swiglu",
        bytes(8, WIDTH),
        &[&[TOKENS, 2 * WIDTH]],
        |tape, v| swiglu(tape, &v[0]),
    );
    let tokens = ids();
    both(c, "embedding", bytes(3, HIDDEN), &[head], |tape, v| {
        embedding(tape, &v[0], &tokens)
    });
}

criterion_group! {
    name = group;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = benches
}
criterion_main!(group);
