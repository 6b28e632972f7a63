//! Token sequences of equal length, and where their documents begin.

use crate::error::{Error, Result};

/// Sequences of S + 1 tokens: S inputs, and for each input the token that follows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[sequences, S + 1]`, row-major.
    pub tokens: Vec<i32>,
    /// B, the number of sequences.
    pub sequences: usize,
    /// `[sequences, S]`: for each input, the index within its sequence at which its document begins. None if
    /// attention ignores document boundaries.
    pub first_key: Option<Vec<i32>>,
}

impl Batch {
    /// Returns all sequences.
    pub fn all(&self) -> Sequences<'_> {
        Sequences {
            tokens: &self.tokens,
            count: self.sequences,
            first_key: self.first_key.as_deref(),
        }
    }

    /// Iterates over the sequences in chunks of at most `most` > 0.
    pub fn chunks(&self, most: usize) -> impl Iterator<Item = Sequences<'_>> {
        let width = self.tokens.len() / self.sequences.max(1);
        (0..self.sequences).step_by(most).map(move |first| {
            let count = most.min(self.sequences - first);
            let rows = |row: usize| first * row..(first + count) * row;
            Sequences {
                tokens: &self.tokens[rows(width)],
                count,
                first_key: self.first_key.as_ref().map(|f| &f[rows(width - 1)]),
            }
        })
    }
}

/// Sequences of a [`Batch`].
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// `[count, S + 1]`.
    pub tokens: &'a [i32],
    /// Number of sequences.
    pub count: usize,
    /// `[count, S]`: see [`Batch::first_key`]; none if attention ignores document boundaries.
    pub first_key: Option<&'a [i32]>,
}

impl<'a> Sequences<'a> {
    /// Wraps `count` sequences without document boundaries.
    pub fn new(tokens: &'a [i32], count: usize) -> Self {
        Sequences {
            tokens,
            count,
            first_key: None,
        }
    }

    /// Checks the sequences and returns S.
    ///
    /// # Errors
    /// Returns an error when there is no sequence, a sequence has fewer than two tokens, the sequences differ in
    /// length, a row's `first_key` is greater than its index, or `first_key` decreases from one row to the next.
    pub fn length(&self) -> Result<usize> {
        let width = self.tokens.len() / self.count.max(1);
        if self.count == 0 || width < 2 || width * self.count != self.tokens.len() {
            return Err(Error::invalid(
                "model",
                "at least one sequence of at least two tokens, all of one length",
                format!("{} tokens for {} sequences", self.tokens.len(), self.count),
                "pass [sequences, S + 1] tokens",
            ));
        }
        let length = width - 1;
        let Some(first_key) = self.first_key else {
            return Ok(length);
        };
        let in_order = |sequence: &[i32]| {
            let mut before = 0;
            sequence.iter().zip(0..).all(|(&first, row)| {
                let fits = (before..=row).contains(&first);
                before = first;
                fits
            })
        };
        if first_key.len() == length * self.count && first_key.chunks(length).all(in_order) {
            return Ok(length);
        }
        Err(Error::invalid(
            "model",
            format!(
                "for each of {} x {length} inputs the first token of its document, at or before it",
                self.count
            ),
            format!("{} numbers, or some out of order", first_key.len()),
            "pass first_key [sequences, S], which never decreases within a sequence",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_every_sequence_once_with_its_boundaries() {
        let batch = Batch {
            tokens: (0..15).collect(),
            sequences: 5,
            first_key: Some((0..10).map(|i| i % 2).collect()),
        };
        let chunks: Vec<_> = batch.chunks(2).collect();
        let counts: Vec<usize> = chunks.iter().map(|c| c.count).collect();
        assert_eq!(counts, [2, 2, 1]);
        let tokens: Vec<&[i32]> = chunks.iter().map(|c| c.tokens).collect();
        assert_eq!(tokens.concat(), batch.tokens);
        let keys: Vec<&[i32]> = chunks.iter().map(|c| c.first_key.unwrap()).collect();
        assert_eq!(Some(keys.concat()), batch.first_key);
        assert_eq!(chunks[0].length().unwrap(), 2);
    }

    #[test]
    fn first_keys_after_their_row_or_out_of_order_are_refused() {
        let refused = |first_key: &[i32]| {
            let first_key = Some(first_key);
            let tokens = &[0; 8];
            let sequences = Sequences {
                first_key,
                ..Sequences::new(tokens, 2)
            };
            sequences.length().is_err()
        };
        assert!(!refused(&[0, 1, 1, 0, 0, 2]));
        for wrong in [
            &[0, 2, 2, 0, 0, 0][..],
            &[0, 1, 0, 0, 0, 0],
            &[-1, 0, 0, 0, 0, 0],
            &[0, 0, 0, 1, 1, 1],
            &[0, 0, 0],
        ] {
            assert!(refused(wrong), "{wrong:?}");
        }
    }
}
