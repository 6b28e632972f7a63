//! Combine on the simulator: every case of the library, every schedule, exact counts of work and bytes, refusals.

use crate::support::refusals::*;
use crate::support::schedules::with_options;
use crate::support::{check_cases, check_schedules, counts_agree, outputs};
use routegrad::kernels::Combine;
use routegrad::kernels::cost::Sizes;
use routegrad::verify::kernels::combine::{Inputs, MODES, problem};
use routegrad::verify::kernels::dispatch::Batch;
use std::sync::Arc;

#[test]
fn the_output_is_within_half_an_ulp_of_float64() {
    check_cases("combine");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    check_schedules("combine");
}

#[test]
fn the_number_of_multiprocessors_does_not_change_the_bytes() {
    for mode in MODES {
        let inputs = Arc::new(Inputs::new(Batch::random(450, 8, 2, 1), 1032, mode));
        let problem = problem(&inputs);
        let first = outputs(&problem);
        for count in [1, 5, 132] {
            let other = with_options(|o| o.multiprocessors = count, || outputs(&problem));
            assert!(other == first, "{mode:?} on {count} multiprocessors");
        }
    }
}

#[test]
fn work_and_bytes_are_those_of_the_formula() {
    for (experts, slots, hidden) in [(8, 1, 512), (32, 4, 512), (64, 2, 256)] {
        for mode in MODES {
            let sizes = Sizes {
                tokens: 1000,
                hidden,
                ffn: 0,
                experts,
                slots,
                rows: 1000 * slots,
            };
            let batch = Batch::random(sizes.tokens, experts, slots, 2);
            let problem = problem(&Arc::new(Inputs::new(batch, hidden, mode)));
            let cost = Combine::cost(&sizes, mode.gates, mode.vectors, mode.accumulate);
            // One block: each reads its slice of the vectors.
            with_options(|o| o.multiprocessors = 1, || counts_agree(&problem, cost));
        }
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    // y, rows_in, gates, slot_row, choices, vectors; tokens, rows, experts, hidden, slots
    let call = |p: [usize; 6], n: [usize; 5]| {
        Combine {
            y: output(p[0]),
            rows_in: input(p[1]),
            gates: optional(p[2]),
            slot_row: input(p[3]),
            choices: optional(p[4]),
            vectors: optional(p[5]),
            tokens: n[0],
            rows: n[1],
            experts: n[2],
            hidden: n[3],
            slots: n[4],
            accumulate: false,
        }
        .launch(&stream())
    };
    let sizes = [4, 8, 8, 64, 2];
    let names = ["y", "rows_in", "gates", "slot_row", "choices", "vectors"];
    refuses_pointers(names, &["choices", "vectors"], good, |p| call(p, sizes));
    // Without choices every expert is a slot; without vectors nothing is wrong.
    refused(
        || call([good, good, good, good, 0, good], sizes),
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
    ] {
        let mut n = sizes;
        n[i] = wrong;
        refused(|| call([good; 6], n), why, name);
    }
}
