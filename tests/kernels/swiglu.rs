//! SwiGLU of dense layers on the simulator: every case of the library, every schedule, refusals, and the operation that
//! launches them.

use crate::support::refusals::*;
use crate::support::tape::{close, tensor, var};
use crate::support::{check_cases, check_schedules};
use routegrad::device::Device;
use routegrad::kernels::{SwigluBackward, SwigluForward};
use routegrad::ops::swiglu::swiglu;
use routegrad::tape::{Gradients, Tape, take_op_counts};

#[test]
fn activations_and_gradients_are_within_half_an_ulp_and_f32_roundoff_of_float64() {
    check_cases("swiglu_forward");
    check_cases("swiglu_backward");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    check_schedules("swiglu_forward");
    check_schedules("swiglu_backward");
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    let forward = |p: [usize; 2], rows: usize, ffn: usize| {
        SwigluForward {
            a: output(p[0]),
            h: input(p[1]),
            rows,
            ffn,
        }
        .launch(&stream())
    };
    let backward = |p: [usize; 3], rows: usize, ffn: usize| {
        SwigluBackward {
            dh: output(p[0]),
            da: input(p[1]),
            h: input(p[2]),
            rows,
            ffn,
        }
        .launch(&stream())
    };
    refused(|| forward([0, good], 4, 64), NULL, "a");
    refused(|| forward([good, good + 8], 4, 64), MISALIGNED, "h");
    refuses_pointers(["dh", "da", "h"], &[], good, |p| backward(p, 4, 64));
    for (rows, ffn, why, name) in [
        (0, 64, OUT_OF_RANGE, "rows"),
        (1 << 31, 64, OUT_OF_RANGE, "rows"),
        (4, 0, OUT_OF_RANGE, "ffn"),
        (4, 12, NOT_MULTIPLE, "ffn"),
        ((1 << 31) - 1, 1 << 24, OVERFLOW, "rows"),
    ] {
        refused(|| forward([good; 2], rows, ffn), why, name);
        refused(|| backward([good; 3], rows, ffn), why, name);
    }
}

#[test]
fn the_operation_runs_as_kernels_and_agrees_with_the_cpu() {
    let run = |device: Device| {
        let (tape, x) = (Tape::new(), var(0, [67, 80], device, false));
        let y = swiglu(&tape, &x).unwrap();
        let mut store = Gradients::new(1);
        tape.backward_from(&[(&y, tensor(2, [67, 40], device))], &mut store)
            .unwrap();
        [y.tensor(), store.get(0).unwrap()].map(|t| t.to_f64().unwrap())
    };
    take_op_counts();
    let device = run(Device::Sim);
    assert_eq!(take_op_counts()["swiglu"], 1);
    for ((what, device), cpu) in ["y", "dx"].iter().zip(&device).zip(&run(Device::Cpu)) {
        close(what, device, cpu);
    }
}
