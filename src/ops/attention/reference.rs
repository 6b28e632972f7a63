//! The mathematics of attention on plain slices: it is the CPU device.

use crate::cpu::vector::{exp_and_sum, max, sum_over};
use crate::cpu::{self, Accumulate, Mat, MatMut, Scratch, gemm};
use crate::dtype::Real;
use crate::ops::heads::Heads;
use rayon::prelude::*;

/// Queries whose scores exist at a time.
const QUERIES: usize = 64;

/// One sequence's rows of `qkv`, with a place in them.
#[derive(Clone, Copy)]
struct Sequence<'a, T> {
    qkv: &'a [T], // [S, (H + 2 KV) hd]
    heads: Heads,
}

impl<'a, T: Real> Sequence<'a, T> {
    /// Rows `first .. first + rows` of the head that begins at column `head * dim`.
    fn head(self, head: usize, first: usize, rows: usize) -> Mat<'a, T> {
        let (width, dim) = (self.heads.row_width(), self.heads.dim);
        Mat::strided(&self.qkv[first * width + head * dim..], rows, dim, width)
    }

    fn query(self, head: usize, first: usize, rows: usize) -> Mat<'a, T> {
        self.head(head, first, rows)
    }

    fn keys(self, kv_head: usize, rows: usize) -> Mat<'a, T> {
        self.head(self.heads.query + kv_head, 0, rows)
    }

    fn values(self, kv_head: usize, rows: usize) -> Mat<'a, T> {
        self.head(self.heads.query + self.heads.key_value + kv_head, 0, rows)
    }
}

/// Every row of `matrix [.., count * dim]` cut into `count` pieces: `[piece][row]`.
fn panels<T>(matrix: &mut [T], count: usize, dim: usize) -> Vec<Vec<&mut [T]>> {
    let rows = matrix.len() / (count * dim);
    let mut panels: Vec<Vec<&mut [T]>> = (0..count).map(|_| Vec::with_capacity(rows)).collect();
    for (i, piece) in matrix.chunks_exact_mut(dim).enumerate() {
        panels[i % count].push(piece);
    }
    panels
}

/// 1 / √hd.
fn scale<T: Real>(dim: usize) -> T {
    T::of((dim as f64).sqrt().recip())
}

/// Writes `out [B·S, H hd]` and `lse`, the logsumexp of the scaled scores, `[B, H, S]`.
pub fn forward<T: Real>(out: &mut [T], lse: &mut [T], qkv: &[T], heads: Heads, sequence: usize) {
    let group = heads.group();
    out.par_chunks_mut(sequence * heads.query * heads.dim)
        .zip(lse.par_chunks_mut(heads.query * sequence))
        .zip(qkv.par_chunks(sequence * heads.row_width()))
        .for_each(|((out, lse), qkv)| {
            let rows = Sequence { qkv, heads };
            panels(out, heads.query, heads.dim)
                .into_par_iter()
                .zip(lse.par_chunks_mut(sequence))
                .enumerate()
                .for_each(|(head, (mut out, lse))| {
                    forward_head(&mut out, lse, rows, head, head / group, 0);
                });
        });
}

/// Writes `out [S − begin, H hd]`: attention of the rows from `begin` on, in one sequence `qkv` of
/// S rows.
pub fn forward_from<T: Real>(out: &mut [T], qkv: &[T], heads: Heads, begin: usize) {
    let group = heads.group();
    panels(out, heads.query, heads.dim)
        .into_par_iter()
        .enumerate()
        .for_each(|(head, mut out)| {
            let mut lse = Scratch::<T>::new(out.len());
            let rows = Sequence { qkv, heads };
            forward_head(&mut out, &mut lse, rows, head, head / group, begin);
        });
}

/// Rows `begin ..` of one head of a sequence.
fn forward_head<T: Real>(
    out: &mut [&mut [T]],
    lse: &mut [T],
    rows: Sequence<T>,
    head: usize,
    kv_head: usize,
    begin: usize,
) {
    let (sequence, dim) = (begin + lse.len(), rows.heads.dim);
    let mut scores = Scratch::<T>::new(QUERIES.min(lse.len()) * sequence);
    let mut product = Scratch::<T>::new(QUERIES.min(lse.len()) * dim);
    for first in (begin..sequence).step_by(QUERIES) {
        let queries = QUERIES.min(sequence - first);
        let keys = first + queries;
        let scores = &mut scores[..queries * keys];
        let product = &mut product[..queries * dim];
        gemm(
            MatMut::new(scores, queries, keys),
            Accumulate::Assign,
            rows.query(head, first, queries),
            rows.keys(kv_head, keys).t(),
        );
        let mut sums = [T::zero(); QUERIES];
        cpu::vectorized(
            #[inline(always)]
            || {
                let lse = &mut lse[first - begin..keys - begin];
                softmax_rows(scores, lse, &mut sums, first, scale(dim));
            },
        );
        gemm(
            MatMut::new(product, queries, dim),
            Accumulate::Assign,
            Mat::new(scores, queries, keys),
            rows.values(kv_head, keys),
        );
        let weighted = product.chunks_exact(dim).zip(sums);
        cpu::vectorized(
            #[inline(always)]
            || {
                let out = out[first - begin..keys - begin].iter_mut();
                for (out, (product, sum)) in out.zip(weighted) {
                    let factor = sum.recip();
                    for (o, &p) in out.iter_mut().zip(product) {
                        *o = p * factor;
                    }
                }
            },
        );
    }
}

/// Turns scores into e^(scale (s − max)), 0 for keys after the query; rows are not yet divided by
/// their sums.
#[inline(always)]
fn softmax_rows<T: Real>(scores: &mut [T], lse: &mut [T], sums: &mut [T], first: usize, scale: T) {
    let keys = first + lse.len();
    let rows = scores.chunks_exact_mut(keys).zip(lse).zip(sums);
    for (i, ((scores, lse), sum)) in rows.enumerate() {
        let (seen, later) = scores.split_at_mut(first + i + 1);
        let largest = max(seen);
        *sum = exp_and_sum(seen, scale, largest);
        *lse = largest * scale + sum.ln();
        later.fill(T::zero());
    }
}

/// What forward kept.
#[derive(Clone, Copy)]
pub struct Saved<'a, T> {
    pub qkv: &'a [T],
    pub out: &'a [T],
    pub lse: &'a [T],
}

/// Writes the gradient of `qkv`.
pub fn backward<T: Real>(
    dqkv: &mut [T],
    accumulate: Accumulate,
    dout: &[T],
    saved: Saved<T>,
    heads: Heads,
    sequence: usize,
) {
    let (group, width) = (heads.group(), heads.query * heads.dim);
    dqkv.par_chunks_mut(sequence * heads.row_width())
        .zip(dout.par_chunks(sequence * width))
        .zip(saved.qkv.par_chunks(sequence * heads.row_width()))
        .zip(saved.out.par_chunks(sequence * width))
        .zip(saved.lse.par_chunks(heads.query * sequence))
        .for_each(|((((dqkv, dout), qkv), out), lse)| {
            let rows = Sequence { qkv, heads };
            let count = heads.query + 2 * heads.key_value;
            let mut dq = panels(dqkv, count, heads.dim);
            let mut dk = dq.split_off(heads.query);
            let dv = dk.split_off(heads.key_value);
            dq.par_chunks_mut(group)
                .zip(dk)
                .zip(dv)
                .enumerate()
                .for_each(|(kv_head, ((dq, dk), dv))| {
                    let mut sums = KeyValueSums::new(sequence, heads.dim);
                    for (i, dq) in dq.iter_mut().enumerate() {
                        let head = kv_head * group + i;
                        let of_head = HeadGradient {
                            head,
                            kv_head,
                            dout,
                            out,
                            lse: &lse[head * sequence..][..sequence],
                        };
                        of_head.backward(dq, &mut sums, accumulate, rows);
                    }
                    let one = T::one();
                    write_rows(dk, &sums.dk, scale(heads.dim), accumulate);
                    write_rows(dv, &sums.dv, one, accumulate);
                });
        });
}

/// Sums over the queries of a group, `[S, hd]` each; `dk` without its factor 1 / √hd.
struct KeyValueSums<T> {
    dk: Scratch<T>,
    dv: Scratch<T>,
}

impl<T: Real> KeyValueSums<T> {
    fn new(sequence: usize, dim: usize) -> Self {
        let zeros = || {
            let mut sum = Scratch::<T>::new(sequence * dim);
            sum.fill(T::zero());
            sum
        };
        KeyValueSums {
            dk: zeros(),
            dv: zeros(),
        }
    }
}

/// Writes `factor · values` to rows that need not be neighbours.
fn write_rows<'a, T: Real + 'a>(
    rows: impl IntoIterator<Item = &'a mut [T]>,
    values: &[T],
    factor: T,
    accumulate: Accumulate,
) {
    cpu::vectorized(
        #[inline(always)]
        || {
            let mut values = values;
            for row in rows {
                let (now, rest) = values.split_at(row.len());
                for (r, &v) in row.iter_mut().zip(now) {
                    *r = accumulate.onto(*r, v * factor);
                }
                values = rest;
            }
        },
    );
}

/// What the backward of one query head reads.
struct HeadGradient<'a, T> {
    head: usize,
    kv_head: usize,
    dout: &'a [T], // [S, H hd]
    out: &'a [T],  // [S, H hd]
    lse: &'a [T],  // [S]
}

impl<T: Real> HeadGradient<'_, T> {
    fn backward(
        &self,
        dq: &mut [&mut [T]],
        sums: &mut KeyValueSums<T>,
        accumulate: Accumulate,
        rows: Sequence<T>,
    ) {
        let (sequence, dim) = (self.lse.len(), rows.heads.dim);
        let width = rows.heads.query * dim;
        let block = QUERIES.min(sequence);
        let mut probabilities = Scratch::<T>::new(block * sequence);
        let mut dscores = Scratch::<T>::new(block * sequence);
        let mut product = Scratch::<T>::new(block * dim);
        for first in (0..sequence).step_by(QUERIES) {
            let queries = QUERIES.min(sequence - first);
            let keys = first + queries;
            let p = &mut probabilities[..queries * keys];
            let ds = &mut dscores[..queries * keys];
            let place = first * width + self.head * dim;
            let dout = &self.dout[place..];
            let dout_rows = Mat::strided(dout, queries, dim, width);
            let query = rows.query(self.head, first, queries);
            let key = rows.keys(self.kv_head, keys);
            gemm(
                MatMut::new(p, queries, keys),
                Accumulate::Assign,
                query,
                key.t(),
            );
            gemm(
                MatMut::new(ds, queries, keys),
                Accumulate::Assign,
                dout_rows,
                rows.values(self.kv_head, keys).t(),
            );
            cpu::vectorized(
                #[inline(always)]
                || {
                    let out = self.out[place..].chunks(width);
                    let pairs = dout.chunks(width).zip(out);
                    let score_rows = p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys));
                    let lse = &self.lse[first..keys];
                    for (i, (((p, ds), &lse), (dout, out))) in
                        score_rows.zip(lse).zip(pairs).enumerate()
                    {
                        let mean = sum_over([&dout[..dim], &out[..dim]], |[d, o]| d * o);
                        let seen = first + i + 1;
                        score_gradient(&mut p[..seen], &mut ds[..seen], lse, mean, scale(dim));
                        p[seen..].fill(T::zero());
                        ds[seen..].fill(T::zero());
                    }
                },
            );
            let product = &mut product[..queries * dim];
            let (p, ds) = (Mat::new(p, queries, keys), Mat::new(ds, queries, keys));
            gemm(
                MatMut::new(&mut sums.dv[..], keys, dim),
                Accumulate::Add,
                p.t(),
                dout_rows,
            );
            gemm(
                MatMut::new(&mut sums.dk[..], keys, dim),
                Accumulate::Add,
                ds.t(),
                query,
            );
            gemm(
                MatMut::new(product, queries, dim),
                Accumulate::Assign,
                ds,
                key,
            );
            let dq = dq[first..keys].iter_mut().map(|row| &mut **row);
            write_rows(dq, product, scale(dim), accumulate);
        }
    }
}

/// One row: scores become probabilities, and `ds`, which holds dP, becomes P ⊙ (dP − mean).
#[inline(always)]
fn score_gradient<T: Real>(p: &mut [T], ds: &mut [T], lse: T, mean: T, scale: T) {
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = (*p * scale - lse).exp_vector();
        *ds = *p * (*ds - mean);
    }
}
