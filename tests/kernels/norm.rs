//! Norms on the simulator: every case of the library, every schedule, exact counts of bytes, refusals, and the operations
//! that launch them.

use crate::support::refusals::{NOT_MULTIPLE, OUT_OF_RANGE, refused, refuses, stream};
use crate::support::schedules::{counted, table, with_options};
use crate::support::tape::{close, var};
use crate::support::{check_cases, check_schedules, counts_agree, outputs};
use routegrad::device::Device;
use routegrad::kernels::norm::{NormBackward, NormForward, NormWeightGradient, partials};
use routegrad::ops::{add::add, add_norm::add_norm, layernorm::layernorm, rmsnorm::rmsnorm};
use routegrad::tape::{Gradients, Tape, Var, take_op_counts};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::DType;
use routegrad::verify::kernels::norm::{
    Added, Inputs, Kind, STANDARD, backward_problem, forward_problem,
};
use std::sync::Arc;

#[test]
fn rows_are_normalised_within_half_an_ulp_of_float64() {
    check_cases("norm_forward");
}

#[test]
fn gradients_are_within_half_an_ulp_and_f32_roundoff_of_float64() {
    check_cases("norm_backward");
    check_cases("norm_weight_gradient");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for launcher in ["norm_forward", "norm_backward", "norm_weight_gradient"] {
        check_schedules(launcher);
    }
}

#[test]
fn the_number_of_multiprocessors_does_not_change_the_bytes() {
    let inputs = Arc::new(Inputs::new(Kind::Layer, 451, 264, STANDARD));
    let problem = backward_problem(&inputs, Added::Apart, false);
    let first = outputs(&problem);
    for count in [1, 132] {
        let other = with_options(|o| o.multiprocessors = count, || outputs(&problem));
        assert!(other == first, "on {count} multiprocessors");
    }
}

#[test]
fn bytes_are_those_of_the_formula() {
    for (kind, added) in [(Kind::Rms, Added::Nothing), (Kind::Layer, Added::Apart)] {
        let (rows, hidden) = (3001, 520);
        let inputs = Arc::new(Inputs::new(kind, rows, hidden, STANDARD));
        let (layernorm, with) = (kind == Kind::Layer, added == Added::Apart);
        counts_agree(
            &forward_problem(&inputs, added),
            NormForward::cost(rows, hidden, layernorm, with),
        );
        for accumulate in [false, true] {
            counts_agree(
                &backward_problem(&inputs, added, accumulate),
                NormBackward::cost(rows, hidden, layernorm, with, accumulate),
            );
        }
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        NormForward { y, sum, x, residual, weight, bias[optional]; rows: 4, hidden: 64, eps: 1e-5 }
        OUT_OF_RANGE { rows: 0, 1 << 31; hidden: 0, 8200; eps: -1.0, f32::NAN }
        NOT_MULTIPLE { hidden: 12 }
    );
    refuses!(
        NormBackward {
            dx, partials, dy, skip[optional], x, weight;
            rows: 4, hidden: 64, layernorm: true, eps: 1e-5
        }
        OUT_OF_RANGE { rows: 0, 1 << 31; hidden: 0, 8200; eps: -1.0, f32::NAN }
        NOT_MULTIPLE { hidden: 12 }
    );
    refuses!(
        NormWeightGradient { gradient, partials; rows: 4, hidden: 64, accumulate: false }
        OUT_OF_RANGE { rows: 0 }
        NOT_MULTIPLE { hidden: 20 }
    );
    let lengths = |rows, hidden| partials(table(), rows, hidden).map(|_| ());
    refused(|| lengths(0, 64), OUT_OF_RANGE, "rows");
    refused(|| lengths(4, 20), NOT_MULTIPLE, "hidden");
}

#[test]
fn a_buffer_that_is_too_short_is_named_and_nothing_is_launched() {
    let mut y = Tensor::zeros(Device::Sim, DType::Bf16, [64]);
    let x = Tensor::zeros(Device::Sim, DType::Bf16, [64]);
    let kernel = NormForward {
        y: y.output().unwrap(),
        sum: None,
        x: x.input().unwrap(),
        residual: None,
        weight: x.input().unwrap(),
        bias: None,
        rows: 2,
        hidden: 40,
        eps: 1e-5,
    };
    let mut text = String::new();
    let counters = counted(|| text = kernel.launch(&stream()).unwrap_err().to_string());
    assert!(text.contains("`y` of 80 elements or more"), "{text}");
    assert_eq!(counters.launches, 0);
    let fits = NormForward { rows: 1, ..kernel };
    fits.launch(&stream()).unwrap_or_else(|e| panic!("{e}"));
}

const SHAPE: [usize; 2] = [37, 264];

/// Outputs, then gradients, of an operation on x, a term, weight and bias.
fn run(device: Device, op: impl Fn(&Tape, &[Var]) -> Vec<Var>) -> Vec<Option<Vec<f64>>> {
    let (tape, d) = (Tape::new(), [SHAPE[1]]);
    let v = [
        var(0, SHAPE, device, false),
        var(1, SHAPE, device, false),
        var(2, d, device, true),
        var(3, d, device, true),
    ];
    let outputs = op(&tape, &v);
    let seeds: Vec<(&Var, Tensor)> = outputs
        .iter()
        .enumerate()
        .map(|(i, o)| (o, var(10 + i, SHAPE, device, false).tensor().clone()))
        .collect();
    let mut found: Vec<Option<Vec<f64>>> = outputs
        .iter()
        .map(|o| Some(o.tensor().to_f64().unwrap()))
        .collect();
    let mut store = Gradients::new(4);
    tape.backward_from(&seeds, &mut store).unwrap();
    found.extend((0..4).map(|i| store.get(i).map(|g| g.to_f64().unwrap())));
    found
}

fn agree(name: &str, op: impl Fn(&Tape, &[Var]) -> Vec<Var>) {
    take_op_counts();
    let device = run(Device::Sim, &op);
    let ran = take_op_counts();
    assert_eq!(ran[name], 1, "{ran:?}");
    let cpu = run(Device::Cpu, &op);
    for (i, (device, cpu)) in device.iter().zip(&cpu).enumerate() {
        assert_eq!(device.is_some(), cpu.is_some(), "{name}: result {i}");
        let (Some(device), Some(cpu)) = (device, cpu) else {
            continue;
        };
        close(&format!("{name}: result {i}"), device, cpu);
    }
}

#[test]
fn the_operations_run_as_kernels_and_agree_with_the_cpu() {
    agree("rmsnorm", |t, v| {
        vec![rmsnorm(t, &v[0], &v[2], 1e-5).unwrap()]
    });
    agree("layernorm", |t, v| {
        vec![layernorm(t, &v[0], &v[2], &v[3], 1e-5).unwrap()]
    });
    for layernorm in [false, true] {
        agree("add_norm", |t, v| {
            let bias = layernorm.then_some(&v[3]);
            let (sum, y) = add_norm(t, &v[0], &v[1], &v[2], bias, 1e-5).unwrap();
            vec![sum, y]
        });
        // Nothing uses the sum but the norm, or nothing the norm.
        agree("add_norm", |t, v| {
            let bias = layernorm.then_some(&v[3]);
            vec![add_norm(t, &v[0], &v[1], &v[2], bias, 1e-5).unwrap().1]
        });
        agree("add_norm", |t, v| {
            let bias = layernorm.then_some(&v[3]);
            vec![add_norm(t, &v[0], &v[1], &v[2], bias, 1e-5).unwrap().0]
        });
    }
}

/// So a layer that is computed again, whose stream is added first, gives the bytes of one that is not.
#[test]
fn one_pass_gives_the_bytes_of_the_add_and_the_norm_one_after_the_other() {
    let fused = run(Device::Sim, |t, v| {
        let (sum, y) = add_norm(t, &v[0], &v[1], &v[2], None, 1e-5).unwrap();
        vec![sum, y]
    });
    let apart = run(Device::Sim, |t, v| {
        let sum = add(t, &v[0], &v[1]).unwrap();
        let y = rmsnorm(t, &sum, &v[2], 1e-5).unwrap();
        vec![sum, y]
    });
    assert!(fused == apart);
}

#[test]
fn a_width_that_the_kernel_cannot_take_is_an_error_that_says_so() {
    let x = var(0, [3, 12], Device::Sim, false);
    let w = var(1, [12], Device::Sim, true);
    let text = rmsnorm(&Tape::new(), &x, &w, 1e-5).unwrap_err().to_string();
    assert!(
        text.contains("argument `hidden` is not a multiple of 8"),
        "{text}"
    );
}
