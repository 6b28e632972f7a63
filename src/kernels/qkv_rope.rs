//! `kernels/qkv_rope.cu`: the fused projection of queries, keys and values with rotary position embedding in its epilogue.
//!
//! `out = rotate(x Wᵀ)`: query and key heads are rotated as in `rope.rs`, at position row mod S; values are not.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// Computes the rotated projection, assigned.
    pub struct QkvRopeForward = qkv_rope_forward {
        /// `[T, (H + 2 KV)·d]`.
        out: Out<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
        /// `[T, D]`.
        x: In<'a, bf16> [tokens * hidden];
        /// `[(H + 2 KV)·d, D]`.
        w: In<'a, bf16> [(heads + 2 * key_value_heads) * head_width * hidden];
        /// `[S, d / 2]`.
        cosines: In<'a, f32> [sequence * (head_width / 2)];
        /// `[S, d / 2]`.
        sines: In<'a, f32> [sequence * (head_width / 2)];
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
        /// D, the width of the model.
        hidden: usize;
        /// `routegrad_gemm_tile`: the tile of the product.
        tile: i32;
    }
}

impl QkvRopeForward<'_> {
    /// The cost for this many columns of queries, keys and values.
    pub fn cost(tokens: usize, columns: usize, hidden: usize) -> Cost {
        let elements = tokens * hidden + columns * hidden + tokens * columns;
        Cost::new(2 * tokens * columns * hidden, 2 * elements)
    }
}
