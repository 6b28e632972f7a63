//! Gates of chosen and of sampled experts and the losses' scalars on the simulator: every case of the library, every
//! schedule, refusals, and the operations that launch them.

use crate::support::refusals::{Pointer, refuses};
use crate::support::{check_cases, check_schedules};
use routegrad::device::Device;
use routegrad::error::Result;
use routegrad::kernels::balance::*;
use routegrad::kernels::bindings::routegrad_draws;
use routegrad::kernels::gates::*;
use routegrad::kernels::{In, Out};
use routegrad::ops::balance::{auxiliary_loss, weighted_sum};
use routegrad::ops::dispatch::{Dispatch, Selection};
use routegrad::ops::renormalize::renormalize;
use routegrad::ops::sampled_experts::{Sampling, sample, sampled_gates};
use routegrad::ops::sampled_gate::{Choice, sampled_gate};
use routegrad::ops::scores::on_selection;
use routegrad::ops::straight_through::straight_through;
use routegrad::tape::check::normal_numbers;
use routegrad::tape::{Gradients, Tape, Var, take_op_counts};
use routegrad::tensor::Tensor;
use std::rc::Rc;

#[test]
fn gates_of_chosen_experts_are_within_f32_roundoff_of_float64() {
    check_cases("selected_gates");
    check_cases("selected_gates_backward");
}

#[test]
fn sampled_gates_are_within_f32_roundoff_of_float64() {
    check_cases("sampled_gates");
    check_cases("sampled_gates_backward");
}

#[test]
fn the_scalars_of_the_loss_are_within_a_rounding_of_float64() {
    for launcher in [
        "auxiliary_loss",
        "auxiliary_loss_backward",
        "weighted_sum",
        "weighted_sum_backward",
    ] {
        check_cases(launcher);
    }
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for launcher in [
        "selected_gates",
        "selected_gates_backward",
        "sampled_gates",
        "sampled_gates_backward",
        "auxiliary_loss",
        "auxiliary_loss_backward",
        "weighted_sum",
        "weighted_sum_backward",
    ] {
        check_schedules(launcher);
    }
}

/// Of [T, E] scores in f32, the same on either device.
fn scores(seed: u64, shape: [usize; 2], device: Device) -> Tensor {
    let numbers = normal_numbers(shape[0] * shape[1], seed);
    let numbers: Vec<f32> = numbers.iter().map(|x| (0.1 + x * x) as f32).collect();
    Tensor::from_slice(shape, &numbers).on(device)
}

/// The output of an operation on scores, and their gradient.
fn run(device: Device, op: impl Fn(&Tape, &Var) -> Result<Var>) -> [Vec<f64>; 2] {
    const SHAPE: [usize; 2] = [67, 24];
    let (tape, p) = (Tape::new(), Var::leaf(scores(1, SHAPE, device), 0));
    let w = op(&tape, &p).unwrap();
    let mut store = Gradients::new(1);
    tape.backward_from(&[(&w, scores(2, SHAPE, device))], &mut store)
        .unwrap();
    [w.tensor(), store.get(0).unwrap()].map(|t| t.to_f64().unwrap())
}

fn agree(what: &str, op: impl Fn(&Tape, &Var) -> Result<Var>) {
    take_op_counts();
    let device = run(Device::Sim, &op);
    assert_eq!(take_op_counts().values().sum::<usize>(), 1, "{what}");
    for (device, cpu) in device.iter().zip(run(Device::Cpu, &op)) {
        for (i, (a, b)) in device.iter().zip(cpu).enumerate() {
            assert!(
                (a - b).abs() <= 1e-5 * (1.0 + b.abs()),
                "{what}: {i} is {a}, not {b}"
            );
        }
    }
}

#[test]
fn the_operations_on_chosen_experts_run_as_kernels_and_agree_with_the_cpu() {
    let dispatch = |count: fn(usize) -> usize| {
        let selection = Selection::new(67, 24, |t, chosen| {
            chosen.extend((0..count(t) as i32).map(|i| 3 * i + (t % 3) as i32));
        });
        Rc::new(Dispatch::new(selection.unwrap()))
    };
    for (what, dispatch) in [
        ("two each", dispatch(|_| 2)),
        ("one to four", dispatch(|t| 1 + t % 4)),
    ] {
        agree(what, |tape, p| renormalize(tape, p, &dispatch));
        agree(what, |tape, p| on_selection(tape, p, &dispatch));
        for renormalize in [false, true] {
            agree(what, |tape, p| {
                straight_through(tape, p, &dispatch, renormalize)
            });
        }
    }
    let none = dispatch(|t| t % 3);
    agree("none for some", |tape, p| on_selection(tape, p, &none));
}

#[test]
fn gates_of_sampled_experts_agree_with_the_cpu_of_the_same_choice() {
    let sampling = Sampling {
        stages: 2,
        layer: 1,
        epsilon: 0.5,
        threshold: 0.75,
        untrusted: 0.25,
    };
    let draws = routegrad_draws {
        seed: 3,
        step: 5,
        first_token: 7,
    };
    let z = scores(1, [67, 24], Device::Sim);
    let sampled = sample(&z, sampling, Some(draws)).unwrap();
    assert!(
        sampled.factors.slice::<f32>().contains(&0.25),
        "some are not trusted"
    );
    let device = run(Device::Sim, |tape, z| sampled_gates(tape, z, &sampled, 2.0));
    let mut sum = [vec![0.0; 67 * 24], vec![0.0; 67 * 24]];
    for stage in 0..2 {
        let part = |t: &Tensor, width: usize, shape: &[usize]| {
            let numbers = &t.bytes()[stage * 67 * width * 4..][..67 * width * 4];
            let mut part = Tensor::unspecified(Device::Cpu, t.dtype(), shape);
            part.bytes_mut().copy_from_slice(numbers);
            part
        };
        let choice = Choice {
            expert: part(&sampled.experts, 1, &[67]),
            factor: part(&sampled.factors, 1, &[67]),
            kept: part(&sampled.kept, 24, &[67, 24]),
        };
        let of_stage = run(Device::Cpu, |tape, z| sampled_gate(tape, z, &choice, 2.0));
        for (sum, part) in sum.iter_mut().flatten().zip(of_stage.iter().flatten()) {
            *sum += part;
        }
    }
    for (a, b) in device.iter().flatten().zip(sum.iter().flatten()) {
        assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} is not {b}");
    }
}

#[test]
fn the_losses_run_as_kernels_and_agree_with_the_cpu() {
    let losses = |device: Device| {
        let mean: Vec<f32> = (0..24).map(|i| i as f32 / 276.0).collect();
        let fractions: Vec<f64> = (0..24).map(|i| f64::from(23 - i) / 276.0).collect();
        let mean = Var::leaf(Tensor::from_slice([24], &mean).on(device), 0);
        let other = Var::leaf(Tensor::scalar(3.5f32).on(device), 1);
        let (tape, mut store) = (Tape::new(), Gradients::new(2));
        let loss = auxiliary_loss(
            &tape,
            &mean,
            &Tensor::from_slice([fractions.len()], &fractions),
        )
        .unwrap();
        let total = weighted_sum(&tape, &[(&loss, 0.5), (&other, -0.25)]).unwrap();
        tape.backward(&total, 2.0, &mut store).unwrap();
        let [mean, other] = [0, 1].map(|i| store.get(i).unwrap().to_f64().unwrap());
        [vec![total.tensor().item().unwrap()], mean, other].concat()
    };
    take_op_counts();
    let device = losses(Device::Sim);
    let ran = take_op_counts();
    assert_eq!((ran["auxiliary_loss"], ran["weighted_sum"]), (1, 1));
    for (a, b) in device.iter().zip(losses(Device::Cpu)) {
        assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} is not {b}");
    }
}

#[test]
fn refused_gates_are_named_and_nothing_is_launched() {
    refuses!(
        SelectedGates {
            w, p, slot_row, choices[optional];
            tokens: 4, rows: 8, experts: 8, slots: 2, renormalize: true
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; rows: 0; experts: 0, 257; slots: 0, 9;
            // Without a list slot i is that of expert i.
            [choices: None] slots: 2
        }
    );
    refuses!(
        SelectedGatesBackward {
            dp, dw, p, slot_row, choices[optional];
            tokens: 4, rows: 8, experts: 8, slots: 2, renormalize: true, through: false
        }
        OUT_OF_RANGE { tokens: 0, 1 << 31; rows: 0; experts: 0, 257; slots: 0, 9 }
    );
}

#[test]
fn refused_sampled_gates_and_scalars_are_named_and_nothing_is_launched() {
    refuses!(
        SampledGates { w, factors, logits, experts_chosen, kept; tokens: 4, experts: 8, stages: 2 }
        OUT_OF_RANGE { tokens: 0; experts: 0, 257; stages: 0, 3 }
    );
    refuses!(
        SampledGatesBackward {
            dz, dw, logits, experts_chosen, kept;
            tokens: 4, experts: 8, stages: 2, estimator: 1.0
        }
        OUT_OF_RANGE { tokens: 0; experts: 0, 257; stages: 0, 3 }
    );
    refuses!(
        AuxiliaryLoss { loss[unaligned], mean, fractions; experts: 8 }
        OUT_OF_RANGE { experts: 0, 257 }
    );
    refuses!(
        AuxiliaryLossBackward { dmean, dloss[unaligned], fractions; experts: 8 }
        OUT_OF_RANGE { experts: 0, 257 }
    );
    let (two, many) = ([0, 1].map(|_| In::good()), [0; 129].map(|_| In::good()));
    refuses!(
        WeightedSum { out[unaligned], coefficients; terms: &two.into_iter().collect(), count: 2 }
        NULL { terms: &[In::good(), In::at(0)].into_iter().collect() }
        OUT_OF_RANGE { [terms: &many.into_iter().collect()] count: 0, 129 }
    );
    let (two, many) = ([0, 1].map(|_| Out::good()), [0; 129].map(|_| Out::good()));
    refuses!(
        WeightedSumBackward { dout[unaligned], coefficients; dterms: &two.into_iter().collect(), count: 2 }
        NULL { dterms: &[Out::good(), Out::at(0)].into_iter().collect() }
        OUT_OF_RANGE { [dterms: &many.into_iter().collect()] count: 0, 129 }
    );
}
