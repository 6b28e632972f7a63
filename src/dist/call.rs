//! The description of a call that the ranks compare before they transfer bytes.

use super::activity;
use crate::error::{Error, Result};

/// The kind of a call, and where its memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All-gather of host memory.
    AllGather = 1,
    /// Exchange of host memory, with one part for each other rank.
    Exchange = 2,
    /// All-gather of device memory; its count is in bytes.
    DeviceAllGather = 3,
    /// Exchange of device memory; its count is the number of parts.
    DeviceExchange = 4,
}

/// Ordinal, kind and count of a call, and what its rank is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Number of earlier calls.
    pub ordinal: u64,
    kind: u64,
    /// Bytes or parts that this rank gives.
    count: u64,
    what: String,
}

/// Bytes of the text that ranks exchange with a call; a longer text is cut.
const WORDS: usize = 40;

impl Call {
    /// Size of an encoded call in bytes.
    pub const BYTES: usize = 24 + WORDS;

    /// Returns the description of a call of this thread's rank.
    pub fn new(ordinal: u64, kind: Kind, count: usize) -> Self {
        Call {
            ordinal,
            kind: kind as u64,
            count: count as u64,
            what: activity::current(str::to_owned),
        }
    }

    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let numbers = [self.ordinal, self.kind, self.count].map(u64::to_le_bytes);
        bytes[..24].copy_from_slice(numbers.as_flattened());
        let words = self.what.as_bytes();
        let n = words.len().min(WORDS);
        bytes[24..24 + n].copy_from_slice(&words[..n]);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let number = |i: usize| {
            let mut own = [0; 8];
            own.copy_from_slice(&bytes[8 * i..8 * i + 8]);
            u64::from_le_bytes(own)
        };
        let words = String::from_utf8_lossy(&bytes[24..]);
        Call {
            ordinal: number(0),
            kind: number(1),
            count: number(2),
            what: words.trim_end_matches('\0').to_string(),
        }
    }

    /// Whether the two calls have the same ordinal, kind and count; their texts may differ.
    fn matches(&self, other: &Self) -> bool {
        let numbers = |c: &Self| (c.ordinal, c.kind, c.count);
        numbers(self) == numbers(other)
    }

    fn describe(&self) -> String {
        let kinds = [
            (Kind::AllGather, "all_gather of", "bytes"),
            (Kind::Exchange, "exchange of", "bytes"),
            (
                Kind::DeviceAllGather,
                "all_gather on the device of",
                "bytes",
            ),
            (Kind::DeviceExchange, "exchange on the device of", "parts"),
        ];
        let found = kinds.iter().find(|(kind, ..)| *kind as u64 == self.kind);
        let (kind, unit) = found.map_or(("unknown call of", "bytes"), |(_, k, unit)| (*k, *unit));
        let what = match self.what.as_str() {
            "" => String::new(),
            what => format!(" ({what})"),
        };
        format!("call {}, {kind} {} {unit}{what}", self.ordinal, self.count)
    }

    /// Compares the calls of all ranks, `[size, BYTES]`; every rank gets the same result.
    ///
    /// # Errors
    /// Returns an error when two calls differ.
    pub fn compare(all: &[u8]) -> Result<()> {
        let mut calls = all.chunks(Self::BYTES).map(Self::from_bytes);
        let Some(first) = calls.next() else {
            return Ok(());
        };
        let Some((other, rank)) = calls.zip(1..).find(|(call, _)| !call.matches(&first)) else {
            return Ok(());
        };
        Err(Error::invalid(
            "collective call",
            "the same call on every rank",
            format!(
                "{} on rank 0, {} on rank {rank}",
                first.describe(),
                other.describe()
            ),
            "give every rank the same model and equally many micro-batches",
        ))
    }
}
