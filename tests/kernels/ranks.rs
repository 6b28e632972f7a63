//! Sums over ranks on the simulator: every case of the library, every schedule, refusals.

use crate::support::refusals::refuses;
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
    refuses!(
        RankSums { out[unaligned], rows[unaligned]; ranks: 2, stride: 8, elements: 8 }
        OUT_OF_RANGE { ranks: 0, 5000; stride: 7; elements: 0 }
    );
    refuses!(
        RankFlags { flags[unaligned], rows[unaligned]; ranks: 2, layers: 2 }
        OUT_OF_RANGE { ranks: 0; layers: 0 }
    );
    refuses!(
        LoadShares { fractions[unaligned], load[unaligned]; experts: 8 }
        OUT_OF_RANGE { experts: 257 }
    );
}
