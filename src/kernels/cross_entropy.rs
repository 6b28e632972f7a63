//! `kernels/cross_entropy.cu`: the output head's loss, for a chunk of tokens at a time.
//!
//! `z = x Wᵀ` in f32; `losses[t] = logsumexp(z_t) − z_t[y_t]`, `dlogits[t, v] = factor (softmax(z_t)[v] − [v = y_t])`;
//! `loss = factor Σ_t losses[t]`. A target outside the vocabulary makes its loss NaN. D and V are multiples of 8.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `z = x Wᵀ`.
    pub struct HeadLogits = head_logits {
        /// `[T, V]`.
        logits: Out<'a, f32> [tokens * vocabulary];
        /// `[T, D]`.
        x: In<'a, bf16> [tokens * hidden];
        /// `[V, D]`.
        w: In<'a, bf16> [vocabulary * hidden];
        /// T.
        tokens: usize;
        /// V.
        vocabulary: usize;
        /// D.
        hidden: usize;
        /// A tile of the product, or [`TILE_AUTO`](super::launchers::TILE_AUTO).
        tile: i32;
    }
}

kernel! {
    /// Each token's loss, and the gradient of its logits.
    pub struct CrossEntropyRows = cross_entropy_rows {
        /// `[T]`.
        losses: Out<'a, f32> [tokens];
        /// `[T, V]`; absent: not computed.
        dlogits: Option<Out<'a, bf16>> [tokens * vocabulary];
        /// `[T, V]`.
        logits: In<'a, f32> [tokens * vocabulary];
        /// `[T]`.
        targets: In<'a, i32> [tokens];
        /// T.
        tokens: usize;
        /// V.
        vocabulary: usize;
        /// What each token's gradient is multiplied by: 1 / T for a mean.
        factor: f32;
    }
}

impl CrossEntropyRows<'_> {
    /// With the logits' gradient.
    pub fn cost(tokens: usize, vocabulary: usize) -> Cost {
        Cost::new(0, 10 * tokens * vocabulary + 8 * tokens)
    }
}

kernel! {
    /// `factor Σ_t losses[t]`.
    pub struct CrossEntropyMean = cross_entropy_mean {
        /// `[1]`.
        loss: Out<'a, f32> [1];
        /// `[T]`.
        losses: In<'a, f32> [tokens];
        /// T.
        tokens: usize;
        /// What the sum is multiplied by: 1 / T for a mean.
        factor: f32;
    }
}

kernel! {
    /// `out = or += factor input`, both bf16 or both f32, as bytes.
    pub struct GradientScale = gradient_scale {
        /// So many elements, assigned, or added to.
        out: Out<'a, u8> [elements * if bf16_elements { 2 } else { 4 }];
        /// So many elements.
        input: In<'a, u8> [elements * if bf16_elements { 2 } else { 4 }];
        /// `[1]`.
        factor: In<'a, f32> [1];
        /// A multiple of 8.
        elements: usize;
        /// Whether the elements are bf16, or f32.
        bf16_elements: bool;
        /// Whether `out` is added to, or assigned.
        accumulate: bool;
    }
}
