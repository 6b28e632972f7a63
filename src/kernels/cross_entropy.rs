//! `kernels/cross_entropy.cu`: the output head's loss, for a chunk of tokens at a time.
//!
//! `z = x Wᵀ` in f32; `losses[t] = logsumexp(z_t) − z_t[y_t]`, `dlogits[t, v] = factor (softmax(z_t)[v] − [v = y_t])`;
//! `loss = factor Σ_t losses[t]`. A target outside the vocabulary makes its loss NaN. D and V are multiples of 8.
//! The logits come with C statistics a row, from which the loss has their logsumexp without reading them.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

/// Logits of a statistic; `kStatisticColumns` in `kernels/common/epilogue_store_logits.cuh`.
pub const STATISTIC_COLUMNS: usize = 128;

/// C, the statistics of a row of logits: `⌈V / 128⌉`.
pub fn statistics(vocabulary: usize) -> usize {
    vocabulary.div_ceil(STATISTIC_COLUMNS)
}

kernel! {
    /// `z = x Wᵀ`, and `(m, Σ exp(z − m))` of every 128 columns of a row, m their maximum.
    pub struct HeadLogits = head_logits {
        /// `[T, V]`.
        logits: Out<'a, f32> [tokens * vocabulary];
        /// `[T, C, 2]`.
        statistics: Out<'a, f32> [2 * tokens * vocabulary.div_ceil(STATISTIC_COLUMNS as u128)];
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

impl HeadLogits<'_> {
    /// Of so many tokens.
    pub fn cost(tokens: usize, vocabulary: usize, hidden: usize) -> Cost {
        let operands = 2 * (tokens + vocabulary) * hidden;
        let row = 4 * vocabulary + 8 * statistics(vocabulary);
        Cost::new(2 * tokens * vocabulary * hidden, operands + tokens * row)
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
        /// `[T, C, 2]`, as [`HeadLogits`] has it; absent: the logits are read once more.
        statistics: Option<In<'a, f32>> [2 * tokens * vocabulary.div_ceil(STATISTIC_COLUMNS as u128)];
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
    /// With the logits' gradient or without, and of logits with their statistics or without.
    pub fn cost(tokens: usize, vocabulary: usize, gradient: bool, with_statistics: bool) -> Cost {
        let row = match with_statistics {
            true => 8 * statistics(vocabulary),
            false => 4 * vocabulary,
        };
        let gradient = if gradient { 6 * vocabulary } else { 0 };
        Cost::new(0, tokens * (row + gradient + 12))
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

impl GradientScale<'_> {
    /// Of so many elements.
    pub fn cost(elements: usize, bf16_elements: bool, accumulate: bool) -> Cost {
        let size = if bf16_elements { 2 } else { 4 };
        Cost::new(0, if accumulate { 3 } else { 2 } * size * elements)
    }
}
