//! Tokens in memory or in mapped files, read as one sequence.

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Storage of tokens.
pub(super) enum Store {
    /// Bytes; each byte is a token.
    Bytes(Vec<u8>),
    /// Little-endian numbers of 2 or 4 bytes each.
    Mapped(Mmap, u8),
}

impl Store {
    /// Maps a file with `tokens` > 0 tokens.
    ///
    /// # Errors
    /// When the file cannot be read, or has another size.
    pub fn map(path: &Path, tokens: u64, token_bytes: u8) -> Result<Self> {
        let io = |e| Error::io("read", path, e);
        let file = File::open(path).map_err(io)?;
        super::changed::expect_size(path, tokens.checked_mul(token_bytes.into()))?;
        // SAFETY: a finished shard is never written again, and its size was compared with the manifest.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Store::Mapped(map, token_bytes))
    }

    fn len(&self) -> usize {
        match self {
            Store::Bytes(bytes) => bytes.len(),
            Store::Mapped(map, width) => map.len() / usize::from(*width),
        }
    }

    fn copy(&self, range: Range<usize>, out: &mut Vec<i32>) {
        match self {
            Store::Bytes(bytes) => out.extend(bytes[range].iter().map(|b| i32::from(*b))),
            Store::Mapped(map, 2) => {
                let tokens: &[u16] = bytemuck::cast_slice(&map[range.start * 2..range.end * 2]);
                out.extend(tokens.iter().map(|t| i32::from(u16::from_le(*t))));
            }
            Store::Mapped(map, _) => {
                let tokens: &[u32] = bytemuck::cast_slice(&map[range.start * 4..range.end * 4]);
                out.extend(tokens.iter().map(|t| u32::from_le(*t) as i32));
            }
        }
    }
}

/// A sequence of pieces of stores, one after another.
#[derive(Default)]
pub(super) struct Tokens {
    pieces: Vec<(Arc<Store>, Range<usize>)>,
    /// The positions at which the pieces end.
    ends: Vec<u64>,
}

impl Tokens {
    /// All tokens of a store.
    pub fn whole(store: Store) -> Self {
        let mut tokens = Tokens::default();
        let length = store.len();
        tokens.push(Arc::new(store), 0..length);
        tokens
    }

    /// Appends the tokens of `range` of a store.
    pub fn push(&mut self, store: Arc<Store>, range: Range<usize>) {
        self.ends.push(self.len() + range.len() as u64);
        self.pieces.push((store, range));
    }

    /// Appends the tokens of `range` of another sequence.
    pub fn append(&mut self, other: &Tokens, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let (store, within) = other.piece(at, range.end);
            at += within.len() as u64;
            self.push(store.clone(), within);
        }
    }

    pub fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Appends the tokens of `range` to `out`.
    pub fn copy(&self, range: Range<u64>, out: &mut Vec<i32>) {
        let mut at = range.start;
        while at < range.end {
            let (store, within) = self.piece(at, range.end);
            at += within.len() as u64;
            store.copy(within, out);
        }
    }

    /// Returns the piece that contains token `at`, restricted to the tokens from `at` to `end`.
    fn piece(&self, at: u64, end: u64) -> (&Arc<Store>, Range<usize>) {
        let i = self.ends.partition_point(|e| *e <= at);
        let (store, range) = &self.pieces[i];
        let from = range.end - (self.ends[i] - at) as usize;
        let to = range.end.min(from + (end - at) as usize);
        (store, from..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_as_one_sequence() {
        let store = |text: &str| Arc::new(Store::Bytes(text.as_bytes().to_vec()));
        let mut tokens = Tokens::default();
        tokens.push(store("abcdef"), 1..4);
        tokens.push(store("gh"), 0..2);
        tokens.push(store("ijklm"), 2..5);
        let read = |t: &Tokens, range| {
            let mut out = Vec::new();
            t.copy(range, &mut out);
            out.iter().map(|t| *t as u8 as char).collect::<String>()
        };
        assert_eq!(tokens.len(), 8);
        for from in 0..=8 {
            for to in from..=8 {
                let expected = &"bcdghklm"[from as usize..to as usize];
                assert_eq!(read(&tokens, from..to), expected);
                let mut part = Tokens::default();
                part.append(&tokens, from..to);
                assert_eq!(read(&part, 0..to - from), expected);
            }
        }
    }
}
