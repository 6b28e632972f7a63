//! Token sequences of one length, and where their documents begin.

use crate::error::{Error, Result};

/// Sequences of S + 1 tokens: S inputs, and the S that follow them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[sequences, S + 1]`, row-major.
    pub tokens: Vec<i32>,
    /// B.
    pub sequences: usize,
    /// Of each input the place in its sequence where its document begins, `[sequences, S]`; none where
    /// attention passes over the ends of documents.
    pub first_key: Option<Vec<i32>>,
}

impl Batch {
    /// All sequences.
    pub fn all(&self) -> Sequences<'_> {
        Sequences {
            tokens: &self.tokens,
            count: self.sequences,
            first_key: self.first_key.as_deref(),
        }
    }

    /// `most` > 0 sequences at a time.
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
    /// How many there are.
    pub count: usize,
    /// `[count, S]`, if documents have boundaries.
    pub first_key: Option<&'a [i32]>,
}

impl<'a> Sequences<'a> {
    /// `count` sequences without boundaries.
    pub fn new(tokens: &'a [i32], count: usize) -> Self {
        Sequences {
            tokens,
            count,
            first_key: None,
        }
    }

    /// S, after a check that these are sequences.
    ///
    /// # Errors
    /// When there is no sequence of two tokens, they differ in length, or a row's document begins behind
    /// it or before that of the row before it.
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
    fn documents_that_begin_behind_a_row_or_out_of_order_are_refused() {
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
