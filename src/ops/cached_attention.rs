//! Causal attention of new rows of one sequence over the cached keys and values of the previous rows. It has no
//! gradients and is used for generation. Each row is projected and rotated once, so a further token costs one row,
//! not the whole sequence.

use super::attention::reference::forward_from;
use super::heads::Heads;
use super::rope::{RopeTables, rope_at};
use crate::error::Result;
use crate::tensor::Tensor;
use crate::with_real;
use std::cell::{Cell, RefCell};

/// The keys and values of one sequence in every layer, on the CPU.
#[derive(Default)]
pub struct KeyValueCache {
    /// Number of rows that every layer holds.
    rows: Cell<usize>,
    /// The next layer of the current pass.
    next: Cell<usize>,
    /// For each layer, the rotated rows `[longest, (H + 2 KV) hd]`, of which the first `rows` are set.
    layers: RefCell<Vec<Tensor>>,
}

impl KeyValueCache {
    /// Returns the number of rows in the cache.
    pub fn rows(&self) -> usize {
        self.rows.get()
    }

    /// Ends a pass of `rows` rows through all layers.
    pub(crate) fn advance(&self, rows: usize) {
        self.rows.set(self.rows.get() + rows);
        self.next.set(0);
    }

    /// RoPE and attention of `qkv [n, (H + 2 KV) hd]`, n further rows of the sequence in the next layer. Returns
    /// `[n, H hd]`.
    ///
    /// # Errors
    /// Returns an error when `qkv` does not have the layout of `heads`, or the sequence is longer than the tables.
    pub fn attention(&self, qkv: &Tensor, heads: Heads, tables: &RopeTables) -> Result<Tensor> {
        let (before, layer) = (self.rows.get(), self.next.get());
        let end = before + qkv.shape()[0];
        let positions: Vec<usize> = (before..end).collect();
        let turned = rope_at(qkv, heads, &positions, tables)?;
        let mut layers = self.layers.borrow_mut();
        if layer == layers.len() {
            let shape = [tables.positions(), heads.row_width()];
            layers.push(Tensor::unspecified(qkv.device(), qkv.dtype(), shape));
        }
        self.next.set(layer + 1);
        let (width, shape) = (heads.row_width(), [end - before, heads.query * heads.dim]);
        let mut out = Tensor::unspecified(qkv.device(), qkv.dtype(), shape);
        with_real!(qkv.dtype(), "attention", |T| {
            let kept = layers[layer].slice_mut::<T>();
            kept[before * width..end * width].copy_from_slice(turned.slice());
            forward_from(out.slice_mut::<T>(), &kept[..end * width], heads, before);
            Ok(out)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::spans::Spans;
    use crate::tape::check::normal_numbers;
    use crate::tensor::dtype::DType;

    #[test]
    fn rows_given_in_pieces_match_attention_over_the_complete_sequence_in_every_layer() {
        let heads = Heads {
            query: 4,
            key_value: 2,
            dim: 6,
        };
        let tables = RopeTables::new(DType::F64, 100, heads.dim, 1e4).unwrap();
        let (cache, width) = (KeyValueCache::default(), heads.row_width());
        let layers = [1, 2].map(|seed| normal_numbers(80 * width, seed));
        let mut found = [Vec::new(), Vec::new()];
        for piece in [0..37, 37..38, 38..39, 39..80] {
            for (numbers, found) in layers.iter().zip(&mut found) {
                let own = &numbers[piece.start * width..piece.end * width];
                let qkv = Tensor::from_slice([piece.len(), width], own);
                let out = cache.attention(&qkv, heads, &tables).unwrap();
                found.extend(out.slice::<f64>().to_vec());
            }
            cache.advance(piece.len());
        }
        assert_eq!(cache.rows(), 80);
        for (numbers, found) in layers.iter().zip(&found) {
            let mut spans = Spans::default();
            spans.add(80);
            let qkv = Tensor::from_slice([80, width], numbers);
            let whole = spans.attention(&qkv, heads, &tables).unwrap();
            for (a, b) in found.iter().zip(whole.slice::<f64>()) {
                assert!((a - b).abs() <= 1e-13, "{a} is not {b}");
            }
        }
        // The tables end at 100.
        let rest = Tensor::from_slice([21, width], &normal_numbers(21 * width, 3));
        assert!(cache.attention(&rest, heads, &tables).is_err());
    }
}
