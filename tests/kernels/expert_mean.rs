//! Expert sums and means on the simulator: every case of the library, every schedule, exact counts of bytes, refusals.

use crate::support::refusals::*;
use crate::support::{check_cases, check_schedules, counts_agree};
use routegrad::kernels::bindings::*;
use routegrad::kernels::cost::Sizes;
use routegrad::kernels::{ExpertMean, ExpertMeanUpdate, ExpertSums};
use routegrad::verify::kernels::dispatch::Batch;
use routegrad::verify::kernels::expert_mean::{Sums, mean_problem, sums_problem, update_problem};
use std::sync::Arc;

#[test]
fn sums_are_within_f32_roundoff_of_float64_and_masses_count_rows() {
    check_cases("expert_sums");
}

#[test]
fn the_average_moves_for_experts_with_rows_alone() {
    check_cases("expert_mean_update");
    check_cases("expert_mean");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    check_schedules("expert_sums");
    check_schedules("expert_mean_update");
    check_schedules("expert_mean");
}

#[test]
fn bytes_are_those_of_the_formula() {
    let sizes = Sizes {
        tokens: 40_000,
        hidden: 264,
        ffn: 0,
        experts: 2,
        slots: 1,
        rows: 40_000,
    };
    let batch = Batch::random(sizes.tokens, sizes.experts, sizes.slots, 1);
    let inputs = Arc::new(Sums::new(batch, sizes.hidden, true));
    counts_agree(&sums_problem(&inputs), ExpertSums::cost(&sizes));
    // One tile of columns: the gates are read once. The two launches beside it read the average and the sums.
    let narrow = Sizes {
        hidden: 128,
        ..sizes
    };
    let batch = Batch::random(sizes.tokens, sizes.experts, sizes.slots, 1);
    let inputs = Arc::new(Sums::new(batch, narrow.hidden, true));
    let costs = [
        ExpertMean::cost(&narrow),
        ExpertSums::cost(&narrow),
        ExpertMeanUpdate::cost(&narrow),
    ];
    let mean = mean_problem(&inputs, ROUTEGRAD_WEIGHTING_SUM_P);
    counts_agree(&mean, costs.into_iter().sum());
    let sizes = Sizes {
        experts: 1,
        hidden: 2048,
        ..sizes
    };
    let update = update_problem(sizes.experts, sizes.hidden, ROUTEGRAD_WEIGHTING_PLAIN);
    counts_agree(&update, ExpertMeanUpdate::cost(&sizes));
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    // sums, masses, column_sums, gates, offsets, row_token; rows, tokens, experts, hidden
    let sums = |p: [usize; 6], n: [usize; 4]| {
        ExpertSums {
            sums: output(p[0]),
            masses: output(p[1]),
            column_sums: input(p[2]),
            gates: optional(p[3]),
            offsets: input(p[4]),
            row_token: input(p[5]),
            rows: n[0],
            tokens: n[1],
            experts: n[2],
            hidden: n[3],
        }
        .launch(&stream())
    };
    let sizes = [4, 4, 8, 64];
    refuses_pointers(
        [
            "sums",
            "masses",
            "column_sums",
            "gates",
            "offsets",
            "row_token",
        ],
        &["gates"],
        good,
        |p| sums(p, sizes),
    );
    for (i, wrong, why, name) in [
        (0, 0, OUT_OF_RANGE, "rows"),
        (0, 1 << 31, OUT_OF_RANGE, "rows"),
        (1, 0, OUT_OF_RANGE, "tokens"),
        (2, 0, OUT_OF_RANGE, "experts"),
        (2, 257, OUT_OF_RANGE, "experts"),
        (3, 0, OUT_OF_RANGE, "hidden"),
        (3, 12, NOT_MULTIPLE, "hidden"),
    ] {
        let mut n = sizes;
        n[i] = wrong;
        refused(|| sums([good; 6], n), why, name);
    }
    // average, column_sums, gates, offsets, row_token, beta; rows, tokens, experts, hidden; weighting
    let mean = |p: [usize; 6], n: [usize; 4], weighting: i32| {
        ExpertMean {
            average: output(p[0]),
            column_sums: input(p[1]),
            gates: optional(p[2]),
            offsets: input(p[3]),
            row_token: input(p[4]),
            beta: input(p[5]),
            rows: n[0],
            tokens: n[1],
            experts: n[2],
            hidden: n[3],
            weighting,
        }
        .launch(&stream())
    };
    let by_sum = ROUTEGRAD_WEIGHTING_SUM_P as i32;
    let names = ["average", "column_sums", "gates", "offsets", "row_token"];
    refuses_pointers(names, &[], good, |[a, c, g, o, r]| {
        mean([a, c, g, o, r, good], sizes, by_sum)
    });
    refused(
        || mean([good, good, good, good, good, 0], sizes, by_sum),
        NULL,
        "beta",
    );
    for (n, weighting, why, name) in [
        ([0, 4, 8, 64], 0, OUT_OF_RANGE, "rows"),
        ([4, 0, 8, 64], 0, OUT_OF_RANGE, "tokens"),
        ([4, 4, 257, 64], 0, OUT_OF_RANGE, "experts"),
        ([4, 4, 8, 12], 0, NOT_MULTIPLE, "hidden"),
        ([4, 4, 8, 64], 3, OUT_OF_RANGE, "weighting"),
    ] {
        refused(|| mean([good; 6], n, weighting), why, name);
    }
    // average, sums, masses, beta; experts, hidden; weighting
    let update = |p: [usize; 4], n: [usize; 2], weighting: i32| {
        ExpertMeanUpdate {
            average: output(p[0]),
            sums: input(p[1]),
            masses: input(p[2]),
            beta: input(p[3]),
            experts: n[0],
            hidden: n[1],
            weighting,
        }
        .launch(&stream())
    };
    for (i, name) in ["average", "sums", "masses", "beta"]
        .into_iter()
        .enumerate()
    {
        let mut p = [good; 4];
        p[i] = 0;
        refused(|| update(p, [8, 64], 0), NULL, name);
    }
    for (n, weighting, why, name) in [
        ([0, 64], 0, OUT_OF_RANGE, "experts"),
        ([257, 64], 0, OUT_OF_RANGE, "experts"),
        ([8, 0], 0, OUT_OF_RANGE, "hidden"),
        ([8, 20], 0, NOT_MULTIPLE, "hidden"),
        ([8, 64], -1, OUT_OF_RANGE, "weighting"),
        ([8, 64], 3, OUT_OF_RANGE, "weighting"),
    ] {
        refused(|| update([good; 4], n, weighting), why, name);
    }
}
