//! The kernels of `kernels/rows.cu`: elementwise arithmetic of rows, and sums over columns.

use crate::error::Result;
use crate::kernels::{self, In, Out, RowArithmetic, Stream, SumParts};
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use half::bf16;

/// The operation on two rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arithmetic {
    Add,
    Multiply,
}

/// `a + b` or `a ⊙ b` in bf16, `a [.., D]`, `b` of the same shape or one row `[D]`.
///
/// # Errors
/// Returns an error when the kernel does not support a dtype or a width.
pub(super) fn arithmetic(arithmetic: Arithmetic, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut out = a.unspecified_like();
    let to = out.output()?;
    let shape = [a.shape().rows(), a.shape().width()];
    write(arithmetic, to, a.input()?, shape, b)?;
    Ok(out)
}

/// Computes `a += b`; `b` has the shape of `a` or is one row.
///
/// # Errors
/// The same errors as [`arithmetic`].
pub(super) fn add_to(a: &mut Tensor, b: &Tensor) -> Result<()> {
    let shape = [a.shape().rows(), a.shape().width()];
    let out = a.output::<bf16>()?;
    // The kernel permits the output to overwrite a.
    write(Arithmetic::Add, out, out.as_input(), shape, b)
}

/// Writes `out` from the rows `from [rows, width]` and b.
fn write(
    arithmetic: Arithmetic,
    out: Out<'_, bf16>,
    from: In<'_, bf16>,
    [rows, width]: [usize; 2],
    b: &Tensor,
) -> Result<()> {
    RowArithmetic {
        out,
        a: from,
        b: b.input()?,
        rows,
        b_rows: b.elements() / width,
        width,
        multiply: arithmetic == Arithmetic::Multiply,
    }
    .launch(&Stream::of(b.device())?)
}

/// A range of columns: `pieces` pieces of `width` columns each, from column `first`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub first: usize,
    pub pieces: usize,
    pub width: usize,
}

impl Columns {
    /// All columns of `x`, as one piece.
    pub fn all(x: &Tensor) -> Self {
        Columns {
            first: 0,
            pieces: 1,
            width: x.shape().width(),
        }
    }

    /// The elements of `t` from the first of these columns to the end.
    fn of<'a>(&self, t: &'a Tensor) -> Result<In<'a, bf16>> {
        Ok(t.input()?.from_element(self.first))
    }
}

/// Upper bound of the number of rows that one thread block sums. The sums of these runs of rows are added in order.
const RUN: usize = 256;
const MOST_RUNS: usize = 64;

/// `to (+)= Σ_t x_t ⊙ y_t · s_t` over these columns; y and `s [T, pieces]` are 1 if absent. `to` (f32) has one
/// element per column, or one per column of a piece; in the second case the pieces are summed as well.
///
/// # Errors
/// Returns an error when the kernel does not support a dtype or a width.
pub(super) fn column_sums(
    to: &mut Tensor,
    accumulate: Accumulate,
    x: &Tensor,
    y: Option<&Tensor>,
    scales: Option<&Tensor>,
    columns: Columns,
) -> Result<()> {
    to.expect_dtype("rows", "the sum of columns", DType::F32)?;
    let (rows, pitch) = (x.shape().rows(), x.shape().width());
    let stream = Stream::of(x.device())?;
    let width = columns.pieces * columns.width;
    let runs = rows.div_ceil(RUN).clamp(1, MOST_RUNS);
    let mut parts = Tensor::unspecified(x.device(), DType::F32, [runs, width]);
    kernels::ColumnSums {
        parts: parts.output()?,
        x: columns.of(x)?,
        y: y.map(|y| columns.of(y)).transpose()?,
        scales: scales.map(Tensor::input).transpose()?,
        rows,
        width,
        pitch,
        piece: columns.width,
        runs,
    }
    .launch(&stream)?;
    let elements = to.elements();
    SumParts {
        out: to.output()?,
        parts: parts.input()?,
        count: runs * width / elements,
        elements,
        accumulate: accumulate == Accumulate::Add,
    }
    .launch(&stream)
}
