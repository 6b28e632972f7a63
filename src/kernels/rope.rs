//! `kernels/rope.cu`: rotary position embedding (Su et al., arXiv 2104.09864), the rotate-half form, of the fused
//! projection's rows.
//!
//! For a query or key head with halves a and b: `y = (a cos − b sin, b cos + a sin)`, angles `position · θ^(−2i/d)`,
//! `i < d / 2`, position = row mod S. Values are copied. With `back` the angles are negated, which computes the
//! gradient.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// Computes the rotated rows, assigned; y may be the memory of x.
    pub struct Rope = rope {
        /// `[T, (H + 2 KV)·d]`.
        y: Out<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
        /// `[T, (H + 2 KV)·d]`.
        x: In<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
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
        /// Whether rows are rotated by the negative angle, as in backward.
        back: bool;
    }
}

impl Rope<'_> {
    /// The cost, the same for both directions.
    pub fn cost(
        tokens: usize,
        sequence: usize,
        heads: usize,
        key_value_heads: usize,
        width: usize,
    ) -> Cost {
        let row = (heads + 2 * key_value_heads) * width;
        Cost::new(0, 4 * tokens * row + 4 * sequence * width)
    }
}
