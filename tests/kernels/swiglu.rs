//! SwiGLU of dense layers on the simulator: every case of the library, every schedule, refusals, and the operation that
//! launches them.

use crate::support::refusals::refuses;
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
    refuses!(
        SwigluForward { a, h; rows: 4, ffn: 64 }
        OUT_OF_RANGE { rows: 0, 1 << 31; ffn: 0 }
        NOT_MULTIPLE { ffn: 12 }
        OVERFLOW { [ffn: 1 << 24] rows: (1 << 31) - 1 }
    );
    refuses!(
        SwigluBackward { dh, da, h; rows: 4, ffn: 64 }
        OUT_OF_RANGE { rows: 0, 1 << 31; ffn: 0 }
        NOT_MULTIPLE { ffn: 12 }
        OVERFLOW { [ffn: 1 << 24] rows: (1 << 31) - 1 }
    );
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
