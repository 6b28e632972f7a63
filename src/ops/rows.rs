//! The kernels of `kernels/rows.cu`: arithmetic of whole rows, and sums of their columns.

use crate::error::Result;
use crate::kernels::{self, In, Out, RowArithmetic, Stream, SumParts};
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use half::bf16;

/// What becomes of two rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arithmetic {
    Add,
    Multiply,
}

/// `a + b` or `a ⊙ b` in bf16, `a [.., D]`, `b` the same or one row `[D]`.
///
/// # Errors
/// When a dtype or a width is not one of the kernel's.
pub(super) fn arithmetic(arithmetic: Arithmetic, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut out = a.unspecified_like();
    let to = out.output()?;
    let shape = [a.shape().rows(), a.shape().width()];
    write(arithmetic, to, a.input()?, shape, b)?;
    Ok(out)
}

/// `a += b`, `b` the same or one row.
///
/// # Errors
/// As [`arithmetic`].
pub(super) fn add_to(a: &mut Tensor, b: &Tensor) -> Result<()> {
    let shape = [a.shape().rows(), a.shape().width()];
    let out = a.output::<bf16>()?;
    // The kernel may write over a.
    write(Arithmetic::Add, out, out.as_input(), shape, b)
}

/// `out` from rows `from [rows, width]` and b.
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

/// Columns of rows: `pieces` of `width` from column `first` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub first: usize,
    pub pieces: usize,
    pub width: usize,
}

impl Columns {
    /// All of `x`'s, as one piece.
    pub fn all(x: &Tensor) -> Self {
        Columns {
            first: 0,
            pieces: 1,
            width: x.shape().width(),
        }
    }

    /// The elements of `t` from the first of these columns on.
    fn of<'a>(&self, t: &'a Tensor) -> Result<In<'a, bf16>> {
        Ok(t.input()?.from_element(self.first))
    }
}

/// Rows whose columns are summed at most by one block: the sums of such runs are added in order.
const RUN: usize = 256;
const MOST_RUNS: usize = 64;

/// `to (+)= Σ_t x_t ⊙ y_t · s_t` over these columns, y and s being 1 where they are not given; `s [T, pieces]`.
/// `to` (f32) has an element for every column, or for those of one piece: then the pieces are summed too.
///
/// # Errors
/// When a dtype or a width is not one of the kernel's.
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
