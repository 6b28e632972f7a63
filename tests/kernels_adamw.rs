//! The optimizer's kernels on the simulator: every case of the library, every schedule, refusals.

mod support;

use routegrad::launch;
use std::ptr::null_mut;
use support::refusals::{NULL, OUT_OF_RANGE, refused, refuses_pointers};
use support::schedules::table;
use support::{check_cases, check_schedules};

const LAUNCHERS: [&str; 3] = ["adamw_update", "square_sums", "round_weights"];

#[test]
fn updates_sums_and_rounded_weights_are_within_roundoff_of_float64() {
    LAUNCHERS.into_iter().for_each(check_cases);
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    LAUNCHERS.into_iter().for_each(check_schedules);
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    let update = |p: [usize; 5], numbers: i64| {
        // SAFETY: only refused calls are made, which touch no memory.
        unsafe {
            launch!(
                table(),
                adamw_update(
                    p[0] as *mut f32,
                    p[1] as *mut f32,
                    p[2] as *mut f32,
                    p[3] as *const f32,
                    p[4] as *const f32,
                    numbers,
                    null_mut()
                )
            )
        }
    };
    let names = ["w", "m", "v", "gradient", "coefficients"];
    refuses_pointers(names, &[], good, |p| update(p, 8));
    let sums = |parts: usize, gradient: usize, numbers: i64| {
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                square_sums(
                    parts as *mut f64,
                    gradient as *const f32,
                    numbers,
                    null_mut()
                )
            )
        }
    };
    refuses_pointers(["gradient"], &[], good, |[g]| sums(good, g, 8));
    refused(|| sums(0, good, 8), NULL, "parts");
    let round = |p: [usize; 2], numbers: i64| {
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                round_weights(p[0] as *mut _, p[1] as *const f32, numbers, null_mut())
            )
        }
    };
    refuses_pointers(["r", "w"], &[], good, |p| round(p, 8));
    // SAFETY: as above.
    let parts = || unsafe { launch!(table(), square_parts(null_mut(), 8)) };
    refused(parts, NULL, "parts");
    for numbers in [0, -1, 1 << 43] {
        refused(|| update([good; 5], numbers), OUT_OF_RANGE, "numbers");
        refused(|| sums(good, good, numbers), OUT_OF_RANGE, "numbers");
        refused(|| round([good; 2], numbers), OUT_OF_RANGE, "numbers");
    }
}
