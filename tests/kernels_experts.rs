//! The experts' fused products on the simulator: every case of the library, every schedule.

mod support;

use support::{check_cases, check_schedules};

#[test]
fn swiglu_forward_is_within_half_an_ulp_of_float64() {
    check_cases("grouped_swiglu_forward");
}

#[test]
fn swiglu_backward_is_within_half_an_ulp_of_float64() {
    check_cases("grouped_swiglu_backward");
}

#[test]
fn down_and_its_column_sums_are_within_roundoff_of_float64() {
    check_cases("grouped_down_forward");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for launcher in [
        "grouped_swiglu_forward",
        "grouped_swiglu_backward",
        "grouped_down_forward",
    ] {
        check_schedules(launcher);
    }
}
