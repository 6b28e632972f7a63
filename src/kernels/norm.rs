//! `kernels/norm.cu`: RMSNorm (1910.07467) and LayerNorm (1607.06450) of each row, with the residual add before them, and
//! their gradients.
//!
//! `s = x + residual`, rounded to bf16; `y = r s ⊙ w`, `r = 1 / √(mean(s²) + ε)`, or with a bias `y = r (s − mean(s)) ⊙ w + b`,
//! `r = 1 / √(var(s) + ε)`. The gradients of w and b are sums over runs of rows. D is a multiple of 8, at most 8192.

use super::cost::Cost;
use super::{In, Out, host_function, kernel};
use half::bf16;

kernel! {
    /// Computes the sum with the residual, if there is one, and the norm of the sum.
    pub struct NormForward = norm_forward {
        /// `[T, D]`.
        y: Out<'a, bf16> [rows * hidden];
        /// `[T, D]`, x + residual; may be the memory of `x` or `residual`. Present if and only if `residual` is.
        sum: Option<Out<'a, bf16>> [rows * hidden];
        /// `[T, D]`.
        x: In<'a, bf16> [rows * hidden];
        /// `[T, D]`.
        residual: Option<In<'a, bf16>> [rows * hidden];
        /// `[D]`.
        weight: In<'a, bf16> [hidden];
        /// `[D]`; if present, the norm is LayerNorm.
        bias: Option<In<'a, bf16>> [hidden];
        /// T, the number of rows.
        rows: usize;
        /// D, the width of the model.
        hidden: usize;
        /// ε.
        eps: f32;
    }
}

impl NormForward<'_> {
    /// The cost for this many rows, with or without the residual add.
    pub fn cost(rows: usize, hidden: usize, layernorm: bool, residual: bool) -> Cost {
        let row = if residual { 8 } else { 4 };
        let parameters = if layernorm { 2 } else { 1 };
        Cost::new(0, row * rows * hidden + 2 * parameters * hidden)
    }
}

kernel! {
    /// Computes dx, and the partial sums of the parameters' gradients.
    pub struct NormBackward = norm_backward {
        /// `[T, D]`, assigned; may be the memory of `skip`.
        dx: Out<'a, bf16> [rows * hidden];
        /// `[1 or 2, runs, D]`: of w and, for LayerNorm, of b; see [`partials`].
        partials: Out<'a, f32> [(1 + u128::from(layernorm)) * runs(rows) * hidden];
        /// `[T, D]`.
        dy: In<'a, bf16> [rows * hidden];
        /// `[T, D]`, the gradient that reaches x through the residual connection; if absent, 0.
        skip: Option<In<'a, bf16>> [rows * hidden];
        /// `[T, D]`, the input of the norm.
        x: In<'a, bf16> [rows * hidden];
        /// `[D]`.
        weight: In<'a, bf16> [hidden];
        /// T, the number of rows.
        rows: usize;
        /// D, the width of the model.
        hidden: usize;
        /// Whether the norm is LayerNorm; otherwise it is RMSNorm.
        layernorm: bool;
        /// ε.
        eps: f32;
    }
}

/// Returns the number of runs of rows; each run has one partial sum.
fn runs(rows: u128) -> u128 {
    rows.div_ceil(rows.div_ceil(264).max(8))
}

host_function! {
    /// Elements of `partials` for one parameter; a LayerNorm has two.
    pub fn partials = norm_partials(rows: usize, hidden: usize) -> u64
}

impl NormBackward<'_> {
    /// Returns the number of runs of rows; each run has one partial sum of the parameters' gradients.
    pub fn runs(rows: usize) -> usize {
        runs(rows as u128) as usize
    }

    /// The cost including [`NormWeightGradient`] of each parameter, assigned or accumulated, with or without `skip`.
    pub fn cost(rows: usize, hidden: usize, layernorm: bool, skip: bool, accumulate: bool) -> Cost {
        let row = if skip { 8 } else { 6 };
        let parameters = if layernorm { 2 } else { 1 };
        let gradient = 8 * Self::runs(rows) + if accumulate { 8 } else { 4 };
        let bytes = row * rows * hidden + 2 * hidden + parameters * gradient * hidden;
        Cost::new(0, bytes)
    }
}

kernel! {
    /// Computes the gradient of one parameter by adding its partial sums in order.
    pub struct NormWeightGradient = norm_weight_gradient {
        /// `[D]`, assigned, or added to.
        gradient: Out<'a, f32> [hidden];
        /// `[runs, D]`.
        partials: In<'a, f32> [runs(rows) * hidden];
        /// T, the number of rows.
        rows: usize;
        /// D, the width of the model.
        hidden: usize;
        /// Whether to add to `gradient` instead of assigning it.
        accumulate: bool;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::launchers;

    #[test]
    fn the_length_of_the_partials_matches_the_launcher() {
        let launchers = launchers::sim().unwrap();
        for rows in [1, 7, 8, 9, 264, 2112, 2113, 16_384, 100_003] {
            let said = partials(launchers, rows, 72).unwrap();
            assert_eq!(said, NormBackward::runs(rows) * 72);
        }
    }
}
