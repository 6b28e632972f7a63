//! Attention on slices: the implementation for the CPU.
//!
//! For a block of queries, scores are computed for every key that any query of the block attends to. These begin at
//! the first key of the block's first row, because first keys do not decrease.

use crate::ops::heads::Heads;
use crate::ops::rope::reference::Angles;
use crate::tensor::cpu::vector::{exp_and_sum, max, set, sum_over};
use crate::tensor::cpu::{self, Accumulate, Mat, MatMut, Scratch, gemm};
use crate::tensor::dtype::Real;
use rayon::prelude::*;
use std::ops::Range;

/// Number of queries whose scores exist at a time.
const QUERIES: usize = 64;

/// How the rows divide into sequences and documents, and the rotation of queries and keys.
#[derive(Clone, Copy)]
pub struct Places<'a, T> {
    pub heads: Heads,
    /// Number of rows of a sequence.
    pub sequence: usize,
    /// `[B·S]`: row r of a sequence attends to the keys `first_key[r] … r`, indices within the sequence. Without it
    /// the first key is 0.
    pub first_key: Option<&'a [i32]>,
    /// Angles by which queries and keys are rotated; none for no rotation.
    pub angles: Option<Angles<'a, T>>,
}

/// One sequence's rows of `qkv`.
#[derive(Clone, Copy)]
struct Sequence<'a, T> {
    qkv: &'a [T], // [S, (H + 2 KV) hd]
    heads: Heads,
    angles: Option<Angles<'a, T>>,
}

/// The rows of one head `[S, hd]`: a view of `qkv`, or a rotated copy.
struct Panel<'a, T> {
    rows: Mat<'a, T>,
    turned: Option<Scratch<T>>,
}

impl<T: Real> Panel<'_, T> {
    fn rows(&self, rows: Range<usize>) -> Mat<'_, T> {
        let all = match &self.turned {
            Some(turned) => Mat::new(turned, self.rows.row_count(), self.rows.col_count()),
            None => self.rows,
        };
        all.rows(rows.start, rows.len())
    }
}

impl<'a, T: Real> Sequence<'a, T> {
    /// The rows of the head that begins at column `head * dim`.
    fn head(self, head: usize) -> Mat<'a, T> {
        let (width, dim) = (self.heads.row_width(), self.heads.dim);
        Mat::strided(&self.qkv[head * dim..], self.qkv.len() / width, dim, width)
    }

    /// The rows of the head that begins at column `head * dim`, rotated if there are angles.
    fn turned(self, head: usize) -> Panel<'a, T> {
        let (width, dim) = (self.heads.row_width(), self.heads.dim);
        let turned = self.angles.map(|angles| {
            let mut own = Scratch::<T>::new(self.qkv.len() / width * dim);
            let rows = self.qkv[head * dim..].chunks(width);
            for (own, row) in own.chunks_exact_mut(dim).zip(rows) {
                own.copy_from_slice(&row[..dim]);
            }
            angles.turn_rows(&mut own, 0, false);
            own
        });
        Panel {
            rows: self.head(head),
            turned,
        }
    }

    fn queries(self, head: usize) -> Panel<'a, T> {
        self.turned(head)
    }

    fn keys(self, kv_head: usize) -> Panel<'a, T> {
        self.turned(self.heads.query + kv_head)
    }

    fn values(self, kv_head: usize, rows: Range<usize>) -> Mat<'a, T> {
        let head = self.heads.query + self.heads.key_value + kv_head;
        self.head(head).rows(rows.start, rows.len())
    }
}

/// The first key that each row of a sequence attends to, `[S]`; without it, key 0.
#[derive(Clone, Copy)]
struct FirstKeys<'a>(Option<&'a [i32]>);

impl<'a> FirstKeys<'a> {
    /// The first keys of sequence `number`, from those of all sequences.
    fn of_sequence(all: Option<&'a [i32]>, number: usize, length: usize) -> Self {
        FirstKeys(all.map(|all| &all[number * length..][..length]))
    }

    fn of_row(self, row: usize) -> usize {
        self.0.map_or(0, |first| first[row] as usize)
    }
}

/// Cuts every row of `matrix [.., count * dim]` into `count` pieces; indexed as `[piece][row]`.
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
pub fn forward<T: Real>(out: &mut [T], lse: &mut [T], qkv: &[T], places: Places<T>) {
    let Places {
        heads,
        sequence,
        first_key,
        angles,
    } = places;
    let group = heads.group();
    out.par_chunks_mut(sequence * heads.query * heads.dim)
        .zip(lse.par_chunks_mut(heads.query * sequence))
        .zip(qkv.par_chunks(sequence * heads.row_width()))
        .enumerate()
        .for_each(|(number, ((out, lse), qkv))| {
            let rows = Sequence { qkv, heads, angles };
            let first_keys = FirstKeys::of_sequence(first_key, number, sequence);
            panels(out, heads.query, heads.dim)
                .into_par_iter()
                .zip(lse.par_chunks_mut(sequence))
                .enumerate()
                .for_each(|(head, (mut out, lse))| {
                    forward_head(&mut out, lse, rows, first_keys, [head, head / group], 0);
                });
        });
}

/// Writes `out [S − begin, H hd]`: attention of the rows from `begin` to the end of one sequence `qkv` of S rows.
pub fn forward_from<T: Real>(out: &mut [T], qkv: &[T], heads: Heads, begin: usize) {
    let group = heads.group();
    panels(out, heads.query, heads.dim)
        .into_par_iter()
        .enumerate()
        .for_each(|(head, mut out)| {
            let mut lse = Scratch::<T>::new(out.len());
            let angles = None;
            let rows = Sequence { qkv, heads, angles };
            let (all, heads) = (FirstKeys(None), [head, head / group]);
            forward_head(&mut out, &mut lse, rows, all, heads, begin);
        });
}

/// Rows `begin ..` of one query head of a sequence, with its key and value head.
fn forward_head<T: Real>(
    out: &mut [&mut [T]],
    lse: &mut [T],
    rows: Sequence<T>,
    first_keys: FirstKeys,
    [head, kv_head]: [usize; 2],
    begin: usize,
) {
    let (sequence, dim) = (begin + lse.len(), rows.heads.dim);
    let (all_queries, all_keys) = (rows.queries(head), rows.keys(kv_head));
    let mut scores = Scratch::<T>::new(QUERIES.min(lse.len()) * sequence);
    let mut product = Scratch::<T>::new(QUERIES.min(lse.len()) * dim);
    for first in (begin..sequence).step_by(QUERIES) {
        let queries = QUERIES.min(sequence - first);
        let keys = first_keys.of_row(first)..first + queries;
        let own = first - begin..first + queries - begin;
        let scores = &mut scores[..queries * keys.len()];
        let product = &mut product[..queries * dim];
        gemm(
            MatMut::new(scores, queries, keys.len()),
            Accumulate::Assign,
            all_queries.rows(first..first + queries),
            all_keys.rows(keys.clone()).t(),
        );
        let mut sums = [T::zero(); QUERIES];
        cpu::vectorized(
            #[inline(always)]
            || {
                let lse = &mut lse[own.clone()];
                softmax_rows(scores, lse, &mut sums, first_keys, &keys, scale(dim));
            },
        );
        gemm(
            MatMut::new(product, queries, dim),
            Accumulate::Assign,
            Mat::new(scores, queries, keys.len()),
            rows.values(kv_head, keys),
        );
        let weighted = product.chunks_exact(dim).zip(sums);
        cpu::vectorized(
            #[inline(always)]
            || {
                let out = out[own].iter_mut();
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

/// Replaces the scores s of the last queries of `keys` by e^(scale (s − max)), and by 0 for keys that a query does
/// not attend to. Rows are not yet divided by their sums.
#[inline(always)]
fn softmax_rows<T: Real>(
    scores: &mut [T],
    lse: &mut [T],
    sums: &mut [T],
    first_keys: FirstKeys,
    keys: &Range<usize>,
    scale: T,
) {
    let first = keys.end - lse.len();
    let rows = scores.chunks_exact_mut(keys.len()).zip(lse).zip(sums);
    for (row, ((scores, lse), sum)) in (first..).zip(rows) {
        let (scores, later) = scores.split_at_mut(row + 1 - keys.start);
        let (before, seen) = scores.split_at_mut(first_keys.of_row(row) - keys.start);
        let largest = max(seen);
        *sum = exp_and_sum(seen, scale, largest);
        *lse = largest * scale + sum.ln();
        set(before, T::zero());
        set(later, T::zero());
    }
}

/// The tensors that forward saved.
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
    places: Places<T>,
) {
    let (heads, sequence) = (places.heads, places.sequence);
    let (first_key, angles) = (places.first_key, places.angles);
    let (group, width) = (heads.group(), heads.query * heads.dim);
    dqkv.par_chunks_mut(sequence * heads.row_width())
        .zip(dout.par_chunks(sequence * width))
        .zip(saved.qkv.par_chunks(sequence * heads.row_width()))
        .zip(saved.out.par_chunks(sequence * width))
        .zip(saved.lse.par_chunks(heads.query * sequence))
        .enumerate()
        .for_each(|(number, ((((dqkv, dout), qkv), out), lse))| {
            let rows = Sequence { qkv, heads, angles };
            let first_keys = FirstKeys::of_sequence(first_key, number, sequence);
            let count = heads.query + 2 * heads.key_value;
            let mut dq = panels(dqkv, count, heads.dim);
            let mut dk = dq.split_off(heads.query);
            let dv = dk.split_off(heads.key_value);
            dq.par_chunks_mut(group)
                .zip(dk)
                .zip(dv)
                .enumerate()
                .for_each(|(kv_head, ((dq, dk), dv))| {
                    let keys = rows.keys(kv_head);
                    let mut sums = KeyValueSums::new(sequence, heads.dim);
                    for (i, dq) in dq.iter_mut().enumerate() {
                        let head = kv_head * group + i;
                        let of_head = HeadGradient {
                            head,
                            kv_head,
                            keys: &keys,
                            dout,
                            out,
                            lse: &lse[head * sequence..][..sequence],
                        };
                        of_head.backward(dq, &mut sums, accumulate, rows, first_keys);
                    }
                    if let Some(angles) = angles {
                        angles.turn_rows(&mut sums.dk, 0, true);
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

/// Writes `factor · values` to rows that need not be contiguous.
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
    keys: &'a Panel<'a, T>,
    dout: &'a [T], // [S, H hd]
    out: &'a [T],  // [S, H hd]
    lse: &'a [T],  // [S]
}

/// `out = a b`.
fn assign<T: Real>(out: MatMut<T>, a: Mat<T>, b: Mat<T>) {
    gemm(out, Accumulate::Assign, a, b);
}

impl<T: Real> HeadGradient<'_, T> {
    fn backward(
        &self,
        dq: &mut [&mut [T]],
        sums: &mut KeyValueSums<T>,
        accumulate: Accumulate,
        rows: Sequence<T>,
        first_keys: FirstKeys,
    ) {
        let (sequence, dim) = (self.lse.len(), rows.heads.dim);
        let width = rows.heads.query * dim;
        let block = QUERIES.min(sequence);
        let all_queries = rows.queries(self.head);
        let mut probabilities = Scratch::<T>::new(block * sequence);
        let mut dscores = Scratch::<T>::new(block * sequence);
        let mut product = Scratch::<T>::new(block * dim);
        for first in (0..sequence).step_by(QUERIES) {
            let queries = QUERIES.min(sequence - first);
            let seen = first_keys.of_row(first)..first + queries;
            let keys = seen.len();
            let p = &mut probabilities[..queries * keys];
            let ds = &mut dscores[..queries * keys];
            let place = first * width + self.head * dim;
            let dout = &self.dout[place..];
            let dout_rows = Mat::strided(dout, queries, dim, width);
            let query = all_queries.rows(first..seen.end);
            let key = self.keys.rows(seen.clone());
            assign(MatMut::new(p, queries, keys), query, key.t());
            assign(
                MatMut::new(ds, queries, keys),
                dout_rows,
                rows.values(self.kv_head, seen.clone()).t(),
            );
            cpu::vectorized(
                #[inline(always)]
                || {
                    let out = self.out[place..].chunks(width);
                    let pairs = dout.chunks(width).zip(out);
                    let score_rows = p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys));
                    let lse = &self.lse[first..seen.end];
                    for (row, (((p, ds), &lse), (dout, out))) in
                        (first..).zip(score_rows.zip(lse).zip(pairs))
                    {
                        let mean = sum_over([&dout[..dim], &out[..dim]], |[d, o]| d * o);
                        let own = first_keys.of_row(row) - seen.start..row + 1 - seen.start;
                        let (own_p, own_ds) = (&mut p[own.clone()], &mut ds[own.clone()]);
                        score_gradient(own_p, own_ds, lse, mean, scale(dim));
                        for unseen in [0..own.start, own.end..keys] {
                            set(&mut p[unseen.clone()], T::zero());
                            set(&mut ds[unseen], T::zero());
                        }
                    }
                },
            );
            let product = &mut product[..queries * dim];
            let (p, ds) = (Mat::new(p, queries, keys), Mat::new(ds, queries, keys));
            gemm(
                MatMut::new(&mut sums.dv[seen.start * dim..], keys, dim),
                Accumulate::Add,
                p.t(),
                dout_rows,
            );
            gemm(
                MatMut::new(&mut sums.dk[seen.start * dim..], keys, dim),
                Accumulate::Add,
                ds.t(),
                query,
            );
            assign(MatMut::new(product, queries, dim), ds, key);
            if let Some(angles) = rows.angles {
                angles.turn_rows(product, first, true);
            }
            let dq = dq[first..seen.end].iter_mut().map(|row| &mut **row);
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
