//! The gates' gradient on the simulator: every case of the library, every schedule, exact counts of work and bytes,
//! refusals.

use crate::support::refusals::refuses;
use crate::support::schedules::counted;
use crate::support::{check_cases, check_schedules, counts_agree, outputs};
use routegrad::kernels::cost::{Cost, Sizes};
use routegrad::kernels::{DefaultDots, GateGradient};
use routegrad::verify::kernels::dispatch::Batch;
use routegrad::verify::kernels::gate_gradient::{Inputs, Kind, problem};
use std::sync::Arc;

const LAUNCHERS: [&str; 2] = ["gate_gradient", "default_dots"];

#[test]
fn every_gate_is_within_the_rounding_of_its_sum_and_rows_are_those_of_their_tokens() {
    LAUNCHERS.into_iter().for_each(check_cases);
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    LAUNCHERS.into_iter().for_each(check_schedules);
}

#[test]
fn work_and_bytes_are_those_of_the_formula() {
    // One tile of tokens: the vectors are read once a tile.
    for (experts, slots, hidden) in [(8, 1, 1024), (32, 4, 1032), (64, 2, 512)] {
        for kind in [Kind::Chosen, Kind::Dots, Kind::DotsAndRows] {
            let sizes = Sizes {
                tokens: 128,
                hidden,
                ffn: 0,
                experts,
                slots,
                rows: 128 * slots,
            };
            let batch = Batch::random(sizes.tokens, experts, slots, 2);
            let inputs = Inputs::new(batch, hidden, 22, kind);
            let dots = match kind {
                Kind::Chosen => Cost::default(),
                _ => DefaultDots::cost(&sizes, kind == Kind::DotsAndRows),
            };
            let mut cost = dots + GateGradient::cost(&sizes, kind != Kind::Chosen, 22);
            // Each gate's thread looks its expert up: the choices come again, from cache, until it is found.
            let looked_at = slots * (experts - slots) + slots * (slots + 1) / 2;
            cost.bytes += (4 * sizes.tokens * (looked_at - slots)) as f64;
            counts_agree(&problem(&Arc::new(inputs)), cost);
        }
    }
}

/// Three blocks read the same tokens for their experts; one of them stores the rows.
#[test]
fn rows_are_stored_once_however_many_experts_there_are() {
    let (tokens, experts, slots, hidden) = (130, 140, 3, 72);
    let batch = Batch::random(tokens, experts, slots, 3);
    let inputs = Inputs::new(batch, hidden, 2, Kind::DotsAndRows);
    let problem = problem(&Arc::new(inputs));
    let written = counted(|| drop(outputs(&problem))).bytes_written as usize;
    let rows = tokens * slots;
    assert_eq!(written, 4 * tokens * experts + 2 * rows * hidden + 4 * rows);
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    // Rows want their slots, and slots their rows.
    refuses!(
        DefaultDots {
            dgates, g_rows, g, vectors, slot_row;
            tokens: 4, rows: 8, experts: 8, hidden: 64, slots: 2
        }
        OUT_OF_RANGE { tokens: 0, 1 << 31; rows: 0, 1 << 31; experts: 0, 257; hidden: 0; slots: 0, 9 }
        OVERFLOW { tokens: 1 << 30 }
        NOT_MULTIPLE { hidden: 36 }
    );
    refuses!(
        GateGradient {
            dgates, dots, slot_row, choices[optional];
            tokens: 4, rows: 8, experts: 8, slots: 2, dot_columns: 3, keep: true
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; rows: 0, 1 << 31; experts: 0, 257; slots: 0, 9; dot_columns: 0;
            // Without choices every expert is a slot.
            [choices: None] slots: 2
        }
        OVERFLOW { tokens: 1 << 30 }
    );
}
