//! The kernels of routing statistics on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::{NULL, OUT_OF_RANGE, input, output, refused, stream};
use crate::support::{check_cases, check_schedules};
use routegrad::kernels::layer_tally::{LayerTally, RemoeFractions, RemoeUpdate};

const LAUNCHERS: [&str; 5] = [
    "layer_tally",
    "share_entropy",
    "lossfree_update",
    "remoe_fractions",
    "remoe_update",
];

#[test]
fn counts_and_updates_are_within_roundoff_of_float64() {
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
    let tally = |experts: usize, tokens: usize, first_token: usize, stats: usize| {
        let kernel = LayerTally {
            stats: output(stats),
            load: output(good),
            flags: output(good),
            fractions: output(good),
            offsets: input(good),
            first_non_finite: input(good),
            fault: input(good),
            mean_entropy: Some(input(good)),
            entropy_parts: None,
            tokens,
            first_token,
            parts: 0,
            experts,
            trains: true,
            first_of_stats: false,
            first_of_step: false,
            over_step: false,
        };
        kernel.launch(&stream())
    };
    refused(|| tally(8, 4, 0, 0), NULL, "stats");
    for experts in [0, 257] {
        refused(|| tally(experts, 4, 0, good), OUT_OF_RANGE, "experts");
    }
    refused(|| tally(8, 0, 0, good), OUT_OF_RANGE, "tokens");
    refused(|| tally(8, 4, 1 << 31, good), OUT_OF_RANGE, "first_token");

    let fractions = |p: [usize; 3], slots: usize, experts: usize| {
        let kernel = RemoeFractions {
            fractions: output(p[0]),
            lambda: input(p[1]),
            offsets: input(p[2]),
            slots,
            experts,
        };
        kernel.launch(&stream())
    };
    let update = |p: [usize; 2], layers: usize, experts: usize, top_k: usize, factor: f64| {
        let kernel = RemoeUpdate {
            lambda: output(p[0]),
            load: input(p[1]),
            layers,
            experts,
            top_k,
            factor,
        };
        kernel.launch(&stream())
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
