//! Routing statistics of a layer.

use crate::dist::Collective;
use crate::error::Result;
use crate::tensor::Tensor;

/// Routing statistics of a layer, summed over the tokens since they were last taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerStats {
    /// Number of tokens of the layer; an integer, kept as f64 like the other sums.
    pub tokens: f64,
    /// Number of tokens per expert.
    pub counts: Vec<f64>,
    /// Sum over tokens of the entropy of p, in nats.
    pub entropy: f64,
}

impl LayerStats {
    /// Reads a row `[E + 2]` that `kernels/layer_tally.cu` counted: tokens per expert, tokens, entropy.
    pub(crate) fn of_row(row: &[f64]) -> Self {
        let [counts @ .., tokens, entropy] = row else {
            unreachable!("a row has two numbers after those of the experts")
        };
        LayerStats {
            tokens: *tokens,
            counts: counts.to_vec(),
            entropy: *entropy,
        }
    }

    /// Reads the rows of all layers.
    pub(crate) fn of_rows(rows: &Tensor) -> Vec<Self> {
        let rows = rows.slice::<f64>().chunks(rows.shape().width());
        rows.map(Self::of_row).collect()
    }

    /// Returns the sums over all ranks.
    ///
    /// # Errors
    /// The errors of [`Collective::sum`].
    pub fn over_ranks(mut self, dist: &dyn Collective) -> Result<Self> {
        let mut sums = [&[self.tokens, self.entropy][..], &self.counts].concat();
        dist.sum(&mut sums)?;
        (self.tokens, self.entropy) = (sums[0], sums[1]);
        self.counts = sums.split_off(2);
        Ok(self)
    }
}
