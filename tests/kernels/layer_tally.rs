//! The kernels of routing statistics on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::refuses;
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
    refuses!(
        LayerTally {
            stats[unaligned], load[unaligned], flags[unaligned], fractions[unaligned], offsets[unaligned];
            first_non_finite: Pointer::good(), fault: Pointer::good(), mean_entropy: Pointer::good(),
            entropy_parts: None, tokens: 4, first_token: 0, parts: 0, experts: 8,
            trains: true, first_of_stats: false, first_of_step: false, over_step: false
        }
        OUT_OF_RANGE { experts: 0, 257; tokens: 0; first_token: 1 << 31 }
    );
    refuses!(
        RemoeFractions {
            fractions[unaligned], lambda[unaligned], offsets[unaligned];
            slots: 8, experts: 4
        }
        OUT_OF_RANGE { slots: 0; experts: 257 }
    );
    refuses!(
        RemoeUpdate {
            lambda[unaligned], load[unaligned];
            layers: 1, experts: 8, top_k: 2, factor: 1.2
        }
        OUT_OF_RANGE { layers: 0; top_k: 9; factor: 0.5, f64::NAN }
    );
}
