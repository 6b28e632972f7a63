//! Combine on the simulator: every case of the library, every schedule, exact counts of work and bytes, refusals.

use crate::support::refusals::refuses;
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
    refuses!(
        Combine {
            y, rows_in, gates, slot_row, choices[optional], vectors[optional];
            tokens: 4, rows: 8, experts: 8, hidden: 64, slots: 2, accumulate: false
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; rows: 0, 1 << 31; experts: 0, 257; hidden: 0; slots: 0, 9;
            // Without choices every expert is a slot; without vectors nothing is wrong.
            [choices: None] slots: 2
        }
        OVERFLOW { tokens: 1 << 30 }
        NOT_MULTIPLE { hidden: 36 }
    );
}
