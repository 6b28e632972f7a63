//! The optimizer's kernels on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::refuses;
use crate::support::{check_cases, check_schedules};
use routegrad::kernels::adamw::{AdamwUpdate, SquareSums};

const LAUNCHERS: [&str; 2] = ["adamw_update", "square_sums"];

#[test]
fn updates_and_sums_are_within_roundoff_of_float64() {
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
        AdamwUpdate { parameters, block_parameter, outcome; blocks: 8, bf16_moments: false }
        OUT_OF_RANGE { blocks: 0, 1 << 31 }
    );
    refuses!(
        SquareSums { parts, parameters, block_parameter; blocks: 8 }
        OUT_OF_RANGE { blocks: 0, 1 << 31 }
    );
}
