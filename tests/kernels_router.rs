//! The router's kernels on the simulator: every case of the library, every schedule.

mod support;

use support::{check_cases, check_schedules};

#[test]
fn forward_has_the_accuracy_of_f32_and_chooses_by_its_own_scores() {
    check_cases("router_forward");
}

#[test]
fn statistics_are_the_sums_of_all_blocks() {
    check_cases("router_statistics");
}

#[test]
fn backward_is_within_f32_roundoff_and_one_rounding_to_bf16() {
    check_cases("router_backward");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for launcher in ["router_forward", "router_statistics", "router_backward"] {
        check_schedules(launcher);
    }
}
