//! The products of the grouped GEMMs in cuBLAS. A row-major [p, q] matrix is a column-major [q, p] matrix in
//! cuBLAS, so cuBLAS computes the transpose of our result, with our b as its a and our a as its b.

use super::measure::{Peer, Side, in_turn, replayed};
use super::record::{CUBLAS, CUBLAS_GROUPED};
use crate::device::cublas::{Batch, Matmul, Matrix};
use crate::device::cublas_grouped::{Group, Grouped};
use crate::device::cuda::Gpu;
use crate::verify::kernels::Run;
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

/// Returns the sides that compute a product with cuBLAS on the buffers of `runs`, one of equal groups and, for more than
/// one group, one of groups of any size; each with the reason if it cannot run.
pub fn sides<'a>(
    gpu: &'a Gpu,
    product: Product,
    shape: &Shape,
    runs: &'a [Run<'a>],
) -> (Vec<Peer>, Vec<Side<'a>>) {
    let mut sides = Vec::new();
    let batched =
        batch(product, shape).and_then(|batch| Matmul::started(gpu, batch, &runs[0].pointers()));
    let batched = batched.map(|(matmul, cublas)| {
        let launch = move |set: usize| {
            let _workspace = &cublas;
            matmul.launch(gpu, &runs[set].pointers())
        };
        sides.push(replayed(gpu, runs.len(), launch));
    });
    let mut peers = vec![(CUBLAS, batched)];
    if shape.counts.len() > 1 {
        let (transposed, f32_result) = match product {
            Product::Forward => ([true, false], false),
            Product::InputGradient => ([false, false], false),
            Product::WeightGradient => ([false, true], true),
        };
        let pointers: Vec<_> = runs.iter().map(Run::pointers).collect();
        let groups = groups(product, shape);
        let grouped = Grouped::new(gpu, groups, transposed, f32_result, &pointers);
        let grouped = grouped.map(|grouped| {
            // It copies its sizes to the GPU at every launch, which a graph cannot capture.
            sides.push(in_turn(runs.len(), move |set| grouped.launch(set)));
        });
        peers.push((CUBLAS_GROUPED, grouped));
    }
    (peers, sides)
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
