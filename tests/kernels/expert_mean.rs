//! Expert sums and means on the simulator: every case of the library, every schedule, exact counts of bytes, refusals.

use crate::support::refusals::refuses;
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
    refuses!(
        ExpertSums {
            sums, masses, column_sums, gates[optional], offsets, row_token;
            rows: 4, tokens: 4, experts: 8, hidden: 64
        }
        OUT_OF_RANGE { rows: 0, 1 << 31; tokens: 0; experts: 0, 257; hidden: 0 }
        NOT_MULTIPLE { hidden: 12 }
    );
    refuses!(
        ExpertMean {
            average, column_sums, gates, offsets, row_token, beta[unaligned];
            rows: 4, tokens: 4, experts: 8, hidden: 64, weighting: ROUTEGRAD_WEIGHTING_SUM_P as i32
        }
        OUT_OF_RANGE { rows: 0; tokens: 0; experts: 257; weighting: 3 }
        NOT_MULTIPLE { hidden: 12 }
    );
    refuses!(
        ExpertMeanUpdate {
            average, sums, masses, beta[unaligned];
            experts: 8, hidden: 64, weighting: 0
        }
        OUT_OF_RANGE { experts: 0, 257; hidden: 0; weighting: -1, 3 }
        NOT_MULTIPLE { hidden: 20 }
    );
}
