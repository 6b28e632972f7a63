//! The order of the training windows: a pure function of (seed, index).
//!
//! In each epoch the text is cut, from an offset that depends on the epoch, into windows that overlap by one token (the
//! last target of one is the first input of the next). Each window is visited once, in the order of a permutation keyed by
//! (seed, epoch). The permutation is a Feistel network over the next even power of two, with the random generator as round
//! function; it is applied repeatedly until the result is in range (Black and Rogaway, "Ciphers with arbitrary finite
//! domains", 2002). Nothing is stored, so the position of any index can be computed directly.

use crate::tensor::random::{Purpose, Stream};

const ROUNDS: u64 = 6;

pub(super) struct Order {
    windows: u64,
    sequence: u64,
    /// Largest offset of an epoch; the smallest is 0.
    last_offset: u64,
    seed: u64,
}

impl Order {
    /// The order for a text of `tokens` > `sequence` tokens.
    pub fn new(tokens: u64, sequence: u64, seed: u64) -> Self {
        // One sequence is not used, so that every offset leaves room for the same number of windows.
        let windows = ((tokens - sequence) / sequence).max(1);
        let slack = tokens - 1 - windows * sequence;
        Order {
            windows,
            sequence,
            last_offset: slack.min(sequence - 1),
            seed,
        }
    }

    /// Returns the position of the first token of sequence `index`.
    pub fn start(&self, index: u64) -> u64 {
        let (epoch, place) = (index / self.windows, index % self.windows);
        let stream = |use_| Stream::new(self.seed, Purpose::DataOrder, epoch, use_);
        let [low, high, ..] = stream(0).bits(0);
        let offset = (u64::from(high) << 32 | u64::from(low)) % (self.last_offset + 1);
        offset + permute(place, self.windows, &stream(1)) * self.sequence
    }
}

/// Returns the image of `place` under a permutation of `0..n`.
pub(super) fn permute(place: u64, n: u64, stream: &Stream) -> u64 {
    let bits = 64 - n.saturating_sub(1).leading_zeros();
    let half = bits.div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut x = place;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..ROUNDS {
            let [low, high, ..] = stream.bits(round << 32 | right);
            let f = (u64::from(high) << 32 | u64::from(low)) & mask;
            (left, right) = (right, left ^ f);
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_every_window_once() {
        for n in [1u64, 2, 3, 7, 64, 65, 1000] {
            for epoch in 0..3 {
                let stream = Stream::new(9, Purpose::DataOrder, epoch, 1);
                let mut seen: Vec<u64> = (0..n).map(|i| permute(i, n, &stream)).collect();
                seen.sort_unstable();
                assert!(seen.iter().copied().eq(0..n), "n = {n}");
            }
        }
    }

    #[test]
    fn windows_stay_inside_whatever_the_length() {
        for sequence in [1u64, 2, 8] {
            for tokens in sequence + 1..60 {
                let order = Order::new(tokens, sequence, 4);
                let last = (0..200).map(|i| order.start(i)).max();
                assert!(last <= Some(tokens - sequence - 1), "{tokens} {sequence}");
            }
        }
    }

    #[test]
    fn offsets_and_orders_differ_between_epochs_and_seeds() {
        let starts = |seed, epoch: u64| -> Vec<u64> {
            let order = Order::new(10_000, 16, seed);
            (0..order.windows)
                .map(|i| order.start(epoch * order.windows + i))
                .collect()
        };
        assert_ne!(starts(1, 0), starts(1, 1));
        assert_ne!(starts(1, 0), starts(2, 0));
        assert_eq!(starts(1, 1), starts(1, 1));
        let residues: std::collections::BTreeSet<u64> =
            (0..8).map(|epoch| starts(1, epoch)[0] % 16).collect();
        assert!(residues.len() > 1, "every epoch began at the same offset");
    }

    #[test]
    fn a_permutation_is_far_from_the_identity() {
        let stream = Stream::new(0, Purpose::DataOrder, 0, 1);
        let n = 10_000u64;
        // Two random places differ by n/3 on average, with a standard deviation of the mean near 24.
        let mean = (0..n)
            .map(|i| permute(i, n, &stream).abs_diff(i))
            .sum::<u64>()
            / n;
        assert!(mean.abs_diff(n / 3) < 150, "mean distance {mean}");
    }
}
