//! `kernels/norm.cu`: RMSNorm (1910.07467) and LayerNorm (1607.06450) of each row, with the residual add before them, and
//! their gradients.
//!
//! `s = x + residual`, rounded to bf16; `y = r s ⊙ w`, `r = 1 / √(mean(s²) + ε)`, or with a bias `y = r (s − mean(s)) ⊙ w + b`,
//! `r = 1 / √(var(s) + ε)`. The gradients of w and b are sums over runs of rows. D is a multiple of 8, at most 8192.

use super::cost::Cost;
use super::{In, Out, host_function, kernel};
use half::bf16;

kernel! {
    /// The sum with the residual, where there is one, and the norm of it.
    pub struct NormForward = norm_forward {
        /// `[T, D]`.
        y: Out<'a, bf16> [rows * hidden];
        /// `[T, D]`, x + residual; may be `x` or `residual`. Present exactly with `residual`.
        sum: Option<Out<'a, bf16>> [rows * hidden];
        /// `[T, D]`.
        x: In<'a, bf16> [rows * hidden];
        /// `[T, D]`.
        residual: Option<In<'a, bf16>> [rows * hidden];
        /// `[D]`.
        weight: In<'a, bf16> [hidden];
        /// `[D]`; present: LayerNorm.
        bias: Option<In<'a, bf16>> [hidden];
        /// T.
        rows: usize;
        /// D.
        hidden: usize;
        /// ε.
        eps: f32;
    }
}

impl NormForward<'_> {
    /// Of so many rows, with or without the residual add.
    pub fn cost(rows: usize, hidden: usize, layernorm: bool, residual: bool) -> Cost {
        let row = if residual { 8 } else { 4 };
        let parameters = if layernorm { 2 } else { 1 };
        Cost::new(0, row * rows * hidden + 2 * parameters * hidden)
    }
}

kernel! {
    /// dx, and the partial sums of the parameters' gradients.
    pub struct NormBackward = norm_backward {
        /// `[T, D]`, assigned; may be `skip`.
        dx: Out<'a, bf16> [rows * hidden];
        /// `[1 or 2, runs, D]`: of w and, for LayerNorm, of b; see [`partials`].
        partials: Out<'a, f32> [(1 + u128::from(layernorm)) * runs(rows) * hidden];
        /// `[T, D]`.
        dy: In<'a, bf16> [rows * hidden];
        /// `[T, D]`, the gradient that reaches x past the norm; absent: 0.
        skip: Option<In<'a, bf16>> [rows * hidden];
        /// `[T, D]`, what was normalised.
        x: In<'a, bf16> [rows * hidden];
        /// `[D]`.
        weight: In<'a, bf16> [hidden];
        /// T.
        rows: usize;
        /// D.
        hidden: usize;
        /// Whether the norm is LayerNorm, or RMSNorm.
        layernorm: bool;
        /// ε.
        eps: f32;
    }
}

/// Runs of rows, each of which leaves a partial sum.
fn runs(rows: u128) -> u128 {
    rows.div_ceil(rows.div_ceil(264).max(8))
}

host_function! {
    /// Elements of `partials` for one parameter; a LayerNorm has two.
    pub fn partials = norm_partials(rows: usize, hidden: usize) -> u64
}

impl NormBackward<'_> {
    /// Runs of rows, each of which leaves a partial sum of the parameters' gradients.
    pub fn runs(rows: usize) -> usize {
        runs(rows as u128) as usize
    }

    /// Together with [`NormWeightGradient`] of each parameter, assigned or accumulated; with or without `skip`.
    pub fn cost(rows: usize, hidden: usize, layernorm: bool, skip: bool, accumulate: bool) -> Cost {
        let row = if skip { 8 } else { 6 };
        let parameters = if layernorm { 2 } else { 1 };
        let gradient = 8 * Self::runs(rows) + if accumulate { 8 } else { 4 };
        let bytes = row * rows * hidden + 2 * hidden + parameters * gradient * hidden;
        Cost::new(0, bytes)
    }
}

kernel! {
    /// The gradient of one parameter from its partial sums, in order.
    pub struct NormWeightGradient = norm_weight_gradient {
        /// `[D]`, assigned, or added to.
        gradient: Out<'a, f32> [hidden];
        /// `[runs, D]`.
        partials: In<'a, f32> [runs(rows) * hidden];
        /// T.
        rows: usize;
        /// D.
        hidden: usize;
        /// Whether `gradient` is added to, or assigned.
        accumulate: bool;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::launchers;

    #[test]
    fn the_length_of_the_partials_is_what_the_launcher_says() {
        let launchers = launchers::sim().unwrap();
        for rows in [1, 7, 8, 9, 264, 2112, 2113, 16_384, 100_003] {
            let said = partials(launchers, rows, 72).unwrap();
            assert_eq!(said, NormBackward::runs(rows) * 72);
        }
    }
}
