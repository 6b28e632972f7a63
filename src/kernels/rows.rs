//! `kernels/rows.cu`: elementwise arithmetic of rows `[T, D]`, sums over columns, and rows multiplied by a sigmoid
//! gate.
//!
//! `out = a + b` or `a ⊙ b`. `parts[n, d] = Σ x[t, d] · y[t, d] · s[t, d / piece]` over the rows t of run n.
//! `gates_t = σ(⟨x_t, w⟩)`, `y_t = gates_t v_t`; backward `dv_t = gates_t dy_t`, `dx_t (+)= dscores_t w`,
//! `dscores_t = gates_t (1 − gates_t) ⟨dy_t, v_t⟩`.

use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `a + b`, or `a ⊙ b`, assigned.
    pub struct RowArithmetic = row_arithmetic {
        /// `[T, D]`; may be the memory of a.
        out: Out<'a, bf16> [rows * width];
        /// `[T, D]`.
        a: In<'a, bf16> [rows * width];
        /// `[T, D]`, or one row for all.
        b: In<'a, bf16> [b_rows * width];
        /// T, the number of rows.
        rows: usize;
        /// Rows of b: T, or 1.
        b_rows: usize;
        /// D, the width of a row.
        width: usize;
        /// Whether to multiply the rows; otherwise they are added.
        multiply: bool;
    }
}

kernel! {
    /// Computes sums of columns over runs of rows, assigned. Run n begins with row `n·⌈T / runs⌉`.
    pub struct ColumnSums = column_sums {
        /// `[runs, D]`.
        parts: Out<'a, f32> [runs * width];
        /// T rows of D elements. The starts of two rows are `pitch` elements apart.
        x: In<'a, bf16> [rows.saturating_sub(1) * pitch + width];
        /// Like x; if absent, 1.
        y: Option<In<'a, bf16>> [rows.saturating_sub(1) * pitch + width];
        /// s `[T, D / piece]`; if absent, 1.
        scales: Option<In<'a, f32>> [rows * (width / piece.max(1))];
        /// T, the number of rows.
        rows: usize;
        /// D, the width of a row.
        width: usize;
        /// Elements from the start of a row to the start of the next row.
        pitch: usize;
        /// Number of elements of a row that share a scale.
        piece: usize;
        /// Number of runs into which the rows are divided.
        runs: usize;
    }
}

kernel! {
    /// `y_t = σ(⟨x_t, w⟩) v_t`, and the gates, assigned.
    pub struct GatedRows = gated_rows {
        /// `[T, D]`.
        y: Out<'a, bf16> [rows * width];
        /// `[T]`.
        gates: Out<'a, f32> [rows];
        /// `[T, D]`.
        x: In<'a, bf16> [rows * width];
        /// `[D]`.
        w: In<'a, bf16> [width];
        /// `[T, D]`.
        v: In<'a, bf16> [rows * width];
        /// T, the number of rows.
        rows: usize;
        /// D, the width of a row.
        width: usize;
    }
}

kernel! {
    /// Computes the gradients of x, v and the scores ⟨x, w⟩.
    pub struct GatedRowsBackward = gated_rows_backward {
        /// `[T, D]`, assigned, or added to.
        dx: Out<'a, bf16> [rows * width];
        /// `[T, D]`, assigned.
        dv: Out<'a, bf16> [rows * width];
        /// `[T]`, assigned.
        dscores: Out<'a, f32> [rows];
        /// `[T, D]`.
        dy: In<'a, bf16> [rows * width];
        /// `[T]`.
        gates: In<'a, f32> [rows];
        /// `[T, D]`.
        v: In<'a, bf16> [rows * width];
        /// `[D]`.
        w: In<'a, bf16> [width];
        /// T, the number of rows.
        rows: usize;
        /// D, the width of a row.
        width: usize;
        /// Whether to add to `dx` instead of assigning it.
        accumulate: bool;
    }
}
