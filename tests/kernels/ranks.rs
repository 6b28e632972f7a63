//! Sums over ranks on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::{NULL, OUT_OF_RANGE, input, output, refused, stream};
use crate::support::{check_cases, check_schedules};
use routegrad::kernels::ranks::{LoadShares, RankFlags, RankSums};

const LAUNCHERS: [&str; 5] = [
    "rank_sums",
    "rank_sums_f64",
    "rank_sums_i32",
    "rank_flags",
    "load_shares",
];

#[test]
fn sums_over_ranks_are_formed_in_pairs() {
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
    let sums = |out: usize, rows: usize, ranks: usize, stride: usize, elements: usize| {
        let kernel = RankSums {
            out: output(out),
            rows: input(rows),
            ranks,
            stride,
            elements,
        };
        kernel.launch(&stream())
    };
    refused(|| sums(0, good, 2, 8, 8), NULL, "out");
    refused(|| sums(good, 0, 2, 8, 8), NULL, "rows");
    refused(|| sums(good, good, 0, 8, 8), OUT_OF_RANGE, "ranks");
    refused(|| sums(good, good, 5000, 8, 8), OUT_OF_RANGE, "ranks");
    refused(|| sums(good, good, 2, 7, 8), OUT_OF_RANGE, "stride");
    refused(|| sums(good, good, 2, 8, 0), OUT_OF_RANGE, "elements");
    let flags = |ranks: usize, layers: usize| {
        let kernel = RankFlags {
            flags: output(good),
            rows: input(good),
            ranks,
            layers,
        };
        kernel.launch(&stream())
    };
    refused(|| flags(0, 2), OUT_OF_RANGE, "ranks");
    refused(|| flags(2, 0), OUT_OF_RANGE, "layers");
    let shares = |fractions: usize, experts: usize| {
        let kernel = LoadShares {
            fractions: output(fractions),
            load: input(good),
            experts,
        };
        kernel.launch(&stream())
    };
    refused(|| shares(0, 8), NULL, "fractions");
    refused(|| shares(good, 257), OUT_OF_RANGE, "experts");
}
