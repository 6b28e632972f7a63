//! `kernels/qk_norm.cu`: RMSNorm of pieces of rows, for queries and keys inside the fused projection.
//!
//! For a piece x of n elements, `r = 1 / √(mean(x²) + ε)`: `y = x r ⊙ w`; `dx = r (w ⊙ dy − x r² mean(w ⊙ dy ⊙ x))`.
//! Without w, pieces are copied. The rows of x, y, dx and dy begin `pitch` elements apart; the elements between rows
//! do not change.

use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `y = x r ⊙ w` and r, assigned.
    pub struct QkNorm = qk_norm {
        /// T rows of `[pieces, width]`.
        y: Out<'a, bf16> [rows.saturating_sub(1) * pitch + pieces * width];
        /// r `[T, pieces]`; needed with w.
        scales: Option<Out<'a, f32>> [rows * pieces];
        /// T rows of `[pieces, width]`.
        x: In<'a, bf16> [rows.saturating_sub(1) * pitch + pieces * width];
        /// `[width]`.
        w: Option<In<'a, bf16>> [width];
        /// T, the number of rows.
        rows: usize;
        /// Number of pieces of a row.
        pieces: usize;
        /// n, the number of elements of a piece.
        width: usize;
        /// Elements from the start of a row to the start of the next row.
        pitch: usize;
        /// ε.
        eps: f32;
    }
}

kernel! {
    /// `dx = r (w ⊙ dy − x r² mean(w ⊙ dy ⊙ x))`, assigned.
    pub struct QkNormBackward = qk_norm_backward {
        /// T rows of `[pieces, width]`.
        dx: Out<'a, bf16> [rows.saturating_sub(1) * pitch + pieces * width];
        /// r `[T, pieces]`; needed with w.
        scales: Option<In<'a, f32>> [rows * pieces];
        /// T rows of `[pieces, width]`.
        dy: In<'a, bf16> [rows.saturating_sub(1) * pitch + pieces * width];
        /// T rows of `[pieces, width]`.
        x: In<'a, bf16> [rows.saturating_sub(1) * pitch + pieces * width];
        /// `[width]`.
        w: Option<In<'a, bf16>> [width];
        /// T, the number of rows.
        rows: usize;
        /// Number of pieces of a row.
        pieces: usize;
        /// n, the number of elements of a piece.
        width: usize;
        /// Elements from the start of a row to the start of the next row.
        pitch: usize;
    }
}
