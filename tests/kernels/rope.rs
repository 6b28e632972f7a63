//! Rotary position embedding on the simulator: every case of the library, every schedule, exact counts of bytes, refusals,
//! and the operation that launches it.

use crate::support::refusals::refuses;
use crate::support::tape::{close, scaled, tensor, var};
use crate::support::{check_cases, check_schedules, counts_agree};
use routegrad::device::Device;
use routegrad::error::Result;
use routegrad::kernels::bindings::ROUTEGRAD_TILE_COOPERATIVE_128X256;
use routegrad::kernels::{QkvRopeForward, Rope};
use routegrad::ops::attention::rotary::{Places, projected_attention};
use routegrad::ops::heads::Heads;
use routegrad::ops::rope::{RopeTables, rope};
use routegrad::tape::{Gradients, Tape, Var, take_op_counts};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::DType;
use routegrad::verify::kernels::qkv_rope::{self, Inputs};
use routegrad::verify::kernels::rope::{Shape, problem};
use std::sync::Arc;

#[test]
fn heads_are_turned_within_half_an_ulp_of_float64_up_to_position_8191() {
    check_cases("rope");
}

#[test]
fn the_projection_turns_queries_and_keys_within_its_own_bounds_of_float64() {
    check_cases("qkv_rope_forward");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    check_schedules("rope");
    check_schedules("qkv_rope_forward");
}

#[test]
fn bytes_are_those_of_the_formula() {
    let shape = Shape {
        sequences: 11,
        sequence: 101,
        heads: 4,
        key_value_heads: 2,
        width: 64,
    };
    counts_agree(
        &problem(shape, false, false),
        Rope::cost(shape.tokens(), shape.sequence, 4, 2, 64),
    );
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        Rope {
            y, x, cosines, sines;
            tokens: 4, sequence: 4, heads: 2, key_value_heads: 1, head_width: 16, back: false
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; sequence: 0; heads: 0, 1025; key_value_heads: 0, 3;
            head_width: 0, 24, 1040
        }
        OVERFLOW {
            [heads: 1024, key_value_heads: 1024, head_width: 1024] tokens: i32::MAX as usize
        }
    );
}

#[test]
fn bytes_and_operations_of_the_projection_are_those_of_the_formula() {
    let shape = Shape {
        sequences: 2,
        sequence: 64,
        heads: 2,
        key_value_heads: 1,
        width: 64,
    };
    // One tile of rows and one of columns: every operand is read once.
    let inputs = Arc::new(Inputs::new(shape, 64));
    let tile = ROUTEGRAD_TILE_COOPERATIVE_128X256;
    let cost = QkvRopeForward::cost(shape.tokens(), shape.row(), 64);
    counts_agree(&qkv_rope::problem(&inputs, tile), cost);
}

#[test]
fn a_refused_argument_of_the_projection_is_named_and_nothing_is_launched() {
    refuses!(
        QkvRopeForward {
            out, x, w, cosines, sines;
            tokens: 4, sequence: 4, heads: 2, key_value_heads: 1, head_width: 64, hidden: 16, tile: 0
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; sequence: 0; heads: 0, 1025; key_value_heads: 0, 3; head_width: 32;
            hidden: 0; tile: 99
        }
    );
}

const SEQUENCE: usize = 13;

/// Output, then gradient, of the operation on three sequences.
fn run(device: Device, heads: Heads) -> Result<[Vec<f64>; 2]> {
    let shape = [3 * SEQUENCE, heads.row_width()];
    let tables = RopeTables::new(DType::F32, SEQUENCE + 3, heads.dim, 10_000.0).unwrap();
    let tape = Tape::new();
    let x = var(0, shape, device, false);
    let y = rope(&tape, &x, heads, SEQUENCE, &tables)?;
    let mut store = Gradients::new(1);
    tape.backward_from(&[(&y, tensor(2, shape, device))], &mut store)
        .unwrap();
    Ok([y.tensor(), store.get(0).unwrap()].map(|t| t.to_f64().unwrap()))
}

fn heads(dim: usize) -> Heads {
    Heads {
        query: 4,
        key_value: 2,
        dim,
    }
}

#[test]
fn the_operation_runs_as_a_kernel_and_agrees_with_the_cpu() {
    for dim in [48, 64] {
        take_op_counts();
        let device = run(Device::Sim, heads(dim)).unwrap();
        assert_eq!(take_op_counts()["rope"], 1);
        let cpu = run(Device::Cpu, heads(dim)).unwrap();
        for (device, cpu) in device.iter().zip(&cpu) {
            close(&format!("head width {dim}"), device, cpu);
        }
    }
}

#[test]
fn a_head_width_that_the_kernel_cannot_take_is_an_error_that_says_so() {
    let e = run(Device::Sim, heads(24)).unwrap_err().to_string();
    assert!(e.contains("`head_width` is outside"), "{e}");
}

/// Output, then gradients of x and W, of attention on three sequences behind projection and RoPE.
fn project_and_attend(device: Device, heads: Heads) -> Result<[Vec<f64>; 3]> {
    let (hidden, rows) = (40, 3 * SEQUENCE);
    let tables = RopeTables::new(DType::F32, SEQUENCE, heads.dim, 10_000.0).unwrap();
    let tape = Tape::new();
    let x = var(0, [rows, hidden], device, false);
    // Scores of unit scale: where one key takes all weight, gradients are what rounding left.
    let w = Var::parameter(scaled(2, 0.15, [heads.row_width(), hidden], device), 1);
    let places = Places {
        heads,
        sequence: SEQUENCE,
        tables: &tables,
        first_key: None,
    };
    let y = projected_attention(&tape, &x, &w, &places)?;
    let dy = tensor(3, [rows, heads.query * heads.dim], device);
    let mut store = Gradients::new(2);
    tape.backward_from(&[(&y, dy)], &mut store)?;
    let of = |t: &Tensor| t.to_f64().unwrap();
    Ok([y.tensor(), store.get(0).unwrap(), store.get(1).unwrap()].map(of))
}

#[test]
fn attention_behind_projection_and_rope_agrees_with_the_cpu() {
    for dim in [64, 128] {
        take_op_counts();
        let device = project_and_attend(Device::Sim, heads(dim)).unwrap();
        let ran = take_op_counts();
        assert!(
            ran.contains_key("rotary attention") && !ran.contains_key("rope"),
            "{ran:?}"
        );
        let cpu = project_and_attend(Device::Cpu, heads(dim)).unwrap();
        for (device, cpu) in device.iter().zip(&cpu) {
            close(&format!("head width {dim}"), device, cpu);
        }
    }
}
