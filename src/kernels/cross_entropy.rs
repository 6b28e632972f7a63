//! `kernels/cross_entropy.cu`: the output head's loss, for a chunk of tokens at a time.
//!
//! `z = x Wᵀ` in f32; `losses[t] = logsumexp(z_t) − z_t[y_t]`,
//! `dlogits[t, v] = factor (softmax(z_t)[v] − [v = y_t])`; `loss = factor Σ_t losses[t]`. A target outside the
//! vocabulary makes its loss NaN. D and V are multiples of 8. Each row of logits has C statistics, from which the
//! loss kernel computes the logsumexp without reading the logits.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

/// Number of logits per statistic; `kStatisticColumns` in `kernels/common/epilogue_store_logits.cuh`.
pub const STATISTIC_COLUMNS: usize = 128;

/// Returns C, the number of statistics of a row of logits: `⌈V / 128⌉`.
pub fn statistics(vocabulary: usize) -> usize {
    vocabulary.div_ceil(STATISTIC_COLUMNS)
}

kernel! {
    /// Computes `z = x Wᵀ`, and `(m, Σ exp(z − m))` for every 128 columns of a row, where m is their maximum.
    pub struct HeadLogits = head_logits {
        /// `[T, V]`.
        logits: Out<'a, f32> [tokens * vocabulary];
        /// `[T, C, 2]`.
        statistics: Out<'a, f32> [2 * tokens * vocabulary.div_ceil(STATISTIC_COLUMNS as u128)];
        /// `[T, D]`.
        x: In<'a, bf16> [tokens * hidden];
        /// `[V, D]`.
        w: In<'a, bf16> [vocabulary * hidden];
        /// T, the number of tokens.
        tokens: usize;
        /// V, the size of the vocabulary.
        vocabulary: usize;
        /// D, the width of the model.
        hidden: usize;
        /// A tile of the product, or [`TILE_AUTO`](super::launchers::TILE_AUTO).
        tile: i32;
    }
}

impl HeadLogits<'_> {
    /// The cost for this many tokens.
    pub fn cost(tokens: usize, vocabulary: usize, hidden: usize) -> Cost {
        let operands = 2 * (tokens + vocabulary) * hidden;
        let row = 4 * vocabulary + 8 * statistics(vocabulary);
        Cost::new(2 * tokens * vocabulary * hidden, operands + tokens * row)
    }
}

kernel! {
    /// Computes each token's loss, and the gradient of its logits.
    pub struct CrossEntropyRows = cross_entropy_rows {
        /// `[T]`.
        losses: Out<'a, f32> [tokens];
        /// `[T, V]`; if absent, it is not computed.
        dlogits: Option<Out<'a, bf16>> [tokens * vocabulary];
        /// `[T, V]`.
        logits: In<'a, f32> [tokens * vocabulary];
        /// `[T, C, 2]`, as written by [`HeadLogits`]; if absent, the logits are read once more.
        statistics: Option<In<'a, f32>> [2 * tokens * vocabulary.div_ceil(STATISTIC_COLUMNS as u128)];
        /// `[T]`.
        targets: In<'a, i32> [tokens];
        /// T, the number of tokens.
        tokens: usize;
        /// V, the size of the vocabulary.
        vocabulary: usize;
        /// What each token's gradient is multiplied by: 1 / T for a mean.
        factor: f32;
    }
}

impl CrossEntropyRows<'_> {
    /// The cost with or without the gradient of the logits, and with or without the logits' statistics.
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
        /// T, the number of tokens.
        tokens: usize;
        /// What the sum is multiplied by: 1 / T for a mean.
        factor: f32;
    }
}

kernel! {
    /// Computes `out = factor input` or `out += factor input`; both are bf16 or both are f32, passed as bytes.
    pub struct GradientScale = gradient_scale {
        /// `[elements]`, assigned, or added to.
        out: Out<'a, u8> [elements * if bf16_elements { 2 } else { 4 }];
        /// `[elements]`.
        input: In<'a, u8> [elements * if bf16_elements { 2 } else { 4 }];
        /// `[1]`.
        factor: In<'a, f32> [1];
        /// A multiple of 8.
        elements: usize;
        /// Whether the elements are bf16; otherwise they are f32.
        bf16_elements: bool;
        /// Whether to add to `out` instead of assigning it.
        accumulate: bool;
    }
}

impl GradientScale<'_> {
    /// The cost for this many elements.
    pub fn cost(elements: usize, bf16_elements: bool, accumulate: bool) -> Cost {
        let size = if bf16_elements { 2 } else { 4 };
        Cost::new(0, if accumulate { 3 } else { 2 } * size * elements)
    }
}
