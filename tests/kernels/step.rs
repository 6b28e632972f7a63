//! The kernels that end a step, on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::{OUT_OF_RANGE, input, output, refused, refuses_pointers, stream};
use crate::support::{check_cases, check_schedules};
use routegrad::kernels::step::{StateCommit, StepDecide};

const LAUNCHERS: [&str; 3] = ["losses_add", "step_decide", "state_commit"];

#[test]
fn sums_and_decisions_are_within_roundoff_of_float64() {
    LAUNCHERS.into_iter().for_each(check_cases);
}

#[test]
#[ignore = "slow"]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    LAUNCHERS.into_iter().for_each(check_schedules);
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    let decide = |p: [usize; 5], count: usize, layers: usize| {
        let kernel = StepDecide {
            outcome: output(p[0]),
            settings: input(p[1]),
            losses: input(p[2]),
            flags: Some(input(p[3])),
            parts: input(p[4]),
            count,
            layers,
        };
        kernel.launch(&stream())
    };
    let names = ["outcome", "settings", "losses", "flags", "parts"];
    refuses_pointers(names, &[], good, |p| decide(p, 8, 2));
    refused(|| decide([good; 5], 0, 2), OUT_OF_RANGE, "count");
    refused(|| decide([good; 5], 8, 4097), OUT_OF_RANGE, "layers");
    let commit = |p: [usize; 2], count: usize, most_words: usize| {
        let kernel = StateCommit {
            states: input(p[0]),
            outcome: input(p[1]),
            count,
            most_words,
        };
        kernel.launch(&stream())
    };
    refuses_pointers(["states", "outcome"], &[], good, |p| commit(p, 2, 8));
    refused(|| commit([good; 2], 0, 8), OUT_OF_RANGE, "count");
    refused(|| commit([good; 2], 2, 0), OUT_OF_RANGE, "most_words");
}
