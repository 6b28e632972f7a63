//! Arithmetic of rows, sums of columns, gated rows and norms of pieces on the simulator: every case of the library, every
//! schedule, refusals, and the operations that launch them.

use crate::support::refusals::{NOT_MULTIPLE, OUT_OF_RANGE, OVERFLOW, refused, refuses_pointers};
use crate::support::schedules::table;
use crate::support::tape::{close, tensor, var};
use crate::support::{check_cases, check_schedules};
use routegrad::device::Device;
use routegrad::error::Result;
use routegrad::launch;
use routegrad::ops::add::add;
use routegrad::ops::gated_rows::gated_rows;
use routegrad::ops::heads::Heads;
use routegrad::ops::linear::linear;
use routegrad::ops::qk_norm::qk_norm;
use routegrad::ops::scale::scale;
use routegrad::tape::{Gradients, Tape, Var, take_ran};
use std::ptr::null_mut;

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
    take_ran();
    let device = run(Device::Sim, shapes, parameters, &op);
    assert_eq!(take_ran()[name], 1);
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
    // out, a, b; rows, b_rows, width, multiply
    let arithmetic = |p: [usize; 3], n: [i64; 4]| {
        // Safety: only refused calls are made, which touch no memory.
        unsafe {
            launch!(
                table(),
                row_arithmetic(
                    p[0] as *mut _,
                    p[1] as *const _,
                    p[2] as *const _,
                    n[0],
                    n[1],
                    n[2] as i32,
                    n[3] as i32,
                    null_mut()
                )
            )
        }
    };
    refuses_pointers(["out", "a", "b"], &[], good, |p| {
        arithmetic(p, [4, 1, 64, 0])
    });
    for (n, why, name) in [
        ([0, 1, 64, 0], OUT_OF_RANGE, "rows"),
        ([1 << 31, 1, 64, 0], OUT_OF_RANGE, "rows"),
        ([(1 << 31) - 1, 1, 1 << 24, 0], OVERFLOW, "rows"),
        ([4, 2, 64, 0], OUT_OF_RANGE, "b_rows"),
        ([4, 1, 0, 0], OUT_OF_RANGE, "width"),
        ([4, 1, 12, 0], NOT_MULTIPLE, "width"),
        ([4, 1, 64, 2], OUT_OF_RANGE, "multiply"),
    ] {
        refused(|| arithmetic([good; 3], n), why, name);
    }
    // parts, x, y, scales; rows, width, pitch, piece, runs
    let sums = |p: [usize; 4], n: [i64; 5]| {
        let [width, piece, runs] = [n[1], n[3], n[4]].map(|n| n as i32);
        // Safety: as above.
        unsafe {
            launch!(
                table(),
                column_sums(
                    p[0] as *mut _,
                    p[1] as *const _,
                    p[2] as *const _,
                    p[3] as *const _,
                    n[0],
                    width,
                    n[2],
                    piece,
                    runs,
                    null_mut()
                )
            )
        }
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
    let gated = |p: [usize; 5], rows: i64, width: i32| {
        // Safety: as above.
        unsafe {
            launch!(
                table(),
                gated_rows(
                    p[0] as *mut _,
                    p[1] as *mut _,
                    p[2] as *const _,
                    p[3] as *const _,
                    p[4] as *const _,
                    rows,
                    width,
                    null_mut()
                )
            )
        }
    };
    let back = |p: [usize; 7], rows: i64, width: i32, accumulate: i32| {
        // Safety: as above.
        unsafe {
            launch!(
                table(),
                gated_rows_backward(
                    p[0] as *mut _,
                    p[1] as *mut _,
                    p[2] as *mut _,
                    p[3] as *const _,
                    p[4] as *const _,
                    p[5] as *const _,
                    p[6] as *const _,
                    rows,
                    width,
                    accumulate,
                    null_mut()
                )
            )
        }
    };
    refuses_pointers(["y", "gates", "x", "w", "v"], &[], good, |p| {
        gated(p, 4, 64)
    });
    let names = ["dx", "dv", "dscores", "dy", "gates", "v", "w"];
    refuses_pointers(names, &[], good, |p| back(p, 4, 64, 0));
    for (rows, width, why, name) in [
        (0, 64, OUT_OF_RANGE, "rows"),
        (4, 0, OUT_OF_RANGE, "width"),
        (4, 12, NOT_MULTIPLE, "width"),
    ] {
        refused(|| gated([good; 5], rows, width), why, name);
        refused(|| back([good; 7], rows, width, 0), why, name);
    }
    refused(|| back([good; 7], 4, 64, 2), OUT_OF_RANGE, "accumulate");
}

#[test]
fn refused_norms_of_pieces_are_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    // y, scales, x, w; rows, pieces, width, pitch
    let forward = |p: [usize; 4], n: [i64; 4]| {
        // Safety: only refused calls are made, which touch no memory.
        unsafe {
            launch!(
                table(),
                qk_norm(
                    p[0] as *mut _,
                    p[1] as *mut _,
                    p[2] as *const _,
                    p[3] as *const _,
                    n[0],
                    n[1] as i32,
                    n[2] as i32,
                    n[3],
                    1e-5,
                    null_mut()
                )
            )
        }
    };
    let backward = |p: [usize; 5], n: [i64; 4]| {
        // Safety: as above.
        unsafe {
            launch!(
                table(),
                qk_norm_backward(
                    p[0] as *mut _,
                    p[1] as *const _,
                    p[2] as *const _,
                    p[3] as *const _,
                    p[4] as *const _,
                    n[0],
                    n[1] as i32,
                    n[2] as i32,
                    n[3],
                    null_mut()
                )
            )
        }
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
