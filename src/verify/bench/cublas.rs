//! Describes the products of the grouped GEMMs to cuBLAS. A row-major [p, q] matrix is a column-major [q, p] matrix in
//! cuBLAS, so cuBLAS computes the transpose of our result, with our b as its a and our a as its b.

use crate::device::cublas::{Batch, Matrix};
use crate::device::cublas_grouped::{Group, Grouped};
use crate::device::cuda::Gpu;
use crate::verify::kernels::grouped_gemm::{Product, Shape};

/// Returns a product over groups of equal size as one batch.
///
/// # Errors
/// A sentence, if the groups differ in size.
pub fn batch(product: Product, shape: &Shape) -> Result<Batch, String> {
    let (r, n, k) = (shape.counts[0], shape.n, shape.k);
    if shape.counts.iter().any(|&count| count != r) {
        return Err("its batches need groups of equal size".into());
    }
    let matrix = |rows, columns, transposed| Matrix {
        rows,
        columns,
        transposed,
        f32: false,
    };
    let [a, b, result] = match product {
        // outᵀ[n, r] = (wᵀ[k, n])ᵀ xᵀ[k, r]
        Product::Forward => [matrix(k, n, true), matrix(k, r, false), matrix(n, r, false)],
        // dxᵀ[k, r] = wᵀ[k, n] doutᵀ[n, r]
        Product::InputGradient => [
            matrix(k, n, false),
            matrix(n, r, false),
            matrix(k, r, false),
        ],
        // dwᵀ[k, n] = xᵀ[k, r] (doutᵀ[n, r])ᵀ
        Product::WeightGradient => {
            let dw = Matrix {
                f32: true,
                ..matrix(k, n, false)
            };
            [matrix(k, r, false), matrix(n, r, true), dw]
        }
    };
    Ok(Batch {
        a,
        b,
        result,
        products: shape.counts.len(),
    })
}

/// Returns a product over groups of any size. `sets` are the addresses of the buffers of the kernel's problem: result, a,
/// b.
///
/// # Errors
/// A sentence, if the library is not available or does not support the product.
pub fn grouped<'a>(
    gpu: &'a Gpu,
    product: Product,
    shape: &Shape,
    sets: &[Vec<*mut u8>],
) -> Result<Grouped<'a>, String> {
    let (transposed, f32_result) = match product {
        Product::Forward => ([true, false], false),
        Product::InputGradient => ([false, false], false),
        Product::WeightGradient => ([false, true], true),
    };
    Grouped::new(gpu, groups(product, shape), transposed, f32_result, sets)
}

/// Returns the positions at which each group's matrices begin.
fn groups(product: Product, shape: &Shape) -> Vec<Group> {
    let (n, k) = (shape.n, shape.k);
    let mut row = 0;
    let each = shape.counts.iter().enumerate().map(|(expert, &rows)| {
        let (weight, x, y) = (2 * expert * n * k, 2 * row * k, 2 * row * n);
        row += rows;
        match product {
            Product::Forward => Group {
                sizes: [n, rows, k],
                at: [weight, x, y],
                leading: [k, k, n],
            },
            Product::InputGradient => Group {
                sizes: [k, rows, n],
                at: [weight, y, x],
                leading: [k, n, k],
            },
            // The weight gradient is in f32.
            Product::WeightGradient => Group {
                sizes: [k, n, rows],
                at: [x, y, 2 * weight],
                leading: [k, n, k],
            },
        }
    });
    each.collect()
}
