//! A routed batch for the kernels after dispatch: the choices of the tokens, the positions of their rows, and the gates.

use super::Buffer;
use super::dispatch::{Batch, Named, Sorted};
use super::numbers::Random;

/// Tokens with their slots, rows and gates.
pub struct Routed {
    /// The choices of the tokens.
    pub batch: Batch,
    /// The outputs of dispatch.
    pub sorted: Sorted,
    /// `[T, E]`, in (0, 1].
    pub gates: Vec<f32>,
    /// Number of rows passed to the launchers; rows after the last actual one belong to no token.
    pub rows_given: usize,
}

impl Routed {
    /// The choices of a token are in increasing order, as the router writes them.
    pub fn new(mut batch: Batch) -> Self {
        if let Named::Choices {
            per_token,
            experts_of,
        } = &mut batch.named
        {
            experts_of
                .chunks_mut(*per_token)
                .for_each(<[i32]>::sort_unstable);
        }
        let sorted = batch.sorted();
        let mut random = Random(batch.tokens as u64 * 31 + batch.experts as u64);
        let gates = (0..batch.tokens * batch.experts)
            .map(|_| random.unit() as f32)
            .collect();
        let rows_given = sorted.rows() + 3;
        Self {
            batch,
            sorted,
            gates,
            rows_given,
        }
    }

    /// Returns the number of tokens T.
    pub fn tokens(&self) -> usize {
        self.batch.tokens
    }
    /// Returns the number of experts E.
    pub fn experts(&self) -> usize {
        self.batch.experts
    }
    /// Returns the number of slots per token.
    pub fn slots(&self) -> usize {
        self.batch.width()
    }
    /// Returns whether there is a list of choices; without one, slot i is expert i.
    pub fn has_choices(&self) -> bool {
        matches!(self.batch.named, Named::Choices { .. })
    }

    /// Returns (row, expert) for each slot of the token that has a row.
    pub fn rows_of(&self, token: usize) -> impl Iterator<Item = (usize, usize)> {
        let width = self.slots();
        (token * width..(token + 1) * width).filter_map(move |slot| {
            let row = usize::try_from(self.sorted.slot_row[slot]).ok()?;
            let expert = match &self.batch.named {
                Named::Choices { experts_of, .. } => experts_of[slot] as usize,
                Named::Positive(_) => slot % width,
            };
            Some((row, expert))
        })
    }

    /// Returns, for each expert, the token's row.
    pub fn row_of_expert(&self, token: usize) -> Vec<Option<usize>> {
        let mut rows = vec![None; self.experts()];
        for (row, expert) in self.rows_of(token) {
            rows[expert] = Some(row);
        }
        rows
    }

    /// Returns `slot_row` and `choices` (one unused element if there is no list).
    pub fn slot_buffers(&self) -> [Buffer; 2] {
        let choices = match &self.batch.named {
            Named::Choices { experts_of, .. } => Buffer::input("choices", experts_of),
            Named::Positive(_) => Buffer::input("choices", &[-1i32]),
        };
        [Buffer::input("slot_row", &self.sorted.slot_row), choices]
    }

    /// Describes the batch, for messages.
    pub fn label(&self) -> String {
        let (width, rows) = (self.slots(), self.sorted.rows());
        format!(
            "{} tokens, {} experts, {width} slots a token, {rows} rows",
            self.tokens(),
            self.experts()
        )
    }
}

/// Every number of slots with and without a list, tokens without a row, experts without one, all tokens to one expert.
pub fn small_batches() -> Vec<Batch> {
    vec![
        Batch::random(1, 1, 1, 1),
        Batch::random(5, 7, 2, 2),
        Batch::random(70, 8, 8, 3),
        Batch::random(131, 16, 1, 4).map_experts(|e| e / 2 * 2),
        Batch::random(40, 24, 1, 5).map_experts(|_| 23),
        Batch::random(33, 20, 6, 6),
        Batch::random_scores(67, 33, 0.2, 7),
        Batch::random(9, 130, 3, 18),
    ]
}

/// Prime numbers of tokens, 1 to 256 experts.
pub fn covering_batches() -> Vec<Batch> {
    vec![
        Batch::random(2039, 1, 1, 8),
        Batch::random(2039, 7, 2, 9),
        Batch::random(2039, 8, 1, 10),
        Batch {
            experts: 32,
            ..Batch::random(1021, 16, 4, 11).map_experts(|e| 2 * e)
        },
        Batch::random(509, 64, 16, 12),
        Batch::random(257, 128, 2, 13),
        Batch::random(127, 256, 5, 14),
        Batch::random(61, 96, 96, 15),
        Batch::random_scores(200, 256, 0.05, 16),
        Batch::random_scores(130, 8, 0.0, 17),
    ]
}

impl Sorted {
    /// Returns the number of rows of all experts.
    pub fn rows(&self) -> usize {
        self.offsets.last().map_or(0, |&rows| rows as usize)
    }
}
