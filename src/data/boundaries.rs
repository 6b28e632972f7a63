//! The positions at which the documents in a sequence of tokens end, and tokens with these positions.

use super::folder::Entry;
use super::tokens::Tokens;
use crate::model::batch::Batch;

/// The end positions of documents, increasing. Tokens between two documents belong to the earlier one.
pub(super) struct Boundaries(Vec<u64>);

impl Boundaries {
    pub fn new(documents: &[Entry]) -> Self {
        Boundaries(documents.iter().map(|d| d.end).collect())
    }

    /// The boundaries of consecutive documents with the given lengths in tokens.
    pub fn of_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut end = 0;
        let ends = lengths.into_iter().map(|length| {
            end += length as u64;
            end
        });
        Boundaries(ends.collect())
    }

    /// Appends one number to `out` for each of the `length` tokens from `start` on: the position, relative to `start`, at
    /// which the token's document begins, or 0 for a document that begins before `start`.
    pub fn first_keys(&self, start: u64, length: u64, out: &mut Vec<i32>) {
        let mut begin = 0;
        let mut next = self.0.partition_point(|end| *end <= start);
        for at in start..start + length {
            while self.0.get(next).is_some_and(|end| *end <= at) {
                begin = at - start;
                next += 1;
            }
            out.push(begin as i32);
        }
    }
}

/// Tokens, and the ends of their documents if attention stays within documents.
pub(super) struct Text {
    pub tokens: Tokens,
    pub boundaries: Option<Boundaries>,
}

impl Text {
    pub fn len(&self) -> u64 {
        self.tokens.len()
    }

    /// Appends the window of S + 1 tokens from `start` on to a batch.
    pub fn copy(&self, start: u64, sequence: u64, batch: &mut Batch) {
        self.tokens
            .copy(start..start + sequence + 1, &mut batch.tokens);
        if let Some(boundaries) = &self.boundaries {
            let first_key = batch.first_key.get_or_insert_default();
            boundaries.first_keys(start, sequence, first_key);
        }
        batch.sequences += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_knows_where_its_document_begins_in_the_window() {
        let boundaries = Boundaries::of_lengths([3, 1, 4, 0, 2]);
        let document = [0, 0, 0, 3, 4, 4, 4, 4, 8, 8];
        for start in 0..10u64 {
            for length in 0..=10 - start {
                let mut found = Vec::new();
                boundaries.first_keys(start, length, &mut found);
                let expected = document[start as usize..][..length as usize].iter();
                let expected = expected.map(|begin| (begin - start as i32).max(0));
                assert!(expected.eq(found.iter().copied()), "{start} {length}");
            }
        }
    }
}
