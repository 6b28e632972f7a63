//! Causal attention on the fused projection, with grouped queries.
//!
//! `qkv [B·S, (H + 2 KV) hd]`, `o [B·S, H hd]`. For each sequence and query head, with the key and
//! value head of its group: `P = softmax(Q Kᵀ / √hd)` over the keys at or before the query, `O = P V`.
//! Backward: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P ⊙ (dP − rowsum(dO ⊙ O))`, `dQ = dS K / √hd`,
//! `dK = dSᵀ Q / √hd`.
//!
//! As in FlashAttention (Dao et al., arXiv 2205.14135) scores exist only for one block of queries at
//! a time, backward forms them again, and of the softmax only the logsumexp of each row is kept.

use super::heads::Heads;
use crate::check::Case;
use crate::device::{Device, stream};
use crate::dtype::{DType, Real};
use crate::error::Result;
use crate::launch;
use crate::tape::{Forward, Grads, Op, Tape, Var, only};
use crate::tensor::Tensor;
use crate::with_real;
use std::ptr::null;

/// Causal attention of `qkv [B·S, (H + 2 KV) hd]`, S = `sequence`; the result is `[B·S, H hd]`.
///
/// # Errors
/// When `qkv` does not have the layout of `heads` or is no whole number of sequences.
pub fn attention(tape: &Tape, qkv: &Var, heads: Heads, sequence: usize) -> Result<Var> {
    heads.check("attention", qkv.tensor(), sequence)?;
    tape.apply_one(Attention { heads, sequence }, &[qkv])
}

struct Attention {
    heads: Heads,
    sequence: usize,
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    /// The kernels have two head widths.
    fn runs_on(&self, device: Device) -> bool {
        device == Device::Cpu || matches!(self.heads.dim, 64 | 128)
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (qkv, heads) = (inputs[0], self.heads);
        if qkv.device() != Device::Cpu {
            return self.forward_kernel(qkv);
        }
        let tokens = qkv.shape()[0];
        let of_width = |w: usize| Tensor::unspecified(qkv.device(), qkv.dtype(), [tokens, w]);
        let (mut out, mut lse) = (of_width(heads.query * heads.dim), of_width(heads.query));
        with_real!(qkv.dtype(), "attention", |T| {
            reference::forward(
                out.slice_mut::<T>(),
                lse.slice_mut(),
                qkv.slice(),
                heads,
                self.sequence,
            );
            Ok(Forward {
                saved: vec![qkv.clone(), out.clone(), lse],
                outputs: vec![out],
            })
        })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
        let (qkv, out, lse) = (&saved[0], &saved[1], &saved[2]);
        let dout = only(douts);
        if qkv.device() != Device::Cpu {
            return match grads.wanted(0) {
                true => grads.give(0, self.backward_kernel([dout, qkv, out, lse])?),
                false => {
                    grads.none(0);
                    Ok(())
                }
            };
        }
        with_real!(qkv.dtype(), "attention", |T| grads.write(
            0,
            qkv,
            |dqkv, accumulate| {
                reference::backward(
                    dqkv.slice_mut::<T>(),
                    accumulate,
                    dout.slice(),
                    reference::Saved {
                        qkv: qkv.slice(),
                        out: out.slice(),
                        lse: lse.slice(),
                    },
                    self.heads,
                    self.sequence,
                );
                Ok(())
            }
        ))
    }
}

/// The kernels of `attention.cu` and `attention_backward.cu`.
impl Attention {
    /// Sequence, heads, key and value heads, and their width, as the kernels take them.
    fn sizes(&self) -> (i32, i32, i32, i32) {
        let Heads {
            query,
            key_value,
            dim,
        } = self.heads;
        let [s, h, kv, d] = [self.sequence, query, key_value, dim].map(|n| n as i32);
        (s, h, kv, d)
    }

    fn forward_kernel(&self, qkv: &Tensor) -> Result<Forward> {
        qkv.expect_dtype("attention", "qkv", DType::Bf16)?;
        let (device, tokens, heads) = (qkv.device(), qkv.shape()[0], self.heads);
        let mut out = Tensor::unspecified(device, DType::Bf16, [tokens, heads.query * heads.dim]);
        let mut lse = Tensor::unspecified(device, DType::F32, [tokens, heads.query]);
        let (sequence, query, key_value, dim) = self.sizes();
        // SAFETY: the tensors have the shapes that attention.cu's header names.
        unsafe {
            launch!(
                device.launchers()?,
                attention_forward(
                    out.pointer_mut(),
                    lse.pointer_mut(),
                    qkv.pointer(),
                    null(),
                    tokens as i64,
                    sequence,
                    query,
                    key_value,
                    dim,
                    stream(),
                )
            )?;
        }
        Ok(Forward {
            saved: vec![qkv.clone(), out.clone(), lse],
            outputs: vec![out],
        })
    }

    fn backward_kernel(&self, [dout, qkv, out, lse]: [&Tensor; 4]) -> Result<Tensor> {
        dout.expect_dtype("attention", "the output's gradient", DType::Bf16)?;
        let (device, launchers) = (qkv.device(), qkv.device().launchers()?);
        let tokens = qkv.shape()[0] as i64;
        let (sequence, query, key_value, dim) = self.sizes();
        let mut floats = 0u64;
        // SAFETY: it writes one number.
        unsafe {
            launch!(
                launchers,
                attention_backward_workspace(&mut floats, tokens, sequence, query)
            )?;
        }
        let mut workspace = Tensor::unspecified(device, DType::F32, [floats as usize]);
        let mut dqkv = Tensor::unspecified(device, DType::Bf16, qkv.shape());
        // SAFETY: the tensors have the shapes that attention_backward.cu's header names.
        unsafe {
            launch!(
                launchers,
                attention_backward(
                    dqkv.pointer_mut(),
                    workspace.pointer_mut(),
                    dout.pointer(),
                    qkv.pointer(),
                    out.pointer(),
                    lse.pointer(),
                    null(),
                    tokens,
                    sequence,
                    query,
                    key_value,
                    dim,
                    stream(),
                )
            )?;
        }
        Ok(dqkv)
    }
}

/// The mathematics on plain slices.
pub(super) mod reference {
    use super::*;
    use crate::cpu::vector::{exp_and_sum, max, sum_over};
    use crate::cpu::{self, Accumulate, Mat, MatMut, Scratch, gemm};
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
    pub fn forward<T: Real>(
        out: &mut [T],
        lse: &mut [T],
        qkv: &[T],
        heads: Heads,
        sequence: usize,
    ) {
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
    fn softmax_rows<T: Real>(
        scores: &mut [T],
        lse: &mut [T],
        sums: &mut [T],
        first: usize,
        scale: T,
    ) {
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
}

pub(super) fn cases() -> Vec<Case> {
    let case = |batch: usize, sequence: usize, query: usize, key_value: usize, dim: usize| {
        let heads = Heads {
            query,
            key_value,
            dim,
        };
        let name = format!("attention, {batch} sequences of {sequence}, {heads:?}");
        Case::new(name, move |tape, v| {
            Ok(vec![attention(tape, &v[0], heads, sequence)?])
        })
        .input("qkv", [batch * sequence, heads.row_width()])
    };
    vec![
        case(1, 1, 1, 1, 4),
        case(2, 5, 4, 2, 6),
        case(1, 67, 3, 1, 8),
        case(3, 64, 2, 2, 5),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Gradients;

    fn attend(qkv: &[f64], tokens: usize, heads: Heads, sequence: usize) -> Vec<f64> {
        let qkv = Tensor::from_slice([tokens, heads.row_width()], qkv);
        let y = attention(&Tape::new(), &Var::constant(qkv), heads, sequence).unwrap();
        y.tensor().slice::<f64>().to_vec()
    }

    #[test]
    fn two_queries_of_one_group_worked_by_hand() {
        // hd = 1, no scaling. Rows (q0, q1, k, v): (5, 7, ln 2, 10), (1, 0, 0, 4).
        // Row 0 sees itself alone: 10 for both heads. Row 1: head 0 has scores (ln 2, 0),
        // probabilities (2/3, 1/3), value 8; head 1 has scores (0, 0), value 7.
        let heads = Heads {
            query: 2,
            key_value: 1,
            dim: 1,
        };
        let qkv = [5.0, 7.0, 2f64.ln(), 10.0, 1.0, 0.0, 0.0, 4.0];
        let y = attend(&qkv, 2, heads, 2);
        for (y, expected) in y.iter().zip([10.0, 10.0, 8.0, 7.0]) {
            assert!((y - expected).abs() <= 1e-14, "{y} for {expected}");
        }
    }

    #[test]
    fn the_kernels_give_what_the_reference_gives_to_a_hundredth() {
        for dim in [64, 128] {
            let heads = Heads {
                query: 4,
                key_value: 2,
                dim,
            };
            let (tokens, sequence) = (2 * 70, 70);
            let numbers = |width: usize, seed| {
                let numbers = crate::check::normal_numbers(tokens * width, seed);
                let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
                Tensor::from_slice([tokens, width], &numbers).narrowed()
            };
            let (qkv, dout) = (numbers(heads.row_width(), 1), numbers(4 * dim, 2));
            let run = |qkv: Tensor, dout: Tensor| {
                let tape = Tape::new();
                let y = attention(&tape, &Var::leaf(qkv, 0), heads, sequence).unwrap();
                let output = y.tensor().clone();
                let mut gradients = Gradients::new(1);
                tape.backward_from(&[(&y, dout)], &mut gradients).unwrap();
                let flat = |t: &Tensor| t.widened().on(Device::Cpu).slice::<f32>().to_vec();
                [flat(&output), flat(gradients.get(0).unwrap())]
            };
            crate::tape::take_ran();
            let kernels = run(qkv.clone().on(Device::Sim), dout.clone().on(Device::Sim));
            assert_eq!(crate::tape::take_ran()["attention"].fallback, 0);
            for (got, want) in kernels.iter().zip(run(qkv.widened(), dout.widened())) {
                let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                let error = norm(&mut got.iter().zip(&want).map(|(g, w)| g - w));
                let relative = error / norm(&mut want.iter().copied());
                assert!(relative <= 1e-2, "width {dim}: relative error {relative}");
            }
        }
    }

    #[test]
    fn no_output_depends_on_a_later_token_or_another_sequence() {
        let heads = Heads {
            query: 2,
            key_value: 1,
            dim: 4,
        };
        let (sequence, width) = (70, heads.row_width());
        let mut qkv = crate::check::normal_numbers(2 * sequence * width, 1);
        let before = attend(&qkv, 2 * sequence, heads, sequence);
        let changed = 66;
        qkv[changed * width..sequence * width].fill(3.0);
        let after = attend(&qkv, 2 * sequence, heads, sequence);
        assert_eq!(before[..changed * 8], after[..changed * 8]);
        assert_ne!(before[changed * 8..70 * 8], after[changed * 8..70 * 8]);
        assert_eq!(before[sequence * 8..], after[sequence * 8..]);
    }

    #[test]
    fn tokens_that_are_no_whole_sequences_are_an_error() {
        let heads = Heads {
            query: 1,
            key_value: 1,
            dim: 2,
        };
        let qkv = Var::constant(Tensor::from_slice([3, 6], &[0.0; 18]));
        let e = attention(&Tape::new(), &qkv, heads, 2).unwrap_err();
        assert!(e.to_string().contains("whole sequences of 2 tokens"), "{e}");
    }
}
