//! The kernels that end a step, on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::refuses;
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
    refuses!(
        StepDecide { outcome, settings, losses, flags, parts; count: 8, layers: 2 }
        OUT_OF_RANGE { count: 0; layers: 4097 }
    );
    refuses!(
        StateCommit { states, outcome; count: 2, most_words: 8 }
        OUT_OF_RANGE { count: 0; most_words: 0 }
    );
}
