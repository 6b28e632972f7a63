//! Products with a long inner extent: gradients of weights, summed over all tokens.

use super::{Accumulate, Mat, MatMut, Scratch, gemm, matmul};
use crate::tensor::dtype::Real;
use rayon::prelude::*;

/// Upper bound of the number of blocks into which the inner extent is divided.
const BLOCKS: usize = 8;
/// Lower bound of the length of such a block.
const SHORTEST: usize = 256;
/// Upper bound of the number of elements of the destination. A larger destination has enough rows to divide among
/// threads, and the partial products would need too much memory.
const LARGEST: usize = 1 << 19;

/// Inner extent of one call of the GEMM library when the destination stays in the cache. The library may read columns
/// of `a` in place, and this many rows of `a` stay in the cache as well. For a weight of 128 x 352 and 512 rows read
/// from memory, each of two cores reached 159 GFLOP/s instead of 131.
const PIECE: usize = 192;
/// Upper bound of the number of elements of a destination that stays in the cache.
const CACHED: usize = 1 << 17;

/// `c = a · b` or `c += a · b` on the calling thread with `c` contiguous `[a.rows, b.cols]`, for an inner extent that may be
/// long.
pub fn gemm_over_inner<T: Real>(c: &mut [T], mut accumulate: Accumulate, a: Mat<T>, b: Mat<T>) {
    let (rows, inner, cols) = (a.row_count(), b.row_count(), b.col_count());
    let piece = match c.len() <= CACHED {
        true => inner.div_ceil(inner.div_ceil(PIECE).max(1)).max(1),
        false => inner.max(1),
    };
    for first in (0..inner.max(1)).step_by(piece) {
        let length = piece.min(inner - first);
        let (a, b) = (a.t().rows(first, length).t(), b.rows(first, length));
        gemm(MatMut::new(c, rows, cols), accumulate, a, b);
        accumulate = Accumulate::Add;
    }
}

/// `c = a · b` or `c += a · b` with `c` contiguous `[a.rows, b.cols]`, in parallel over fixed blocks
/// of the inner extent, whose products are added in order.
///
/// [`matmul`] would divide the few rows of a weight into blocks of 32 rows, each of which packs all of `b`: this
/// reached 53 GFLOP/s, compared with 78 here, on one core for a weight of 384 x 128.
pub fn matmul_over_inner<T: Real>(c: &mut [T], accumulate: Accumulate, a: Mat<T>, b: Mat<T>) {
    let (inner, size) = (b.row_count(), c.len());
    let block = inner.div_ceil(BLOCKS).next_multiple_of(8).max(SHORTEST);
    if size == 0 || size > LARGEST || inner <= block {
        return matmul(c, accumulate, a, b);
    }
    let mut partials = Scratch::<T>::new(inner.div_ceil(block) * size);
    partials
        .par_chunks_mut(size)
        .enumerate()
        .for_each(|(i, partial)| {
            let length = block.min(inner - i * block);
            let (a, b) = (a.t().rows(i * block, length).t(), b.rows(i * block, length));
            gemm_over_inner(partial, Accumulate::Assign, a, b);
        });
    const PART: usize = 1 << 12;
    c.par_chunks_mut(PART).enumerate().for_each(|(i, c)| {
        if accumulate == Accumulate::Assign {
            c.fill(T::zero());
        }
        for partial in partials.chunks_exact(size) {
            super::vectorized(
                #[inline(always)]
                || {
                    for (c, &p) in c.iter_mut().zip(&partial[i * PART..]) {
                        *c += p;
                    }
                },
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_the_inner_extent_sum_to_the_complete_product() {
        // Small integers: every sum is exact.
        for inner in [0, 3, SHORTEST, SHORTEST + 1, BLOCKS * SHORTEST + 77] {
            let (rows, cols) = (5, 3);
            let number = |i: usize| (i * 7 % 11) as f64 - 5.0;
            let a: Vec<f64> = (0..inner * rows).map(number).collect();
            let b: Vec<f64> = (0..inner * cols).map(|i| number(i + 4)).collect();
            for accumulate in [Accumulate::Assign, Accumulate::Add] {
                let mut c = vec![100.0; rows * cols];
                let at = Mat::new(&a, inner, rows).t();
                matmul_over_inner(&mut c, accumulate, at, Mat::new(&b, inner, cols));
                for (i, found) in c.iter().enumerate() {
                    let of = |k: usize| a[k * rows + i / cols] * b[k * cols + i % cols];
                    let kept = if accumulate == Accumulate::Add {
                        100.0
                    } else {
                        0.0
                    };
                    assert_eq!(*found, kept + (0..inner).map(of).sum::<f64>());
                }
            }
        }
    }
}
