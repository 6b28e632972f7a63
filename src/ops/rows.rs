//! The kernels of `kernels/rows.cu`: arithmetic of whole rows, and sums of their columns.

use crate::device::stream;
use crate::error::Result;
use crate::launch;
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use std::ptr::null;

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
    // SAFETY: out is like a.
    unsafe { write(arithmetic, out.pointer_mut(), a, b) }?;
    Ok(out)
}

/// `a += b`, `b` the same or one row.
///
/// # Errors
/// As [`arithmetic`].
pub(super) fn add_to(a: &mut Tensor, b: &Tensor) -> Result<()> {
    let out = a.pointer_mut();
    // SAFETY: the kernel may write over a.
    unsafe { write(Arithmetic::Add, out, a, b) }
}

/// # Safety
/// `out` has room for as many elements as a.
unsafe fn write(
    arithmetic: Arithmetic,
    out: *mut std::ffi::c_void,
    a: &Tensor,
    b: &Tensor,
) -> Result<()> {
    for (what, t) in [("the first rows", a), ("the second rows", b)] {
        t.expect_dtype("rows", what, DType::Bf16)?;
    }
    let width = a.shape().width();
    let b_rows = b.elements() / width;
    // SAFETY: the tensors have the shapes that rows.cu's header names.
    unsafe {
        launch!(
            a.device().launchers()?,
            row_arithmetic(
                out,
                a.pointer(),
                b.pointer(),
                a.shape().rows() as i64,
                b_rows as i64,
                width as i32,
                (arithmetic == Arithmetic::Multiply).into(),
                stream(),
            )
        )
    }
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
    let (launchers, rows, pitch) = (x.device().launchers()?, x.shape().rows(), x.shape().width());
    let width = columns.pieces * columns.width;
    let runs = rows.div_ceil(RUN).clamp(1, MOST_RUNS);
    let mut parts = Tensor::unspecified(x.device(), DType::F32, [runs, width]);
    let at = |t: &Tensor| t.pointer::<u16>().wrapping_add(columns.first).cast();
    let length = to.elements();
    // SAFETY: the tensors have the shapes that rows.cu's and sum_parts.cu's headers name.
    unsafe {
        launch!(
            launchers,
            column_sums(
                parts.pointer_mut(),
                at(x),
                y.map_or(null(), at),
                scales.map_or(null(), Tensor::pointer),
                rows as i64,
                width as i32,
                pitch as i64,
                columns.width as i32,
                runs as i32,
                stream(),
            )
        )?;
        launch!(
            launchers,
            sum_parts(
                to.pointer_mut(),
                parts.pointer(),
                (runs * width / length) as i32,
                length as i64,
                (accumulate == Accumulate::Add).into(),
                stream(),
            )
        )
    }
}
