//! Matrix products on the CPU: bounds-checked views over the `gemm` crate, which was the fastest of
//! three measured on the model's shapes (docs/performance.md).

use super::block_rows;
use crate::tensor::dtype::Real;
use gemm_common::Parallelism;
use rayon::prelude::*;

/// Whether a result replaces the content of its destination or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// Overwrite.
    Assign,
    /// Add to it.
    Add,
}

/// A read-only matrix view with arbitrary strides, in elements.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major `rows` x `cols` with rows `stride` elements apart.
    ///
    /// # Panics
    /// Panics when the view is not inside `data`.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(),
            "a {rows} x {cols} matrix with stride {stride} needs more than {} elements",
            data.len()
        );
        Mat {
            data,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// Row-major `rows` x `cols`, contiguous.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Number of rows.
    pub fn row_count(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn col_count(&self) -> usize {
        self.cols
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows `first .. first + rows` of this view.
    pub fn rows(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows);
        Mat {
            data: if rows == 0 || self.cols == 0 {
                &[]
            } else {
                &self.data[first * self.row_stride..]
            },
            rows,
            ..self
        }
    }
}

/// A matrix view to write, row-major.
pub struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// Row-major `rows` x `cols` with rows `stride` elements apart.
    ///
    /// # Panics
    /// Panics when the view is not inside `data`, or rows overlap.
    pub fn strided(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            stride >= cols || rows <= 1,
            "rows of {cols} overlap at stride {stride}"
        );
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(),
            "a {rows} x {cols} matrix with stride {stride} needs more than {} elements",
            data.len()
        );
        MatMut {
            data,
            rows,
            cols,
            stride,
        }
    }

    /// Row-major `rows` x `cols`, contiguous.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }
}

/// `c = a · b` or `c += a · b` on the calling thread.
///
/// # Panics
/// Panics when the shapes do not fit.
pub fn gemm<T: Real>(c: MatMut<T>, accumulate: Accumulate, a: Mat<T>, b: Mat<T>) {
    assert_eq!((c.rows, c.cols), (a.rows, b.cols), "shape of the product");
    assert_eq!(a.cols, b.rows, "inner extents of the product");
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    if a.cols == 0 {
        if accumulate == Accumulate::Assign {
            for row in c.data.chunks_mut(c.stride.max(1)).take(c.rows) {
                row[..c.cols].fill(T::zero());
            }
        }
        return;
    }
    // The library writes columns: cᵀ = bᵀ · aᵀ. A single column is not transposed.
    let (depth, mut strides) = (a.cols, [1, c.stride]);
    let [mut left, mut right] = [a, b];
    if c.stride > 1 {
        strides.reverse();
        (left, right) = (right.t(), left.t());
    }
    // SAFETY: the constructors of the views checked that every index is inside their slices, and that rows of `c`,
    // which is borrowed mutably, do not overlap.
    unsafe {
        T::gemm()(
            left.rows,
            right.cols,
            depth,
            c.data.as_mut_ptr(),
            strides[0] as isize,
            strides[1] as isize,
            accumulate == Accumulate::Add,
            left.data.as_ptr(),
            left.col_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.col_stride as isize,
            right.row_stride as isize,
            T::one(),
            T::one(),
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `c = a · b` or `c += a · b` with `c` contiguous `[a.rows, b.cols]`, in parallel over fixed blocks
/// of rows.
pub fn matmul<T: Real>(c: &mut [T], accumulate: Accumulate, a: Mat<T>, b: Mat<T>) {
    assert_eq!(c.len(), a.rows * b.cols, "elements of the product");
    if c.is_empty() {
        return;
    }
    let block = block_rows(a.rows);
    c.par_chunks_mut(block * b.cols)
        .enumerate()
        .for_each(|(i, c)| {
            let rows = c.len() / b.cols;
            gemm(
                MatMut::new(c, rows, b.cols),
                accumulate,
                a.rows(i * block, rows),
                b,
            );
        });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f64> {
        (0..n)
            .map(|i| ((i * 7919 + seed * 104_729) % 1009) as f64 / 504.5 - 1.0)
            .collect()
    }

    #[test]
    fn matmul_equals_the_sum_over_the_inner_index_for_every_layout() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (300, 17, 33), (70, 0, 9)] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let at: Vec<f64> = (0..k * m).map(|i| a[i % m * k + i / m]).collect();
            let bt: Vec<f64> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            let start = numbers(m * n, 3);
            let product: Vec<f64> = (0..m * n)
                .map(|i| (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum())
                .collect();
            for ta in [false, true] {
                for tb in [false, true] {
                    for accumulate in [Accumulate::Assign, Accumulate::Add] {
                        let mut c = start.clone();
                        let a = if ta {
                            Mat::new(&at, k, m).t()
                        } else {
                            Mat::new(&a, m, k)
                        };
                        let b = if tb {
                            Mat::new(&bt, n, k).t()
                        } else {
                            Mat::new(&b, k, n)
                        };
                        matmul(&mut c, accumulate, a, b);
                        for i in 0..m * n {
                            let old = if accumulate == Accumulate::Add {
                                start[i]
                            } else {
                                0.0
                            };
                            assert!((c[i] - old - product[i]).abs() <= 1e-12 * k.max(1) as f64);
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "needs more than")]
    fn a_view_beyond_its_slice_is_refused() {
        Mat::new(&[0f32; 5], 2, 3);
    }
}
