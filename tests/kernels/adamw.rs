//! The optimizer's kernels on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::{NULL, OUT_OF_RANGE, refused, refuses_pointers};
use crate::support::schedules::table;
use crate::support::{check_cases, check_schedules};
use routegrad::kernels::bindings::routegrad_step_outcome as Outcome;
use routegrad::launch;
use std::ptr::null_mut;

const LAUNCHERS: [&str; 10] = [
    "adamw_update",
    "square_sums",
    "losses_add",
    "step_decide",
    "state_commit",
    "layer_tally",
    "share_entropy",
    "lossfree_update",
    "remoe_fractions",
    "remoe_update",
];

#[test]
fn updates_decisions_and_counts_are_within_roundoff_of_float64() {
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
    let update = |p: [usize; 3], blocks: i64, bf16: i32| {
        let (rows, of_block) = (p[0] as *const _, p[1] as *const i32);
        let outcome = p[2] as *const Outcome;
        // SAFETY: only refused calls are made, which touch no memory.
        unsafe {
            launch!(
                table(),
                adamw_update(rows, of_block, outcome, blocks, bf16, null_mut())
            )
        }
    };
    let names = ["parameters", "block_parameter", "outcome"];
    refuses_pointers(names, &[], good, |p| update(p, 8, 0));
    let sums = |p: [usize; 3], blocks: i64| {
        let (parts, rows, of_block) = (p[0] as *mut f64, p[1] as *const _, p[2] as *const i32);
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                square_sums(parts, rows, of_block, blocks, null_mut())
            )
        }
    };
    let names = ["parts", "parameters", "block_parameter"];
    refuses_pointers(names, &[], good, |p| sums(p, 8));
    for blocks in [0, -1, 1 << 31] {
        refused(|| update([good; 3], blocks, 0), OUT_OF_RANGE, "blocks");
        refused(|| sums([good; 3], blocks), OUT_OF_RANGE, "blocks");
    }

    refused(|| update([good; 3], 8, 2), OUT_OF_RANGE, "bf16_moments");

    let decide = |p: [usize; 5], count: i64, layers: i32| {
        let (outcome, settings) = (p[0] as *mut Outcome, p[1] as *const _);
        let (losses, flags, parts) = (p[2] as *const f64, p[3] as *const i32, p[4] as *const f64);
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                step_decide(
                    outcome,
                    settings,
                    losses,
                    flags,
                    parts,
                    count,
                    layers,
                    null_mut()
                )
            )
        }
    };
    let names = ["outcome", "settings", "losses", "flags", "parts"];
    refuses_pointers(names, &[], good, |p| decide(p, 8, 2));
    refused(|| decide([good; 5], 0, 2), OUT_OF_RANGE, "count");
    refused(|| decide([good; 5], 8, -1), OUT_OF_RANGE, "layers");
    let commit = |p: [usize; 2], count: i32, most: i64| {
        let (states, outcome) = (p[0] as *const _, p[1] as *const Outcome);
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                state_commit(states, outcome, count, most, null_mut())
            )
        }
    };
    refuses_pointers(["states", "outcome"], &[], good, |p| commit(p, 2, 8));
    refused(|| commit([good; 2], 0, 8), OUT_OF_RANGE, "count");
    refused(|| commit([good; 2], 2, 0), OUT_OF_RANGE, "most_words");

    let tally = |experts: i32, tokens: i64, first: i64, stats: usize| {
        let (p, i) = (good as *mut f64, good as *mut i32);
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                layer_tally(
                    stats as *mut f64,
                    p,
                    i,
                    p.cast(),
                    i,
                    i,
                    i,
                    p.cast(),
                    p,
                    tokens,
                    first,
                    0,
                    experts,
                    1,
                    0,
                    0,
                    0,
                    null_mut()
                )
            )
        }
    };
    refused(|| tally(8, 4, 0, 0), NULL, "stats");
    for experts in [0, 257] {
        refused(|| tally(experts, 4, 0, good), OUT_OF_RANGE, "experts");
    }
    refused(|| tally(8, 0, 0, good), OUT_OF_RANGE, "tokens");
    refused(|| tally(8, 4, 1 << 31, good), OUT_OF_RANGE, "first_token");

    let fractions = |p: [usize; 3], slots: i64, experts: i32| {
        let (f, lambda, offsets) = (p[0] as *mut f32, p[1] as *const f32, p[2] as *const i32);
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                remoe_fractions(f, lambda, offsets, slots, experts, null_mut())
            )
        }
    };
    let update = |p: [usize; 2], layers: i32, experts: i32, top_k: i32, factor: f64| {
        let (lambda, load) = (p[0] as *mut f32, p[1] as *const f64);
        // SAFETY: as above.
        unsafe {
            launch!(
                table(),
                remoe_update(lambda, load, layers, experts, top_k, factor, null_mut())
            )
        }
    };
    for (absent, name) in ["fractions", "lambda", "offsets"].into_iter().enumerate() {
        let mut p = [good; 3];
        p[absent] = 0;
        refused(|| fractions(p, 8, 4), NULL, name);
    }
    refused(|| fractions([good; 3], 0, 4), OUT_OF_RANGE, "slots");
    refused(|| fractions([good; 3], 8, 257), OUT_OF_RANGE, "experts");
    refused(|| update([0, good], 1, 8, 2, 1.2), NULL, "lambda");
    refused(|| update([good, 0], 1, 8, 2, 1.2), NULL, "load");
    refused(|| update([good; 2], 0, 8, 2, 1.2), OUT_OF_RANGE, "layers");
    refused(|| update([good; 2], 1, 8, 9, 1.2), OUT_OF_RANGE, "top_k");
    for factor in [0.5, f64::NAN] {
        refused(
            || update([good; 2], 1, 8, 2, factor),
            OUT_OF_RANGE,
            "factor",
        );
    }
}
