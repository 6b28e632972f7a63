//! `kernels/rope.cu`: rotary position embedding (Su et al., arXiv 2104.09864), the rotate-half form, of the fused
//! projection's rows.
//!
//! Of a query or key head with halves a, b: `y = (a cos − b sin, b cos + a sin)`, angles `position · θ^(−2i/d)`,
//! `i < d / 2`, position = row mod S. Values are copied. With `back` the angles are the opposite: the gradient.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// Rotated rows, assigned; y may be x.
    pub struct Rope = rope {
        /// `[T, (H + 2 KV)·d]`.
        y: Out<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
        /// `[T, (H + 2 KV)·d]`.
        x: In<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
        /// `[S, d / 2]`.
        cosines: In<'a, f32> [sequence * (head_width / 2)];
        /// `[S, d / 2]`.
        sines: In<'a, f32> [sequence * (head_width / 2)];
        /// T.
        tokens: usize;
        /// S.
        sequence: usize;
        /// H.
        heads: usize;
        /// KV.
        key_value_heads: usize;
        /// d.
        head_width: usize;
        /// Whether rows are rotated by the negative angle, as in backward.
        back: bool;
    }
}

impl Rope<'_> {
    /// Forward or back.
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
