//! `kernels/rows.cu`: arithmetic of whole rows `[T, D]`, sums of their columns, rows behind a sigmoid gate.
//!
//! `out = a + b` or `a ⊙ b`. `parts[n, d] = Σ x[t, d] · y[t, d] · s[t, d / piece]` over the rows t of run n.
//! `gates_t = σ(⟨x_t, w⟩)`, `y_t = gates_t v_t`; backward `dv_t = gates_t dy_t`, `dx_t (+)= dscores_t w`,
//! `dscores_t = gates_t (1 − gates_t) ⟨dy_t, v_t⟩`.

use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `a + b`, or `a ⊙ b`, assigned.
    pub struct RowArithmetic = row_arithmetic {
        /// `[T, D]`; may be a.
        out: Out<'a, bf16> [rows * width];
        /// `[T, D]`.
        a: In<'a, bf16> [rows * width];
        /// `[T, D]`, or one row for all.
        b: In<'a, bf16> [b_rows * width];
        /// T.
        rows: usize;
        /// Rows of b: T, or 1.
        b_rows: usize;
        /// D.
        width: usize;
        /// Whether the rows are multiplied, or added.
        multiply: bool;
    }
}

kernel! {
    /// Sums of columns over runs of rows, assigned. Run n has the rows from `n·⌈T / runs⌉` on.
    pub struct ColumnSums = column_sums {
        /// `[runs, D]`.
        parts: Out<'a, f32> [runs * width];
        /// T rows of D elements, `pitch` apart.
        x: In<'a, bf16> [rows.saturating_sub(1) * pitch + width];
        /// Like x; without, 1.
        y: Option<In<'a, bf16>> [rows.saturating_sub(1) * pitch + width];
        /// s `[T, D / piece]`; without, 1.
        scales: Option<In<'a, f32>> [rows * (width / piece.max(1))];
        /// T.
        rows: usize;
        /// D.
        width: usize;
        /// Elements from the start of a row to that of the next.
        pitch: usize;
        /// Elements of a row that share a scale.
        piece: usize;
        /// Runs that the rows are divided into.
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
        /// T.
        rows: usize;
        /// D.
        width: usize;
    }
}

kernel! {
    /// The gradients of x, v and the scores ⟨x, w⟩.
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
        /// T.
        rows: usize;
        /// D.
        width: usize;
        /// Whether `dx` is added to, or assigned.
        accumulate: bool;
    }
}
