//! Tools of the CPU device: parallel loops over fixed blocks, vector dispatch, matrix products.
//!
//! Work is divided into blocks whose bounds depend only on shapes, each block runs on one thread, and partial results
//! are added in block order. The resulting bytes therefore do not depend on the number of threads.

mod inner;
mod matmul;
mod scratch;
pub mod vector;

pub use inner::{gemm_over_inner, matmul_over_inner};
pub use matmul::{Accumulate, Mat, MatMut, gemm, matmul};
pub use scratch::Scratch;

use rayon::prelude::*;
use std::ops::Range;

/// Runs `f` compiled for the widest vector instructions of this machine. Functions that `f` calls benefit only if
/// they are inlined into it.
#[inline(always)]
pub fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Returns the number of rows of a block when `rows` rows are divided into about sixteen blocks of 32 to 256 rows.
pub fn block_rows(rows: usize) -> usize {
    rows.div_ceil(16).next_multiple_of(8).clamp(32, 256)
}

/// Cuts `0..n` into blocks of `block` and runs `f(block index, range)` on all of them in parallel;
/// the results come in block order.
pub fn blocks<R: Send>(
    n: usize,
    block: usize,
    f: impl Fn(usize, Range<usize>) -> R + Sync,
) -> Vec<R> {
    // Not generic over `f`: the code of rayon takes long to compile.
    fn run<R: Send>(
        n: usize,
        block: usize,
        f: &(dyn Fn(usize, Range<usize>) -> R + Sync),
    ) -> Vec<R> {
        let blocks = (0..n.div_ceil(block)).into_par_iter();
        let results = blocks.map(|i| f(i, i * block..(i * block + block).min(n)));
        results.collect()
    }
    run(n, block, &f)
}

/// Runs `f(first row, rows)` in parallel over blocks of rows of `out`, a matrix of `width` columns;
/// the results come in block order.
pub fn each_row_block<T: Send, R: Send>(
    out: &mut [T],
    width: usize,
    f: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Vec<R> {
    // As in `blocks`.
    fn run<T: Send, R: Send>(
        out: &mut [T],
        width: usize,
        f: &(dyn Fn(usize, &mut [T]) -> R + Sync),
    ) -> Vec<R> {
        let block = block_rows(out.len() / width);
        let chunks = out.par_chunks_mut(block * width).enumerate();
        chunks.map(|(i, rows)| f(i * block, rows)).collect()
    }
    match out.is_empty() {
        true => vec![],
        false => run(out, width, &f),
    }
}

/// Number of elements of a block of [`add`] and [`add_assign`].
const BLOCK: usize = 1 << 14;

/// Writes `a + b`, elementwise.
pub fn add<T: crate::tensor::dtype::Real>(sum: &mut [T], a: &[T], b: &[T]) {
    assert!(sum.len() == a.len() && sum.len() == b.len());
    sum.par_chunks_mut(BLOCK)
        .zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)))
        .for_each(|(sum, (a, b))| {
            vectorized(
                #[inline(always)]
                || {
                    for (s, (&a, &b)) in sum.iter_mut().zip(a.iter().zip(b)) {
                        *s = a + b;
                    }
                },
            );
        });
}

/// Adds `terms` to `sum`, elementwise.
pub fn add_assign<T: crate::tensor::dtype::Real>(sum: &mut [T], terms: &[T]) {
    assert_eq!(sum.len(), terms.len());
    sum.par_chunks_mut(BLOCK)
        .zip(terms.par_chunks(BLOCK))
        .for_each(|(sum, terms)| {
            vectorized(
                #[inline(always)]
                || {
                    for (s, &t) in sum.iter_mut().zip(terms) {
                        *s += t;
                    }
                },
            );
        });
}

/// Writes the sum of `partials`, taken in order, to `out`; the sum of none is 0.
pub fn write_sum<T: crate::tensor::dtype::Real>(
    out: &mut [T],
    accumulate: Accumulate,
    partials: Vec<Vec<T>>,
) {
    if accumulate == Accumulate::Assign {
        out.fill(T::zero());
    }
    for (o, s) in out.iter_mut().zip(sum_in_order(partials)) {
        *o += s;
    }
}

/// Adds partial sums of equal length into the first, in order.
pub fn sum_in_order<T: crate::tensor::dtype::Real>(partials: Vec<Vec<T>>) -> Vec<T> {
    let mut partials = partials.into_iter();
    let mut sum = partials.next().unwrap_or_default();
    for p in partials {
        for (s, t) in sum.iter_mut().zip(p) {
            *s += t;
        }
    }
    sum
}
