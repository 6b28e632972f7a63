//! Selects the part of a mix for each training sequence, as a pure function of (seed, index).
//!
//! Every [`BLOCK`] sequences contain a fixed number of sequences of each part, in proportion to its weight, in an order
//! that is a permutation of the block. The part of any index can thus be computed directly, and the shares are exact.

use super::order::permute;
use crate::config::Weighted;
use crate::error::{Error, Result};
use crate::tensor::random::{Purpose, Stream};

/// Number of sequences in which the shares are exact.
const BLOCK: u64 = 4096;

pub(super) struct Mix {
    /// Positions in a block at which each part's share ends; the last is [`BLOCK`].
    ends: Vec<u64>,
    seed: u64,
}

impl Mix {
    /// A mix with one part.
    pub fn single() -> Self {
        Mix {
            ends: vec![BLOCK],
            seed: 0,
        }
    }

    /// Shares in proportion to the weights, rounded to multiples of 1/4096 by the largest-remainder method.
    ///
    /// # Errors
    /// When a part's share is rounded to 0.
    pub fn new(parts: &[Weighted], seed: u64) -> Result<Self> {
        let sum: f64 = parts.iter().map(|p| p.weight).sum();
        let exact = parts.iter().map(|p| p.weight / sum * BLOCK as f64);
        let exact: Vec<f64> = exact.collect();
        let mut shares: Vec<u64> = exact.iter().map(|x| x.floor() as u64).collect();
        let mut order: Vec<usize> = (0..parts.len()).collect();
        // The sort is stable: of equal remainders the first comes first.
        order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
        let missing = BLOCK.saturating_sub(shares.iter().sum()) as usize;
        let raised = order.iter().cycle().take(missing);
        raised.for_each(|i| shares[*i] += 1);
        if let Some(none) = shares.iter().position(|n| *n == 0) {
            return Err(Error::usage(
                "data.mix",
                format!("weights of at least 1/{BLOCK} of their sum"),
                format!("{} for {}", parts[none].weight, parts[none].source),
                "give it a larger weight, or leave it out",
            ));
        }
        let mut end = 0;
        let ends = shares.iter().map(|n| {
            end += n;
            end
        });
        Ok(Mix {
            ends: ends.collect(),
            seed,
        })
    }

    /// Returns the part that sequence `index` comes from, and the index of the sequence in that part.
    pub fn place(&self, index: u64) -> (usize, u64) {
        if self.ends.len() == 1 {
            return (0, index);
        }
        let (block, within) = (index / BLOCK, index % BLOCK);
        let stream = Stream::new(self.seed, Purpose::DataOrder, block, 2);
        let drawn = permute(within, BLOCK, &stream);
        let part = self.ends.partition_point(|end| *end <= drawn);
        let begin = part.checked_sub(1).map_or(0, |p| self.ends[p]);
        let share = self.ends[part] - begin;
        (part, block * share + drawn - begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn mix(weights: &[f64]) -> Result<Mix> {
        let parts = weights.iter().map(|w| Weighted {
            source: "some".into(),
            weight: *w,
        });
        Mix::new(&parts.collect::<Vec<_>>(), 3)
    }

    #[test]
    fn each_part_is_read_once_in_the_share_of_its_weight() {
        let mix = mix(&[3.0, 1.0, 0.5]).unwrap();
        let mut seen = [const { BTreeSet::new() }; 3];
        for i in 0..3 * BLOCK {
            let (part, local) = mix.place(i);
            assert!(seen[part].insert(local), "twice");
        }
        for (seen, weight) in seen.iter().zip([3.0, 1.0, 0.5]) {
            let n = seen.len() as u64;
            assert_eq!(seen.last(), Some(&(n - 1)), "one was left out");
            assert!((n as f64 / (3 * BLOCK) as f64 - weight / 4.5).abs() < 3e-4);
        }
        // The order is well mixed: the first 64 sequences are not all of one part.
        let first: BTreeSet<usize> = (0..64).map(|i| mix.place(i).0).collect();
        assert_eq!(first.len(), 3);
    }

    #[test]
    fn a_weight_too_small_to_count_is_refused() {
        let e = mix(&[1.0, 1e-9]).err().unwrap().to_string();
        assert!(e.contains("1/4096"), "{e}");
    }
}
