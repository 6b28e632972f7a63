//! The output head and its loss on the simulator: every case of the library, every schedule, refusals, and the operations
//! that launch them.

use crate::support::refusals::refuses;
use crate::support::tape::{close, var};
use crate::support::{check, check_cases, check_schedules, counts_agree, outputs};
use routegrad::device::Device;
use routegrad::kernels::bindings::{
    ROUTEGRAD_TILE_COOPERATIVE_128X256, ROUTEGRAD_TILE_PINGPONG_128X128,
};
use routegrad::kernels::cross_entropy::{
    CrossEntropyMean, CrossEntropyRows, GradientScale, HeadLogits,
};
use routegrad::ops::cross_entropy::{cross_entropy, token_losses};
use routegrad::ops::linear::linear;
use routegrad::tape::{Gradients, Tape, take_op_counts};
use routegrad::tensor::Tensor;
use routegrad::verify::kernels::cross_entropy::{Rows, logits_problem, rows_problem};

const LAUNCHERS: [&str; 4] = [
    "head_logits",
    "cross_entropy_rows",
    "cross_entropy_mean",
    "gradient_scale",
];

#[test]
fn logits_losses_and_gradients_are_within_the_rounding_of_float64() {
    LAUNCHERS.into_iter().for_each(check_cases);
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    LAUNCHERS.into_iter().for_each(check_schedules);
}

#[test]
fn logits_and_statistics_are_the_same_with_every_tile() {
    for (tokens, vocabulary) in [(67, 264), (131, 520), (40, 128)] {
        let found = [
            ROUTEGRAD_TILE_COOPERATIVE_128X256,
            ROUTEGRAD_TILE_PINGPONG_128X128,
        ]
        .map(|tile| {
            let problem = logits_problem(tokens, vocabulary, 72, tile as i32);
            check(&problem);
            outputs(&problem)
        });
        assert!(found[0] == found[1], "T {tokens}, V {vocabulary}");
    }
}

#[test]
fn bytes_are_those_of_the_formula() {
    for gradient in [false, true] {
        for statistics in [false, true] {
            let (tokens, vocabulary) = (37, 8200);
            let rows = Rows::new(tokens, vocabulary, 1.0);
            let problem = rows_problem(rows, 0.1, gradient, statistics);
            let cost = CrossEntropyRows::cost(tokens, vocabulary, gradient, statistics);
            counts_agree(&problem, cost);
        }
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        HeadLogits { logits, statistics, x, w; tokens: 4, vocabulary: 64, hidden: 64, tile: 0 }
        // The tile is not one of those that are compiled for it.
        OUT_OF_RANGE { tokens: 0; vocabulary: 0; hidden: 0; tile: 3 }
        NOT_MULTIPLE { vocabulary: 60; hidden: 12 }
        OVERFLOW { [vocabulary: 1 << 24] hidden: 1 << 13 }
    );
    refuses!(
        CrossEntropyRows {
            losses, dlogits[optional], logits, statistics[optional], targets;
            tokens: 4, vocabulary: 64, factor: 1.0
        }
        OUT_OF_RANGE { tokens: 0; vocabulary: 0 }
        NOT_MULTIPLE { vocabulary: 12 }
    );
    refuses!(
        CrossEntropyMean { loss[unaligned], losses; tokens: 4, factor: 1.0 }
        OUT_OF_RANGE { tokens: 0 }
    );
    refuses!(
        GradientScale {
            out, input, factor[unaligned];
            elements: 8, bf16_elements: false, accumulate: false
        }
        OUT_OF_RANGE { elements: 0 }
        NOT_MULTIPLE { elements: 12 }
    );
}

fn agree(what: &str, device: &Tensor, cpu: &Tensor) {
    close(what, &device.to_f64().unwrap(), &cpu.to_f64().unwrap());
}

/// Loss and gradients of x and W after two passes, each seeded with `seed`.
fn head(device: Device, tokens: usize, seed: f64) -> Vec<Tensor> {
    const V: usize = 264;
    let (x, w) = (
        var(0, [tokens, 72], device, false),
        var(1, [V, 72], device, true),
    );
    let targets: Vec<i32> = (0..tokens).map(|t| (t * t % V) as i32).collect();
    let targets = Tensor::from_slice([tokens], &targets);
    let mut store = Gradients::new(2);
    let mut found = vec![];
    for _ in 0..2 {
        let tape = Tape::new();
        let loss = cross_entropy(&tape, &x, &w, &targets, tokens as f64).unwrap();
        tape.backward(&loss, seed, &mut store).unwrap();
        found = vec![loss.tensor().clone()];
    }
    found.extend((0..2).map(|i| store.get(i).unwrap().clone()));
    found.push(token_losses(x.tensor(), w.tensor(), &targets).unwrap());
    found
}

fn the_loss_agrees_with_the_cpu(tokens: usize, seed: f64) {
    take_op_counts();
    let device = head(Device::Sim, tokens, seed);
    assert_eq!(take_op_counts()["cross_entropy"], 2);
    let cpu = head(Device::Cpu, tokens, seed);
    let what = ["loss", "dx", "dW", "the tokens' losses"];
    for ((what, device), cpu) in what.iter().zip(&device).zip(&cpu) {
        agree(&format!("{what} of {tokens} tokens"), device, cpu);
    }
}

#[test]
fn the_loss_runs_as_kernels_and_agrees_with_the_cpu_over_micro_batches() {
    the_loss_agrees_with_the_cpu(1, 1.0);
    the_loss_agrees_with_the_cpu(67, 0.3);
}

#[test]
#[ignore = "slow"]
fn the_loss_agrees_with_the_cpu_over_chunks() {
    the_loss_agrees_with_the_cpu(8250, 1.0);
}

#[test]
fn a_projection_runs_as_kernels_and_agrees_with_the_cpu() {
    let run = |device| {
        let (x, w) = (
            var(0, [67, 72], device, false),
            var(1, [264, 72], device, true),
        );
        let dy = var(2, [67, 264], device, false);
        let mut store = Gradients::new(2);
        let mut found = vec![];
        for _ in 0..2 {
            let tape = Tape::new();
            let y = linear(&tape, &x, &w, None).unwrap();
            tape.backward_from(&[(&y, dy.tensor().clone())], &mut store)
                .unwrap();
            found = vec![y.tensor().clone()];
        }
        found.extend((0..2).map(|i| store.get(i).unwrap().clone()));
        found
    };
    take_op_counts();
    let device = run(Device::Sim);
    assert_eq!(take_op_counts()["linear"], 2);
    for (i, (device, cpu)) in device.iter().zip(&run(Device::Cpu)).enumerate() {
        agree(&format!("result {i}"), device, cpu);
    }
}

#[test]
fn a_vocabulary_that_the_kernels_cannot_take_is_an_error_that_says_so() {
    let (x, w) = (
        var(0, [3, 8], Device::Sim, false),
        var(1, [12, 8], Device::Sim, true),
    );
    let targets = Tensor::from_slice([3], &[0, 1, 2]);
    let e = cross_entropy(&Tape::new(), &x, &w, &targets, 3.0).unwrap_err();
    assert!(
        e.to_string()
            .contains("`vocabulary` is not a multiple of 8"),
        "{e}"
    );
}
