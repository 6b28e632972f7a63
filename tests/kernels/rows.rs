//! Arithmetic of rows, sums of columns, gated rows and norms of pieces on the simulator: every case of the library, every
//! schedule, refusals, and the operations that launch them.

use crate::support::refusals::*;
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
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    // out, a, b; rows, b_rows, width
    let arithmetic = |p: [usize; 3], n: [usize; 3]| {
        RowArithmetic {
            out: output(p[0]),
            a: input(p[1]),
            b: input(p[2]),
            rows: n[0],
            b_rows: n[1],
            width: n[2],
            multiply: false,
        }
        .launch(&stream())
    };
    refuses_pointers(["out", "a", "b"], &[], good, |p| arithmetic(p, [4, 1, 64]));
    for (n, why, name) in [
        ([0, 1, 64], OUT_OF_RANGE, "rows"),
        ([1 << 31, 1, 64], OUT_OF_RANGE, "rows"),
        ([(1 << 31) - 1, 1, 1 << 24], OVERFLOW, "rows"),
        ([4, 2, 64], OUT_OF_RANGE, "b_rows"),
        ([4, 1, 0], OUT_OF_RANGE, "width"),
        ([4, 1, 12], NOT_MULTIPLE, "width"),
    ] {
        refused(|| arithmetic([good; 3], n), why, name);
    }
    // parts, x, y, scales; rows, width, pitch, piece, runs
    let sums = |p: [usize; 4], n: [usize; 5]| {
        ColumnSums {
            parts: output(p[0]),
            x: input(p[1]),
            y: optional(p[2]),
            scales: optional(p[3]),
            rows: n[0],
            width: n[1],
            pitch: n[2],
            piece: n[3],
            runs: n[4],
        }
        .launch(&stream())
    };
    let sizes = [4, 64, 64, 64, 1];
    refuses_pointers(["parts", "x", "y", "scales"], &["y", "scales"], good, |p| {
        sums(p, sizes)
    });
    for (i, wrong, why, name) in [
        (0, 0, OUT_OF_RANGE, "rows"),
        (1, 0, OUT_OF_RANGE, "width"),
        (1, 12, NOT_MULTIPLE, "width"),
        (2, 56, OUT_OF_RANGE, "pitch"),
        (2, 68, NOT_MULTIPLE, "pitch"),
        (3, 0, OUT_OF_RANGE, "piece"),
        (3, 48, OUT_OF_RANGE, "piece"),
        (3, 4, NOT_MULTIPLE, "piece"),
        (4, 0, OUT_OF_RANGE, "runs"),
        (4, 65536, OUT_OF_RANGE, "runs"),
    ] {
        let mut n = sizes;
        n[i] = wrong;
        refused(|| sums([good; 4], n), why, name);
    }
    let gated = |p: [usize; 5], rows: usize, width: usize| {
        GatedRows {
            y: output(p[0]),
            gates: output(p[1]),
            x: input(p[2]),
            w: input(p[3]),
            v: input(p[4]),
            rows,
            width,
        }
        .launch(&stream())
    };
    let back = |p: [usize; 7], rows: usize, width: usize| {
        GatedRowsBackward {
            dx: output(p[0]),
            dv: output(p[1]),
            dscores: output(p[2]),
            dy: input(p[3]),
            gates: input(p[4]),
            v: input(p[5]),
            w: input(p[6]),
            rows,
            width,
            accumulate: false,
        }
        .launch(&stream())
    };
    refuses_pointers(["y", "gates", "x", "w", "v"], &[], good, |p| {
        gated(p, 4, 64)
    });
    let names = ["dx", "dv", "dscores", "dy", "gates", "v", "w"];
    refuses_pointers(names, &[], good, |p| back(p, 4, 64));
    for (rows, width, why, name) in [
        (0, 64, OUT_OF_RANGE, "rows"),
        (4, 0, OUT_OF_RANGE, "width"),
        (4, 12, NOT_MULTIPLE, "width"),
    ] {
        refused(|| gated([good; 5], rows, width), why, name);
        refused(|| back([good; 7], rows, width), why, name);
    }
}

#[test]
fn refused_norms_of_pieces_are_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    // y, scales, x, w; rows, pieces, width, pitch
    let forward = |p: [usize; 4], n: [usize; 4]| {
        QkNorm {
            y: output(p[0]),
            scales: (p[1] != 0).then(|| output(p[1])),
            x: input(p[2]),
            w: optional(p[3]),
            rows: n[0],
            pieces: n[1],
            width: n[2],
            pitch: n[3],
            eps: 1e-5,
        }
        .launch(&stream())
    };
    let backward = |p: [usize; 5], n: [usize; 4]| {
        QkNormBackward {
            dx: output(p[0]),
            scales: optional(p[1]),
            dy: input(p[2]),
            x: input(p[3]),
            w: optional(p[4]),
            rows: n[0],
            pieces: n[1],
            width: n[2],
            pitch: n[3],
        }
        .launch(&stream())
    };
    let sizes = [4, 2, 64, 128];
    refuses_pointers(["y", "scales", "x", "w"], &["w"], good, |p| {
        forward(p, sizes)
    });
    let names = ["dx", "scales", "dy", "x", "w"];
    refuses_pointers(names, &["w"], good, |p| backward(p, sizes));
    for (i, wrong, why, name) in [
        (0, 0, OUT_OF_RANGE, "rows"),
        (1, 0, OUT_OF_RANGE, "pieces"),
        (2, 0, OUT_OF_RANGE, "width"),
        (2, 12, NOT_MULTIPLE, "width"),
        (3, 120, OUT_OF_RANGE, "pitch"),
        (3, 132, NOT_MULTIPLE, "pitch"),
    ] {
        let mut n = sizes;
        n[i] = wrong;
        refused(|| forward([good; 4], n), why, name);
        refused(|| backward([good; 5], n), why, name);
    }
    let sizes = [(1 << 31) - 1, 16, 8, 128];
    refused(|| forward([good; 4], sizes), OVERFLOW, "rows");
}
