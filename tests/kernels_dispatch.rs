//! Dispatch on the simulator against a counting sort in Rust: every index, every schedule, and what it refuses.

mod support;

use routegrad::device::bindings::{ROUTEGRAD_FAULT_CAPACITY, ROUTEGRAD_FAULT_EXPERT};
use routegrad::launch;
use std::ptr::null_mut;
use support::guarded::{Guarded, POISON};
use support::numbers::Random;
use support::schedules::{counted, is_plain, schedules, table};

/// What every slot of a batch names.
#[derive(Clone)]
enum Named {
    Choices {
        per_token: usize,
        experts_of: Vec<i32>,
    },
    Mask(Vec<u8>),
}

#[derive(Clone)]
struct Batch {
    tokens: usize,
    experts: usize,
    named: Named,
    capacity: usize,
}

impl Batch {
    fn width(&self) -> usize {
        match &self.named {
            Named::Choices { per_token, .. } => *per_token,
            Named::Mask(_) => self.experts,
        }
    }

    /// The expert of each slot, where it has one.
    fn slots(&self) -> Vec<Option<usize>> {
        match &self.named {
            Named::Choices { experts_of, .. } => experts_of
                .iter()
                .map(|&e| usize::try_from(e).ok().filter(|&e| e < self.experts))
                .collect(),
            Named::Mask(mask) => mask
                .iter()
                .enumerate()
                .map(|(s, &m)| (m != 0).then_some(s % self.experts))
                .collect(),
        }
    }

    /// `per_token` different experts for each token, at random.
    fn random(tokens: usize, experts: usize, per_token: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut all: Vec<i32> = (0..experts as i32).collect();
        let mut experts_of = Vec::new();
        for _ in 0..tokens {
            random.shuffle(&mut all);
            experts_of.extend(&all[..per_token]);
        }
        Self {
            tokens,
            experts,
            named: Named::Choices {
                per_token,
                experts_of,
            },
            capacity: tokens * per_token,
        }
    }

    /// Every (token, expert) with probability `share`.
    fn random_mask(tokens: usize, experts: usize, share: f64, seed: u64) -> Self {
        let mut random = Random(seed);
        let mask = (0..tokens * experts).map(|_| {
            if random.unit() < share {
                1 + random.below(255) as u8
            } else {
                0
            }
        });
        Self {
            tokens,
            experts,
            named: Named::Mask(mask.collect()),
            capacity: tokens * experts,
        }
    }

    fn map_experts(mut self, map: impl Fn(i32) -> i32) -> Self {
        if let Named::Choices { experts_of, .. } = &mut self.named {
            experts_of.iter_mut().for_each(|e| *e = map(*e));
        }
        self
    }

    fn label(&self) -> String {
        format!(
            "{} tokens, {} experts, {} slots a token, capacity {}",
            self.tokens,
            self.experts,
            self.width(),
            self.capacity
        )
    }
}

#[derive(PartialEq, Debug)]
struct Sorted {
    offsets: Vec<i32>,
    row_token: Vec<i32>,
    row_slot: Vec<i32>,
    slot_row: Vec<i32>,
    fault: i32,
}

fn reference(batch: &Batch) -> Sorted {
    let (width, slots) = (batch.width(), batch.slots());
    let mut sorted = Sorted {
        offsets: vec![0],
        row_token: vec![-1; batch.capacity],
        row_slot: vec![-1; batch.capacity],
        slot_row: vec![-1; slots.len()],
        fault: 0,
    };
    let mut row = 0;
    for expert in 0..batch.experts {
        for (slot, _) in slots
            .iter()
            .enumerate()
            .filter(|(_, named)| **named == Some(expert))
        {
            if row < batch.capacity {
                sorted.row_token[row] = (slot / width) as i32;
                sorted.row_slot[row] = slot as i32;
                sorted.slot_row[slot] = row as i32;
            } else {
                sorted.fault |= ROUTEGRAD_FAULT_CAPACITY as i32;
            }
            row += 1;
        }
        sorted.offsets.push(row.min(batch.capacity) as i32);
    }
    if matches!(batch.named, Named::Choices { .. }) && slots.contains(&None) {
        sorted.fault |= ROUTEGRAD_FAULT_EXPERT as i32;
    }
    sorted
}

fn run(batch: &Batch) -> Sorted {
    let (width, slots) = (batch.width(), batch.tokens * batch.width());
    let mut bytes = 0u64;
    // Safety: one u64 is written.
    unsafe {
        launch!(
            table(),
            dispatch_workspace(
                &mut bytes,
                batch.tokens as i64,
                batch.experts as i32,
                width as i32
            )
        )
    }
    .unwrap_or_else(|e| panic!("{e}"));
    let mut offsets = Guarded::<i32>::poisoned(batch.experts + 1);
    let mut row_token = Guarded::<i32>::poisoned(batch.capacity);
    let mut row_slot = Guarded::<i32>::poisoned(batch.capacity);
    let mut slot_row = Guarded::<i32>::poisoned(slots);
    let mut fault = Guarded::<i32>::from_slice(&[0]);
    let mut workspace = Guarded::<u8>::poisoned(bytes as usize);
    let (tokens, experts, capacity) = (
        batch.tokens as i64,
        batch.experts as i32,
        batch.capacity as i64,
    );
    // Safety: every buffer has the size that the launcher's header states.
    let launched = unsafe {
        match &batch.named {
            Named::Choices {
                per_token,
                experts_of,
            } => {
                let choices = Guarded::from_slice(experts_of);
                launch!(
                    table(),
                    dispatch_choices(
                        offsets.as_mut_ptr(),
                        row_token.as_mut_ptr(),
                        row_slot.as_mut_ptr(),
                        slot_row.as_mut_ptr(),
                        fault.as_mut_ptr(),
                        workspace.as_mut_ptr().cast(),
                        choices.as_ptr(),
                        tokens,
                        experts,
                        *per_token as i32,
                        capacity,
                        null_mut(),
                    )
                )
            }
            Named::Mask(mask) => {
                let mask = Guarded::from_slice(mask);
                launch!(
                    table(),
                    dispatch_mask(
                        offsets.as_mut_ptr(),
                        row_token.as_mut_ptr(),
                        row_slot.as_mut_ptr(),
                        slot_row.as_mut_ptr(),
                        fault.as_mut_ptr(),
                        workspace.as_mut_ptr().cast(),
                        mask.as_ptr(),
                        tokens,
                        experts,
                        capacity,
                        null_mut(),
                    )
                )
            }
        }
    };
    launched.unwrap_or_else(|e| panic!("{}: {e}", batch.label()));
    for (name, buffer) in [
        ("offsets", &offsets),
        ("row_token", &row_token),
        ("row_slot", &row_slot),
        ("slot_row", &slot_row),
        ("fault", &fault),
    ] {
        buffer.check_guards(name);
    }
    workspace.check_guards("workspace");
    Sorted {
        offsets: offsets.as_slice().to_vec(),
        row_token: row_token.as_slice().to_vec(),
        row_slot: row_slot.as_slice().to_vec(),
        slot_row: slot_row.as_slice().to_vec(),
        fault: fault.as_slice()[0],
    }
}

fn check(batch: &Batch) {
    assert_eq!(run(batch), reference(batch), "{}", batch.label());
}

/// Shapes that every build runs, under every schedule.
fn small_batches() -> Vec<Batch> {
    vec![
        Batch::random(1, 1, 1, 1),
        Batch::random(1, 8, 2, 2),
        Batch::random(101, 7, 7, 3),
        Batch::random(700, 32, 4, 4),
        Batch::random_mask(67, 33, 0.3, 5),
    ]
}

#[test]
fn rows_are_sorted_by_expert_then_token_for_any_shape() {
    small_batches().iter().for_each(check);
    if !is_plain() {
        return;
    }
    for (experts, per_token) in [
        (1, 1),
        (7, 1),
        (8, 2),
        (32, 4),
        (64, 16),
        (128, 2),
        (256, 4),
        (8, 8),
    ] {
        check(&Batch::random(2039, experts, per_token, experts as u64));
    }
    check(&Batch::random(61, 128, 128, 9));
    check(&Batch::random(40_000, 64, 2, 10)); // more slots than one block's share
}

#[test]
fn a_token_may_have_any_number_of_experts() {
    for (tokens, experts, share) in [
        (1, 1, 1.0),
        (1, 8, 0.0),
        (130, 7, 0.5),
        (257, 64, 0.1),
        (33, 256, 1.0),
    ] {
        if is_plain() || tokens * experts < 2000 {
            check(&Batch::random_mask(tokens, experts, share, 11));
        }
    }
}

#[test]
fn half_of_the_experts_or_all_but_one_may_be_empty() {
    check(&Batch::random(300, 16, 2, 12).map_experts(|e| e / 2 * 2));
    check(&Batch::random(300, 16, 1, 13).map_experts(|_| 5));
    check(&Batch::random(300, 16, 1, 14).map_experts(|_| 15));
}

#[test]
fn an_expert_out_of_range_raises_the_flag_and_gets_no_row() {
    for wrong in [-1, 16, 255, 256, i32::MIN, i32::MAX] {
        let batch = Batch::random(300, 16, 2, 15).map_experts(|e| if e == 3 { wrong } else { e });
        check(&batch);
        assert_eq!(run(&batch).fault, ROUTEGRAD_FAULT_EXPERT as i32);
    }
}

#[test]
fn rows_past_the_capacity_raise_the_flag_and_are_written_nowhere() {
    for capacity in [1, 50, 599] {
        let batch = Batch {
            capacity,
            ..Batch::random(300, 16, 2, 16)
        };
        check(&batch);
        assert_eq!(run(&batch).fault, ROUTEGRAD_FAULT_CAPACITY as i32);
    }
    let exact = Batch {
        capacity: 600,
        ..Batch::random(300, 16, 2, 16)
    };
    assert_eq!(run(&exact).fault, 0);
    let mask = Batch {
        capacity: 40,
        ..Batch::random_mask(67, 33, 0.3, 5)
    };
    check(&mask);
    // Entries past offsets[E] keep what they held.
    let roomy = Batch {
        capacity: 700,
        ..Batch::random(300, 16, 2, 16)
    };
    assert!(
        run(&roomy).row_token[600..]
            .iter()
            .all(|&t| t == i32::from_ne_bytes([POISON; 4]))
    );
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for batch in small_batches() {
        let first = reference(&batch);
        for schedule in schedules() {
            assert_eq!(
                schedule.run(|| run(&batch)),
                first,
                "{} under {schedule:?}",
                batch.label()
            );
        }
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    struct Call {
        pointers: [usize; 7], // offsets, row_token, row_slot, slot_row, fault, workspace, choices
        tokens: i64,
        experts: i32,
        per_token: i32,
        capacity: i64,
    }
    let mut room = Guarded::<i32>::poisoned(64);
    let good = room.as_mut_ptr() as usize;
    let call = |change: &dyn Fn(&mut Call)| {
        let mut a = Call {
            pointers: [good; 7],
            tokens: 4,
            experts: 8,
            per_token: 2,
            capacity: 8,
        };
        change(&mut a);
        let p = a.pointers;
        // Safety: only refused calls are made, which touch no memory.
        unsafe {
            launch!(
                table(),
                dispatch_choices(
                    p[0] as *mut i32,
                    p[1] as *mut i32,
                    p[2] as *mut i32,
                    p[3] as *mut i32,
                    p[4] as *mut i32,
                    p[5] as *mut _,
                    p[6] as *const i32,
                    a.tokens,
                    a.experts,
                    a.per_token,
                    a.capacity,
                    null_mut(),
                )
            )
        }
    };
    let refused = |change: &dyn Fn(&mut Call), why: &str, name: &str| {
        let mut text = String::new();
        let launches = counted(|| text = call(change).expect_err(name).to_string()).launches;
        assert!(
            text.contains(&format!("argument `{name}` {why}")),
            "{name} {why}: {text}"
        );
        assert_eq!(launches, 0, "{name}: something was launched");
    };
    for (i, name) in [
        "offsets",
        "row_token",
        "row_slot",
        "slot_row",
        "fault",
        "workspace",
        "choices",
    ]
    .iter()
    .enumerate()
    {
        refused(&|a| a.pointers[i] = 0, "is a null pointer", name);
        refused(&|a| a.pointers[i] += 2, "is not 16-byte aligned", name);
    }
    let out_of_range = "is outside what the kernel can do";
    refused(&|a| a.tokens = 0, out_of_range, "tokens");
    refused(&|a| a.experts = 0, out_of_range, "experts");
    refused(&|a| a.experts = 257, out_of_range, "experts");
    refused(&|a| a.per_token = 0, out_of_range, "choices_per_token");
    refused(&|a| a.per_token = 9, out_of_range, "choices_per_token");
    refused(&|a| a.capacity = 0, out_of_range, "row_capacity");
    refused(&|a| a.capacity = 1 << 31, out_of_range, "row_capacity");
    refused(
        &|a| a.tokens = 1 << 30,
        "makes a product of sizes overflow",
        "tokens",
    );
}
