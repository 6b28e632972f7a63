//! The optimizer's kernels on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::{OUT_OF_RANGE, input, output, refused, refuses_pointers, stream};
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
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    let update = |p: [usize; 3], blocks: usize| {
        let kernel = AdamwUpdate {
            parameters: input(p[0]),
            block_parameter: input(p[1]),
            outcome: input(p[2]),
            blocks,
            bf16_moments: false,
        };
        kernel.launch(&stream())
    };
    let names = ["parameters", "block_parameter", "outcome"];
    refuses_pointers(names, &[], good, |p| update(p, 8));
    let sums = |p: [usize; 3], blocks: usize| {
        let kernel = SquareSums {
            parts: output(p[0]),
            parameters: input(p[1]),
            block_parameter: input(p[2]),
            blocks,
        };
        kernel.launch(&stream())
    };
    let names = ["parts", "parameters", "block_parameter"];
    refuses_pointers(names, &[], good, |p| sums(p, 8));
    for blocks in [0, 1 << 31] {
        refused(|| update([good; 3], blocks), OUT_OF_RANGE, "blocks");
        refused(|| sums([good; 3], blocks), OUT_OF_RANGE, "blocks");
    }
}
