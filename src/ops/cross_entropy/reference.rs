//! The output head and the cross-entropy on slices: the implementation for the CPU.

use super::*;
use crate::tensor::cpu::vector::{exp_and_sum, max};
use crate::tensor::cpu::{Mat, Scratch, matmul, matmul_over_inner};
use rayon::prelude::*;

/// The inputs.
pub struct Head<'a, T> {
    pub x: &'a [T],         // [T, D]
    pub weight: &'a [T],    // [V, D]
    pub targets: &'a [i32], // [T]
    /// D.
    pub width: usize,
}

/// The destinations of the gradients, and the factor of every loss.
pub struct Gradient<'a, T> {
    pub dx: &'a mut [T],      // [T, D]
    pub dweight: &'a mut [T], // [V, D]
    pub factor: T,
}

impl<T: Real> Head<'_, T> {
    /// Writes each token's loss and, with `gradient`, the gradient of `factor · Σ losses`.
    pub fn losses(&self, losses: &mut [T], mut gradient: Option<Gradient<T>>) {
        let (tokens, width) = (self.targets.len(), self.width);
        let vocabulary = self.weight.len() / width;
        let weight = Mat::new(self.weight, vocabulary, width);
        let chunk = (LOGITS / vocabulary).clamp(1, LOGIT_TOKENS);
        let mut logits = Scratch::<T>::new(chunk.min(tokens) * vocabulary);
        let mut accumulate = Accumulate::Assign;
        if let Some(gradient) = gradient.as_mut().filter(|_| tokens == 0) {
            gradient.dweight.fill(T::zero());
        }
        for first in (0..tokens).step_by(chunk) {
            let rows = chunk.min(tokens - first);
            let logits = &mut logits[..rows * vocabulary];
            let x = Mat::new(&self.x[first * width..][..rows * width], rows, width);
            matmul(logits, Accumulate::Assign, x, weight.t());
            let block = cpu::block_rows(rows);
            let factor = gradient.as_ref().map(|g| g.factor);
            logits
                .par_chunks_mut(block * vocabulary)
                .zip(losses[first..][..rows].par_chunks_mut(block))
                .zip(self.targets[first..][..rows].par_chunks(block))
                .for_each(|((logits, losses), targets)| {
                    softmax_losses(logits, losses, targets, factor);
                });
            if let Some(gradient) = &mut gradient {
                let dlogits = Mat::new(logits, rows, vocabulary);
                let dx = &mut gradient.dx[first * width..][..rows * width];
                matmul(dx, Accumulate::Assign, dlogits, weight);
                matmul_over_inner(gradient.dweight, accumulate, dlogits.t(), x);
                accumulate = Accumulate::Add;
            }
        }
    }
}

/// Writes the losses of the rows of `logits`. With a factor, it replaces the rows by their gradients.
fn softmax_losses<T: Real>(logits: &mut [T], losses: &mut [T], targets: &[i32], factor: Option<T>) {
    let vocabulary = logits.len() / targets.len();
    cpu::vectorized(
        #[inline(always)]
        || {
            let rows = logits.chunks_exact_mut(vocabulary);
            for ((row, loss), &target) in rows.zip(losses).zip(targets) {
                let of_target = row[target as usize];
                let largest = max(row);
                let sum = exp_and_sum(row, T::one(), largest);
                *loss = sum.ln() + largest - of_target;
                if let Some(factor) = factor {
                    let scale = factor / sum;
                    row.iter_mut().for_each(|z| *z *= scale);
                    row[target as usize] -= factor;
                }
            }
        },
    );
}

/// Writes `factor · values`, rows of `width`.
pub fn scaled<T: Real>(
    out: &mut [T],
    accumulate: Accumulate,
    values: &[T],
    factor: T,
    width: usize,
) {
    cpu::each_row_block(out, width, |first, out| {
        cpu::vectorized(
            #[inline(always)]
            || {
                for (o, &v) in out.iter_mut().zip(&values[first * width..]) {
                    *o = accumulate.onto(*o, v * factor);
                }
            },
        );
    });
}
