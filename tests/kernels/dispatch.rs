//! Dispatch on the simulator: every case of the library, what its flags mean, and what it refuses.

use crate::support::refusals::refuses;
use crate::support::{check_cases, check_schedules, counts_agree, outputs};
use routegrad::kernels::DispatchChoices;
use routegrad::kernels::bindings::{ROUTEGRAD_FAULT_CAPACITY, ROUTEGRAD_FAULT_EXPERT};
use routegrad::kernels::cost::Sizes;
use routegrad::verify::kernels::dispatch::{Batch, edge_batches};
use routegrad::verify::kernels::values;

#[test]
fn rows_are_sorted_by_expert_then_token_for_any_shape() {
    check_cases("dispatch_choices");
}

#[test]
fn a_token_may_have_any_number_of_experts() {
    check_cases("dispatch_positive");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    check_schedules("dispatch_choices");
    check_schedules("dispatch_positive");
}

/// Offsets, row → token, and the flag.
fn run(batch: &Batch) -> (Vec<i32>, Vec<i32>, u32) {
    let problem = batch.problem().unwrap_or_else(|e| panic!("{e}"));
    let out = outputs(&problem);
    (
        values(&out[0]),
        values(&out[1]),
        values::<i32>(&out[4])[0] as u32,
    )
}

#[test]
fn an_expert_out_of_range_raises_the_flag_and_gets_no_row() {
    for wrong in [-1, 16, i32::MAX] {
        let batch = Batch::random(300, 16, 2, 15).map_experts(|e| if e == 3 { wrong } else { e });
        let (offsets, _, fault) = run(&batch);
        assert_eq!(fault, ROUTEGRAD_FAULT_EXPERT);
        assert!(offsets[3] == offsets[4] && offsets[16] < 600);
    }
}

#[test]
fn rows_past_the_capacity_raise_the_flag_and_are_written_nowhere() {
    for (capacity, want) in [
        (1, ROUTEGRAD_FAULT_CAPACITY),
        (599, ROUTEGRAD_FAULT_CAPACITY),
        (600, 0),
    ] {
        let (offsets, _, fault) = run(&Batch::random(300, 16, 2, 16).with_capacity(capacity));
        assert_eq!((fault, offsets[16]), (want, capacity as i32));
    }
    // Entries past offsets[E] keep what they held.
    let (_, row_token, _) = run(&Batch::random(300, 16, 2, 16).with_capacity(700));
    assert!(row_token[..600].iter().all(|&t| t >= 0) && row_token[600..].iter().all(|&t| t == -1));
}

#[test]
fn the_cases_hold_empty_experts_and_both_flags() {
    let sorted: Vec<_> = edge_batches().iter().map(Batch::sorted).collect();
    for fault in [ROUTEGRAD_FAULT_EXPERT, ROUTEGRAD_FAULT_CAPACITY] {
        assert!(sorted.iter().any(|s| s.fault == fault as i32));
    }
    assert!(
        sorted
            .iter()
            .any(|s| s.offsets.windows(2).filter(|o| o[0] == o[1]).count() == 15)
    );
}

#[test]
fn bytes_are_those_of_the_formula() {
    let sizes = Sizes {
        tokens: 9000,
        hidden: 0,
        ffn: 0,
        experts: 8,
        slots: 2,
        rows: 18_000,
    };
    let batch = Batch::random(sizes.tokens, sizes.experts, sizes.slots, 1);
    let mut cost = DispatchChoices::cost(&sizes);
    // The scatter reads its choices a second time, from cache.
    cost.bytes += (4 * sizes.tokens * sizes.slots) as f64;
    counts_agree(&batch.problem().unwrap_or_else(|e| panic!("{e}")), cost);
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        DispatchChoices {
            offsets, row_token, row_slot, slot_row, fault, workspace, choices;
            tokens: 4, experts: 8, choices_per_token: 2, row_capacity: 8
        }
        OUT_OF_RANGE { tokens: 0; experts: 0, 257; choices_per_token: 0, 9; row_capacity: 0, 1 << 31 }
        OVERFLOW { tokens: 1 << 30 }
    );
}
