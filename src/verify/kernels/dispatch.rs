//! Checks dispatch (`kernels/dispatch.cu`) against a counting sort: every index in every output must be equal.

use super::numbers::{Errors, Random};
use super::{Buffer, Case, Problem, each, exactly, launch_of};
use crate::error::Result;
use crate::kernels::bindings::{ROUTEGRAD_FAULT_CAPACITY, ROUTEGRAD_FAULT_EXPERT};
use crate::kernels::launchers;
use crate::kernels::{DispatchChoices, DispatchPositive, dispatch};

/// How the experts of the slots in a batch are determined.
#[derive(Clone)]
pub enum Named {
    /// Given choices.
    Choices {
        /// Number of slots K per token.
        per_token: usize,
        /// Expert of each slot `[T, K]`; a number out of range is an error of the batch.
        experts_of: Vec<i32>,
    },
    /// Experts with a positive score; all experts if there are no scores.
    Positive(Option<Vec<f32>>),
}

/// Tokens and the experts that they choose.
#[derive(Clone)]
pub struct Batch {
    /// Number of tokens T.
    pub tokens: usize,
    /// Number of experts E.
    pub experts: usize,
    /// The experts of the slots.
    pub named: Named,
    /// Number of rows for which the outputs have room.
    pub capacity: usize,
}

impl Batch {
    /// Returns the number of slots per token.
    pub fn width(&self) -> usize {
        match &self.named {
            Named::Choices { per_token, .. } => *per_token,
            Named::Positive(_) => self.experts,
        }
    }

    /// Returns the expert of each slot; `None` for slots without an expert.
    fn slots(&self) -> Vec<Option<usize>> {
        match &self.named {
            Named::Choices { experts_of, .. } => experts_of
                .iter()
                .map(|&e| usize::try_from(e).ok().filter(|&e| e < self.experts))
                .collect(),
            Named::Positive(scores) => (0..self.tokens * self.experts)
                .map(|s| match scores {
                    Some(scores) if !(scores[s] > 0.0) => None,
                    _ => Some(s % self.experts),
                })
                .collect(),
        }
    }

    /// Each token chooses `per_token` different random experts.
    pub fn random(tokens: usize, experts: usize, per_token: usize, seed: u64) -> Self {
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

    /// Scores are positive with probability `share`.
    pub fn random_scores(tokens: usize, experts: usize, share: f64, seed: u64) -> Self {
        let mut random = Random(seed);
        let others = [0.0, -0.0, -1.5, f32::NAN, f32::NEG_INFINITY];
        let scores = (0..tokens * experts).map(|_| {
            if random.unit() < share {
                [f32::from_bits(1), 0.5, f32::INFINITY][random.below(3)]
            } else {
                others[random.below(others.len())]
            }
        });
        Self {
            named: Named::Positive(Some(scores.collect())),
            ..Self::all(tokens, experts)
        }
    }

    /// Every token chooses every expert.
    pub fn all(tokens: usize, experts: usize) -> Self {
        Self {
            tokens,
            experts,
            named: Named::Positive(None),
            capacity: tokens * experts,
        }
    }

    /// Replaces each chosen expert by `map` of it.
    pub fn map_experts(mut self, map: impl Fn(i32) -> i32) -> Self {
        if let Named::Choices { experts_of, .. } = &mut self.named {
            experts_of.iter_mut().for_each(|e| *e = map(*e));
        }
        self
    }

    /// Replaces the number of rows for which the outputs have room.
    pub fn with_capacity(self, capacity: usize) -> Self {
        Self { capacity, ..self }
    }

    /// Describes the batch, for messages.
    pub fn label(&self) -> String {
        let (width, capacity) = (self.width(), self.capacity);
        format!(
            "{} tokens, {} experts, {width} slots a token, capacity {capacity}",
            self.tokens, self.experts
        )
    }

    /// Returns the reference result of a counting sort.
    pub fn sorted(&self) -> Sorted {
        let (width, slots) = (self.width(), self.slots());
        let mut sorted = Sorted {
            offsets: vec![0],
            row_token: vec![-1; self.capacity],
            row_slot: vec![-1; self.capacity],
            slot_row: vec![-1; slots.len()],
            fault: 0,
        };
        let mut row = 0;
        for expert in 0..self.experts {
            for (slot, _) in slots
                .iter()
                .enumerate()
                .filter(|(_, named)| **named == Some(expert))
            {
                if row < self.capacity {
                    sorted.row_token[row] = (slot / width) as i32;
                    sorted.row_slot[row] = slot as i32;
                    sorted.slot_row[slot] = row as i32;
                } else {
                    sorted.fault |= ROUTEGRAD_FAULT_CAPACITY as i32;
                }
                row += 1;
            }
            sorted.offsets.push(row.min(self.capacity) as i32);
        }
        if matches!(self.named, Named::Choices { .. }) && slots.contains(&None) {
            sorted.fault |= ROUTEGRAD_FAULT_EXPERT as i32;
        }
        sorted
    }

    /// Returns the launch. Outputs: offsets, row_token, row_slot, slot_row, fault.
    ///
    /// # Errors
    /// When the kernel does not support the sizes.
    pub fn problem(&self) -> Result<Problem> {
        let (width, capacity) = (self.width(), self.capacity);
        // The size is computed by a pure host function, which is the same in every build.
        let workspace = dispatch::workspace(launchers::sim()?, self.tokens, self.experts, width)?;
        let named = match &self.named {
            Named::Choices { experts_of, .. } => Buffer::input("choices", experts_of),
            Named::Positive(Some(scores)) => Buffer::input("scores", scores),
            Named::Positive(None) => Buffer::input("no scores", &[f32::NAN]),
        };
        let buffers = vec![
            Buffer::output("offsets", (self.experts + 1) * 4),
            Buffer::output("row_token", capacity * 4),
            Buffer::output("row_slot", capacity * 4),
            Buffer::output("slot_row", self.tokens * width * 4),
            Buffer::changed("fault", &[0i32]),
            Buffer::workspace("workspace", workspace),
            named,
        ];
        let (tokens, experts) = (self.tokens, self.experts);
        let all = matches!(self.named, Named::Positive(None));
        let want = self.sorted();
        Ok(Problem {
            label: self.label(),
            buffers,
            launch: match self.named {
                Named::Choices { .. } => launch_of!(DispatchChoices {
                    offsets, row_token, row_slot, slot_row, fault, workspace, choices;
                    tokens, experts, choices_per_token: width, row_capacity: capacity,
                }),
                Named::Positive(_) => launch_of!(DispatchPositive {
                    offsets, row_token, row_slot, slot_row, fault, workspace, scores if !all;
                    tokens, experts, row_capacity: capacity,
                }),
            },
            judge: Box::new(move |out| {
                let columns = [
                    &want.offsets,
                    &want.row_token,
                    &want.row_slot,
                    &want.slot_row,
                    &vec![want.fault],
                ];
                let names = ["offsets", "row_token", "row_slot", "slot_row", "fault"];
                let mut errors = Errors::default();
                for ((name, out), want) in names.into_iter().zip(out).zip(columns) {
                    errors.merge(exactly::<i32>(name, out, |i| want[i])?);
                }
                Ok(errors)
            }),
        })
    }
}

/// The outputs of dispatch. Entries of `row_token` and `row_slot` after offsets\[E\] keep the poison value, −1.
#[derive(PartialEq, Debug)]
pub struct Sorted {
    /// First row of each expert, and the number of rows `[E + 1]`.
    pub offsets: Vec<i32>,
    /// Token of each row `[R]`.
    pub row_token: Vec<i32>,
    /// Slot of each row `[R]`.
    pub row_slot: Vec<i32>,
    /// Row of each slot `[T, K]`.
    pub slot_row: Vec<i32>,
    /// Bits `ROUTEGRAD_FAULT_...`; 0 without a fault.
    pub fault: i32,
}

/// Batches that every build runs under every schedule.
pub fn small_batches() -> Vec<Batch> {
    vec![
        Batch::random(1, 1, 1, 1),
        Batch::random(1, 8, 2, 2),
        Batch::random(101, 7, 7, 3),
        Batch::random(700, 32, 4, 4),
        Batch::random_scores(67, 33, 0.3, 5),
        Batch::all(19, 7),
    ]
}

/// Numbers of experts and choices up to the limits, and more slots than one block processes.
pub fn covering_batches() -> Vec<Batch> {
    let mut all: Vec<Batch> = [
        (1, 1),
        (7, 1),
        (8, 2),
        (32, 4),
        (64, 16),
        (128, 2),
        (256, 4),
        (8, 8),
    ]
    .into_iter()
    .map(|(experts, per_token)| Batch::random(2039, experts, per_token, experts as u64))
    .collect();
    all.push(Batch::random(61, 128, 128, 9));
    all.push(Batch::random(40_000, 64, 2, 10));
    all.extend(
        [
            (1, 1, 1.0),
            (1, 8, 0.0),
            (130, 7, 0.5),
            (257, 64, 0.1),
            (33, 256, 1.0),
        ]
        .map(|(tokens, experts, share)| Batch::random_scores(tokens, experts, share, 11)),
    );
    all.extend([Batch::all(1, 1), Batch::all(700, 64)]);
    all
}

/// Experts without rows, choices out of range, rows beyond the capacity.
pub fn edge_batches() -> Vec<Batch> {
    let mut all = vec![
        Batch::random(300, 16, 2, 12).map_experts(|e| e / 2 * 2),
        Batch::random(300, 16, 1, 13).map_experts(|_| 5),
        Batch::random(300, 16, 1, 14).map_experts(|_| 15),
        Batch::random_scores(67, 33, 0.3, 5).with_capacity(40),
    ];
    all.extend([-1, 16, 255, 256, i32::MIN, i32::MAX].map(|wrong| {
        Batch::random(300, 16, 2, 15).map_experts(|e| if e == 3 { wrong } else { e })
    }));
    all.extend(
        [1, 50, 599, 600, 700]
            .map(|capacity| Batch::random(300, 16, 2, 16).with_capacity(capacity)),
    );
    all
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, batches, small) in [
        ("small", small_batches(), true),
        ("edges", edge_batches(), true),
        ("covering", covering_batches(), false),
    ] {
        for (launcher, by_choice) in [("dispatch_choices", true), ("dispatch_positive", false)] {
            let mut batches = batches.clone();
            batches.retain(|b| matches!(b.named, Named::Choices { .. }) == by_choice);
            let problems = each(batches, |batch| batch.problem());
            cases.push(Case::new(launcher, "dispatch", name, small, problems));
        }
    }
    cases
}
