//! The layout of the fused attention projection, shared by the operations that read it.

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// One row of the fused projection holds the query heads, the key heads, then the value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads, H.
    pub query: usize,
    /// Number of key heads, and of value heads: KV, a divisor of H (equal to H without grouping).
    pub key_value: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    /// Returns the number of elements of a row: (H + 2 KV) · width of a head.
    pub fn row_width(&self) -> usize {
        (self.query + 2 * self.key_value) * self.dim
    }

    /// Returns the number of query heads that share one key and value head.
    pub fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// Checks, for operation `op`, that `qkv` has rows of this layout and holds whole sequences of
    /// `sequence` rows.
    pub(super) fn check(&self, op: &str, qkv: &Tensor, sequence: usize) -> Result<()> {
        if self.dim == 0 || self.key_value == 0 || self.query % self.key_value != 0 {
            return Err(Error::invalid(
                op,
                "key and value heads that divide the query heads, of a width above 0",
                format!("{self:?}"),
                "choose num_kv_heads as a divisor of num_heads",
            ));
        }
        let shape = qkv.shape();
        if shape.len() != 2 || shape[1] != self.row_width() {
            return Err(Error::invalid(
                op,
                format!("qkv [tokens, {}]", self.row_width()),
                shape.to_string(),
                "pass the output of the fused query, key and value projection",
            ));
        }
        if sequence == 0 || shape[0] % sequence != 0 {
            return Err(Error::invalid(
                op,
                format!("whole sequences of {sequence} tokens"),
                format!("{} tokens", shape[0]),
                "pass batch * sequence rows",
            ));
        }
        Ok(())
    }
}
