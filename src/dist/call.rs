//! A call as the ranks compare it before bytes move.

use super::activity;
use crate::error::{Error, Result};

/// What a call moves: bytes of the host, or of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of the host that every rank gathers from all.
    AllGather = 1,
    /// Bytes of the host, a part for each other rank.
    Exchange = 2,
    /// Of as many bytes each.
    DeviceAllGather = 3,
    /// Of as many parts.
    DeviceExchange = 4,
}

/// Ordinal, kind and count of a call, and what its rank is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Calls before it.
    pub ordinal: u64,
    kind: u64,
    /// Bytes that this rank gives.
    count: u64,
    what: String,
}

/// Bytes of a call's description that ranks exchange; longer ones are cut.
const WORDS: usize = 40;

impl Call {
    /// Bytes of a call on its way.
    pub const BYTES: usize = 24 + WORDS;

    /// A call of this thread's rank.
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
        for (to, number) in bytes
            .chunks_mut(8)
            .zip([self.ordinal, self.kind, self.count])
        {
            to.copy_from_slice(&number.to_le_bytes());
        }
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

    /// Whether the two move the same bytes; what their ranks do may have other words.
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

    /// Compares the calls of all ranks, `[size, BYTES]`; every rank finds the same.
    ///
    /// # Errors
    /// When they are not all alike.
    pub fn compare(all: &[u8]) -> Result<()> {
        let mut calls = all.chunks(Self::BYTES).map(Self::from_bytes);
        let Some(first) = calls.next() else {
            return Ok(());
        };
        let Some((rank, other)) = calls
            .zip(1..)
            .find(|(c, _)| !c.matches(&first))
            .map(|(c, r)| (r, c))
        else {
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
