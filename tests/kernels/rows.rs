//! Arithmetic of rows, sums of columns, gated rows and norms of pieces on the simulator: every case of the library, every
//! schedule, refusals, and the operations that launch them.

use crate::support::refusals::refuses;
use crate::support::tape::{close, tensor, var};
use crate::support::{check_cases, check_schedules};
use routegrad::device::Device;
use routegrad::error::Result;
use routegrad::kernels::{
    ColumnSums, GatedRows, GatedRowsBackward, QkNorm, QkNormBackward, RowArithmetic,
};
use routegrad::ops::add::add;
use routegrad::ops::gated_rows::gated_rows;
use routegrad::ops::heads::Heads;
use routegrad::ops::linear::linear;
use routegrad::ops::qk_norm::qk_norm;
use routegrad::ops::scale::scale;
use routegrad::tape::{Gradients, Tape, Var, take_op_counts};

const LAUNCHERS: [&str; 6] = [
    "row_arithmetic",
    "column_sums",
    "gated_rows",
    "gated_rows_backward",
    "qk_norm",
    "qk_norm_backward",
];

#[test]
fn every_value_is_within_half_an_ulp_and_f32_roundoff_of_float64() {
    LAUNCHERS.into_iter().for_each(check_cases);
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    LAUNCHERS.into_iter().for_each(check_schedules);
}

/// The output of an operation on inputs of these shapes and the gradient of each; `parameters` are numbers of inputs.
fn run<const N: usize>(
    device: Device,
    shapes: [&[usize]; N],
    parameters: &[usize],
    op: &impl Fn(&Tape, [&Var; N]) -> Result<Var>,
) -> Vec<Vec<f64>> {
    let tape = Tape::new();
    let inputs: Vec<Var> = (0..N)
        .map(|i| var(i, shapes[i], device, parameters.contains(&i)))
        .collect();
    let y = op(&tape, std::array::from_fn(|i| &inputs[i])).unwrap();
    let mut store = Gradients::new(N);
    let dy = tensor(99, y.tensor().shape(), device);
    tape.backward_from(&[(&y, dy)], &mut store).unwrap();
    let gradients = (0..N).map(|i| store.get(i).unwrap());
    let tensors = std::iter::once(y.tensor()).chain(gradients);
    tensors.map(|t| t.to_f64().unwrap()).collect()
}

fn agrees<const N: usize>(
    name: &str,
    shapes: [&[usize]; N],
    parameters: &[usize],
    op: impl Fn(&Tape, [&Var; N]) -> Result<Var>,
) {
    take_op_counts();
    let device = run(Device::Sim, shapes, parameters, &op);
    assert_eq!(take_op_counts()[name], 1);
    for (i, (device, cpu)) in device
        .iter()
        .zip(run(Device::Cpu, shapes, parameters, &op))
        .enumerate()
    {
        close(&format!("{name}, output or gradient {i}"), device, &cpu);
    }
}

#[test]
fn the_operations_run_as_kernels_and_agree_with_the_cpu() {
    agrees("add", [&[67, 40], &[67, 40]], &[], |tape, [a, b]| {
        add(tape, a, b)
    });
    agrees("scale", [&[67, 40], &[40]], &[1], |tape, [x, w]| {
        scale(tape, x, w)
    });
    agrees(
        "linear",
        [&[300, 64], &[72, 64], &[72]],
        &[1, 2],
        |tape, [x, w, b]| linear(tape, x, w, Some(b)),
    );
    agrees(
        "gated_rows",
        [&[300, 64], &[1, 64], &[300, 64]],
        &[1],
        |tape, [x, w, v]| gated_rows(tape, x, w, v),
    );
    let heads = Heads {
        query: 4,
        key_value: 2,
        dim: 64,
    };
    let qkv: &[usize] = &[67, heads.row_width()];
    for [q, k] in [[64, 64], [256, 128], [64, 128]] {
        agrees(
            "qk_norm",
            [qkv, &[q], &[k]],
            &[1, 2],
            |tape, [x, wq, wk]| qk_norm(tape, x, wq, wk, heads, 1e-5),
        );
    }
}

#[test]
fn refused_rows_are_named_and_nothing_is_launched() {
    refuses!(
        RowArithmetic { out, a, b; rows: 4, b_rows: 1, width: 64, multiply: false }
        OUT_OF_RANGE { rows: 0, 1 << 31; b_rows: 2; width: 0 }
        OVERFLOW { [width: 1 << 24] rows: (1 << 31) - 1 }
        NOT_MULTIPLE { width: 12 }
    );
    refuses!(
        ColumnSums {
            parts, x, y[optional], scales[optional];
            rows: 4, width: 64, pitch: 64, piece: 64, runs: 1
        }
        OUT_OF_RANGE { rows: 0; width: 0; pitch: 56; piece: 0, 48; runs: 0, 65536 }
        NOT_MULTIPLE { width: 12; pitch: 68; piece: 4 }
    );
    refuses!(
        GatedRows { y, gates, x, w, v; rows: 4, width: 64 }
        OUT_OF_RANGE { rows: 0; width: 0 }
        NOT_MULTIPLE { width: 12 }
    );
    refuses!(
        GatedRowsBackward {
            dx, dv, dscores, dy, gates, v, w;
            rows: 4, width: 64, accumulate: false
        }
        OUT_OF_RANGE { rows: 0; width: 0 }
        NOT_MULTIPLE { width: 12 }
    );
}

#[test]
fn refused_norms_of_pieces_are_named_and_nothing_is_launched() {
    refuses!(
        QkNorm {
            y, scales, x, w[optional];
            rows: 4, pieces: 2, width: 64, pitch: 128, eps: 1e-5
        }
        OUT_OF_RANGE { rows: 0; pieces: 0; width: 0; pitch: 120 }
        NOT_MULTIPLE { width: 12; pitch: 132 }
        OVERFLOW { [pieces: 16, width: 8] rows: (1 << 31) - 1 }
    );
    refuses!(
        QkNormBackward {
            dx, scales, dy, x, w[optional];
            rows: 4, pieces: 2, width: 64, pitch: 128
        }
        OUT_OF_RANGE { rows: 0; pieces: 0; width: 0; pitch: 120 }
        NOT_MULTIPLE { width: 12; pitch: 132 }
    );
}
