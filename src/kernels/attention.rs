//! `kernels/attention.cu`: causal attention on the fused projection, grouped queries, packed documents.
//!
//! `P = softmax(Q Kᵀ / √d)` over the keys `first_key[r] … r` of row r; `out_r = P V`; `log_sum_exp = log Σ exp(scores / √d)`.
//! `qkv [T, (H + 2 KV)·d]` holds query heads, key heads, value heads; `T = B·S`, S = `sequence`.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// Computes `out` and `log_sum_exp`; both are assigned.
    pub struct AttentionForward = attention_forward {
        /// `[T, H·d]`.
        out: Out<'a, bf16> [tokens * heads * head_width];
        /// `[B, H, S]`.
        log_sum_exp: Out<'a, f32> [tokens * heads];
        /// `[T, (H + 2 KV)·d]`.
        qkv: In<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
        /// `[T]`: index, within the row's sequence, of the first key that a row attends to; if absent, 0.
        first_key: Option<In<'a, i32>> [tokens];
        /// T, the number of tokens.
        tokens: usize;
        /// S, the number of tokens in a sequence.
        sequence: usize;
        /// H, the number of query heads.
        heads: usize;
        /// KV, the number of key heads, and of value heads.
        key_value_heads: usize;
        /// d, the width of a head.
        head_width: usize;
    }
}

impl AttentionForward<'_> {
    /// The cost without document boundaries.
    pub fn cost(s: &AttentionSizes) -> Cost {
        let (lines, tiles) = (s.sequences * s.heads, s.sequence.div_ceil(128));
        let flops = 4 * 128 * 128 * s.width * lines * tiles * (tiles + 1) / 2;
        let rows = s.sequences * s.sequence;
        let bytes = 4 * rows * (s.heads + s.key_value_heads) * s.width + 4 * rows * s.heads;
        Cost::new(flops, bytes)
    }
}

/// The sizes of an attention layer's kernels.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSizes {
    /// B, the number of sequences.
    pub sequences: usize,
    /// S, the number of tokens in a sequence.
    pub sequence: usize,
    /// H, the number of query heads.
    pub heads: usize,
    /// KV, the number of key heads, and of value heads.
    pub key_value_heads: usize,
    /// d, the width of a head.
    pub width: usize,
}
