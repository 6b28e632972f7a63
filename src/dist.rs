//! What must be summed over ranks goes through one trait, so that code for one rank never changes
//! when ranks are added.

/// Sums over all ranks of a run, in rank order, so that every rank gets the same bytes.
pub trait Collective: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Replaces `values` by their sum over the ranks. Every rank calls it with equally many values.
    fn sum(&self, values: &mut [f64]);
}

/// A run of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn sum(&self, _values: &mut [f64]) {}
}
