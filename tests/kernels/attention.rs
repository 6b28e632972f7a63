//! Attention on the simulator: every case of the library, every schedule, what may not depend on what, exact counts of
//! work and bytes, refusals.

use crate::support::refusals::refuses;
use crate::support::schedules::{is_plain, table, with_options};
use crate::support::{check_cases, check_schedules, counts_agree, outputs};
use half::bf16;
use routegrad::kernels::{AttentionBackward, AttentionForward, attention_backward};
use routegrad::verify::kernels::attention::{Inputs, Shape, problem};
use routegrad::verify::kernels::attention_backward::{self as backward, Gradient, workspace};
use std::sync::Arc;

#[test]
fn forward_is_within_the_rounding_of_its_weights_of_float64() {
    check_cases("attention_forward");
}

#[test]
fn backward_is_within_the_rounding_of_its_operands_of_float64() {
    check_cases("attention_backward");
}

#[test]
#[ignore = "slow"]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    check_schedules("attention_forward");
    check_schedules("attention_backward");
}

/// out, log_sum_exp and dqkv.
fn all_outputs(gradient: Gradient) -> Vec<Vec<u8>> {
    let gradient = Arc::new(gradient);
    let inputs = Arc::new(Inputs {
        shape: gradient.inputs.shape,
        qkv: gradient.inputs.qkv.clone(),
        first_key: gradient.inputs.first_key.clone(),
    });
    let mut all = outputs(&problem(&inputs));
    all.extend(outputs(&backward::problem(&gradient)));
    all
}

#[test]
fn the_number_of_multiprocessors_does_not_change_the_bytes() {
    let shapes = [
        Shape::new(2, 300, 4, 2, 64).packed(),
        Shape::new(3, 140, 2, 1, 128),
    ];
    for shape in shapes {
        let first = all_outputs(Gradient::new(&shape));
        let counts: &[i32] = if is_plain() { &[1, 3, 132] } else { &[1] };
        for &count in counts {
            let run = || all_outputs(Gradient::new(&shape));
            let other = with_options(|o| o.multiprocessors = count, run);
            assert!(other == first, "{shape:?} on {count} multiprocessors");
        }
    }
}

/// Rows whose bytes differ.
fn rows_that_differ(a: &[u8], b: &[u8], bytes: usize) -> Vec<usize> {
    let rows = a.chunks(bytes).zip(b.chunks(bytes)).enumerate();
    rows.filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect()
}

#[test]
fn a_sequence_full_of_nan_leaves_the_others_as_they_are() {
    for shape in [Shape::new(3, 100, 2, 1, 64), Shape::new(3, 130, 2, 2, 128)] {
        let s = shape.sizes.sequence;
        let clean = all_outputs(Gradient::new(&shape));
        let mut spoilt = Gradient::new(&shape);
        let rows = |width: usize| s * width..2 * s * width;
        spoilt.inputs.qkv[rows(shape.qkv_width())].fill(bf16::NAN);
        spoilt.dout[rows(shape.out_width())].fill(bf16::INFINITY);
        let got = all_outputs(spoilt);
        let second: Vec<usize> = (s..2 * s).collect();
        assert_eq!(
            rows_that_differ(&clean[0], &got[0], shape.out_width() * 2),
            second
        );
        assert_eq!(
            rows_that_differ(&clean[2], &got[2], shape.qkv_width() * 2),
            second
        );
    }
}

#[test]
fn a_row_depends_on_the_earlier_rows_of_its_document_alone() {
    let shape = Shape::new(1, 300, 2, 1, 64);
    let (begin, changed, end) = (70, 170, 260);
    let first_key = (0..300).map(|row| match row {
        r if r < begin => 0,
        r if r < end => begin as i32,
        _ => end as i32,
    });
    let first_key: Vec<i32> = first_key.collect();
    let make = |from: usize| {
        let mut inputs = Inputs::new(&shape);
        inputs.first_key = Some(first_key.clone());
        let width = shape.qkv_width();
        for value in &mut inputs.qkv[from * width..(from + 1) * width] {
            *value = bf16::from_f32(value.to_f32() + 1.0);
        }
        outputs(&problem(&Arc::new(inputs)))
    };
    let mut clean = Inputs::new(&shape);
    clean.first_key = Some(first_key.clone());
    let clean = outputs(&problem(&Arc::new(clean)));
    let got = make(changed);
    let differ = rows_that_differ(&clean[0], &got[0], shape.out_width() * 2);
    assert_eq!(differ, (changed..end).collect::<Vec<_>>());
}

/// With whole tiles that are read once, the headers' formulas hold as they stand; operations always.
#[test]
fn work_and_bytes_are_what_the_headers_say() {
    for width in [64, 128] {
        let shape = Shape::new(2, 128, 3, 3, width);
        counts_agree(
            &problem(&Arc::new(Inputs::new(&shape))),
            AttentionForward::cost(&shape.sizes),
        );
        let mut cost = AttentionBackward::cost(&shape.sizes);
        // Four lanes read the statistics of a query.
        cost.bytes += (3 * 8 * 2 * 3 * 128) as f64;
        counts_agree(&backward::problem(&Arc::new(Gradient::new(&shape))), cost);
        // Keys and values are read once a tile of queries: 6 times 64 KB or 32 KB, not 3.
        let shape = Shape::new(1, 300, 2, 1, width);
        let mut cost = AttentionForward::cost(&shape.sizes);
        let rows_read = 2 * (128 + 256 + 300) - 300;
        cost.bytes += (4 * rows_read * width) as f64;
        counts_agree(&problem(&Arc::new(Inputs::new(&shape))), cost);
    }
}

#[test]
fn the_workspace_holds_two_floats_for_every_padded_row() {
    for shape in [Shape::new(3, 17, 4, 2, 64), Shape::new(1, 129, 3, 1, 128)] {
        let s = shape.sizes;
        let floats = attention_backward::workspace(table(), shape.tokens(), s.sequence, s.heads)
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(floats, workspace(&shape));
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        AttentionForward {
            out, log_sum_exp, qkv, first_key[optional];
            tokens: 4, sequence: 2, heads: 4, key_value_heads: 2, head_width: 64
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; [tokens: 5] sequence: 2; sequence: 0, 8; heads: 0, 1025;
            key_value_heads: 0, 3; head_width: 32, 96
        }
        OVERFLOW { tokens: 1 << 30 }
    );
    refuses!(
        AttentionBackward {
            dqkv, workspace, dout, qkv, out, log_sum_exp, first_key[optional], cosines[optional], sines;
            tokens: 4, sequence: 2, heads: 4, key_value_heads: 2, head_width: 64
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; [tokens: 5] sequence: 2; sequence: 0, 8; heads: 0, 1025;
            key_value_heads: 0, 3; head_width: 32, 96
        }
        OVERFLOW { tokens: 1 << 30 }
    );
}
