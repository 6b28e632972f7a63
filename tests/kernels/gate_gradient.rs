//! The gates' gradient on the simulator: every case of the library, every schedule, exact counts of work and bytes,
//! refusals.

use crate::support::refusals::*;
use crate::support::{check_cases, check_schedules, counts_agree};
use routegrad::kernels::GateGradient;
use routegrad::kernels::cost::Sizes;
use routegrad::verify::kernels::dispatch::Batch;
use routegrad::verify::kernels::gate_gradient::{Inputs, problem};
use std::sync::Arc;

#[test]
fn every_gate_is_within_the_rounding_of_its_sum() {
    check_cases("gate_gradient");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    check_schedules("gate_gradient");
}

#[test]
fn work_and_bytes_are_those_of_the_formula() {
    // One tile of tokens: the vectors are read once a tile.
    for (experts, slots, hidden) in [(8, 1, 1024), (32, 4, 1032), (64, 2, 512)] {
        for dense in [false, true] {
            let sizes = Sizes {
                tokens: 128,
                hidden,
                ffn: 0,
                experts,
                slots,
                rows: 128 * slots,
            };
            let batch = Batch::random(sizes.tokens, experts, slots, 2);
            let inputs = Inputs::new(batch, hidden, 22, dense);
            let mut cost = GateGradient::cost(&sizes, dense, 22);
            if !dense {
                // Each gate's thread looks its expert up: the choices come again, from cache, until it is found.
                let looked_at = slots * (experts - slots) + slots * (slots + 1) / 2;
                cost.bytes += (4 * sizes.tokens * (looked_at - slots)) as f64;
            }
            counts_agree(&problem(&Arc::new(inputs)), cost);
        }
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    // dgates, dots, g, vectors, slot_row, choices; tokens, rows, experts, hidden, slots, dot_columns
    let call = |p: [usize; 6], n: [usize; 6]| {
        GateGradient {
            dgates: output(p[0]),
            dots: input(p[1]),
            g: optional(p[2]),
            vectors: optional(p[3]),
            slot_row: input(p[4]),
            choices: optional(p[5]),
            tokens: n[0],
            rows: n[1],
            experts: n[2],
            hidden: n[3],
            slots: n[4],
            dot_columns: n[5],
        }
        .launch(&stream())
    };
    let sizes = [4, 8, 8, 64, 2, 3];
    let names = ["dgates", "dots", "g", "vectors", "slot_row", "choices"];
    refuses_pointers(names, &["choices", "vectors"], good, |p| call(p, sizes));
    // Without choices every expert is a slot; without vectors nothing is wrong.
    refused(
        || call([good, good, good, good, good, 0], sizes),
        OUT_OF_RANGE,
        "slots",
    );
    for (i, wrong, why, name) in [
        (0, 0, OUT_OF_RANGE, "tokens"),
        (0, 1 << 31, OUT_OF_RANGE, "tokens"),
        (0, 1 << 30, OVERFLOW, "tokens"),
        (1, 0, OUT_OF_RANGE, "rows"),
        (1, 1 << 31, OUT_OF_RANGE, "rows"),
        (2, 0, OUT_OF_RANGE, "experts"),
        (2, 257, OUT_OF_RANGE, "experts"),
        (3, 0, OUT_OF_RANGE, "hidden"),
        (3, 36, NOT_MULTIPLE, "hidden"),
        (4, 0, OUT_OF_RANGE, "slots"),
        (4, 9, OUT_OF_RANGE, "slots"),
        (5, 0, OUT_OF_RANGE, "dot_columns"),
    ] {
        let mut n = sizes;
        n[i] = wrong;
        refused(|| call([good; 6], n), why, name);
    }
}
