//! Token embedding on the simulator: every case of the library, every schedule, refusals, and the operation that launches
//! the kernels.

use crate::support::refusals::refuses;
use crate::support::tape::tensor;
use crate::support::{check_cases, check_schedules, counts_agree};
use routegrad::device::Device;
use routegrad::kernels::{EmbeddingForward, EmbeddingGradient, EmbeddingOrder};
use routegrad::ops::embedding::embedding;
use routegrad::tape::{Gradients, Tape, Var, take_op_counts};
use routegrad::tensor::Tensor;
use routegrad::verify::kernels::embedding::{Ids, forward_problem};

const LAUNCHERS: [&str; 3] = ["embedding_forward", "embedding_order", "embedding_gradient"];

#[test]
fn rows_and_order_are_exact_and_gradients_within_f32_roundoff_of_float64() {
    LAUNCHERS.into_iter().for_each(check_cases);
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    LAUNCHERS.into_iter().for_each(check_schedules);
}

#[test]
fn bytes_of_rows_are_those_of_the_formula() {
    // More rows in the table than are looked up: each is read from memory.
    let (rows, table_rows, hidden) = (1000, 4096, 136);
    let problem = forward_problem(Ids::Uniform, rows, table_rows, hidden);
    let mut cost = EmbeddingForward::cost(rows, table_rows, hidden);
    // Each thread of a row reads the row's id, from cache.
    cost.bytes += (4 * rows * (hidden / 8 - 1)) as f64;
    counts_agree(&problem, cost);
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        EmbeddingForward { y, w, ids; tokens: 4, vocabulary: 8, hidden: 64 }
        OUT_OF_RANGE { tokens: 0, 1 << 31; vocabulary: 0, (1 << 24) + 1; hidden: 0 }
        NOT_MULTIPLE { hidden: 12 }
    );
    refuses!(
        EmbeddingGradient {
            dw, parts, dy, order, keys;
            tokens: 4, vocabulary: 8, hidden: 64, accumulate: false
        }
        OUT_OF_RANGE { tokens: 0, 1 << 31; vocabulary: 0, (1 << 24) + 1; hidden: 0 }
        NOT_MULTIPLE { hidden: 12 }
    );
    // previous and row_token come together.
    refuses!(
        EmbeddingOrder {
            order, keys, previous, row_token, ids;
            tokens: 4, vocabulary: 8, shift: 0, whole: false
        }
        OUT_OF_RANGE { shift: 32 }
    );
}

/// y, and the table's gradient after two passes.
fn run(device: Device, tokens: usize, vocabulary: usize) -> [Vec<f64>; 2] {
    const D: usize = 40;
    let numbers = |seed, shape: [usize; 2]| tensor(seed, shape, device);
    let ids: Vec<i32> = (0..tokens)
        .map(|t| {
            if t % 3 == 0 {
                2
            } else {
                (t * t * 31 % vocabulary) as i32
            }
        })
        .collect();
    let ids = Tensor::from_slice([tokens], &ids);
    let w = Var::parameter(numbers(1, [vocabulary, D]), 0);
    let mut store = Gradients::new(1);
    let mut y = vec![];
    for _ in 0..2 {
        let tape = Tape::new();
        let out = embedding(&tape, &w, &ids).unwrap();
        tape.backward_from(&[(&out, numbers(2, [tokens, D]))], &mut store)
            .unwrap();
        y = out.tensor().to_f64().unwrap();
    }
    [y, store.get(0).unwrap().to_f64().unwrap()]
}

#[test]
fn the_operation_runs_as_kernels_and_agrees_with_the_cpu_for_one_two_and_three_byte_ids() {
    for (tokens, vocabulary) in [(1, 3), (700, 200), (700, 256), (700, 5000), (700, 70_000)] {
        take_op_counts();
        let device = run(Device::Sim, tokens, vocabulary);
        assert_eq!(take_op_counts()["embedding"], 2);
        let cpu = run(Device::Cpu, tokens, vocabulary);
        assert!(device[0] == cpu[0], "rows, V {vocabulary}");
        for (a, b) in device[1].iter().zip(&cpu[1]) {
            assert!(
                (a - b).abs() <= 1e-4 * (1.0 + b.abs()),
                "{a} for {b}, V {vocabulary}"
            );
        }
    }
}
