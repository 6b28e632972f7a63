//! RMSNorm of queries and keys inside the fused projection, before their rotation; values are copied.
//!
//! `qkv [T, (H + 2 KV) hd]`. The weights' lengths choose the form: `[hd]` normalizes each head by
//! itself (Qwen3), `[H hd]` and `[KV hd]` all query and all key heads of a token as one row (OLMoE).
//! Formula and gradient: [`rmsnorm`](super::rmsnorm).
//!
//! On a device with kernels (`kernels/qk_norm.cu`) queries, keys and values take one launch each.

use super::heads::Heads;
use super::rmsnorm::reference::{normalize, normalize_back};
use super::rows::{Columns, column_sums};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::{self, QkNormBackward, Stream};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::{DType, Real};
use crate::with_real;

/// Normalizes the query heads of `qkv [T, (H + 2 KV) hd]` with `query_weight` (`[hd]` or `[H hd]`)
/// and its key heads with `key_weight` (`[hd]` or `[KV hd]`).
///
/// # Errors
/// Returns an error when shapes or dtypes do not fit.
pub fn qk_norm(
    tape: &Tape,
    qkv: &Var,
    query_weight: &Var,
    key_weight: &Var,
    heads: Heads,
    eps: f64,
) -> Result<Var> {
    heads.check("qk_norm", qkv.tensor(), 1)?;
    for (weight, count) in [(query_weight, heads.query), (key_weight, heads.key_value)] {
        let shape = weight.tensor().shape();
        if shape.len() != 1 || ![heads.dim, count * heads.dim].contains(&shape[0]) {
            return Err(Error::invalid(
                "qk_norm",
                format!(
                    "a weight [{}] for each head or [{}] for all",
                    heads.dim,
                    count * heads.dim
                ),
                shape.to_string(),
                "pass weights that fit num_heads, num_kv_heads and head_dim",
            ));
        }
        weight
            .tensor()
            .expect_dtype("qk_norm", "weight", qkv.tensor().dtype())?;
    }
    tape.apply_one(QkNorm { heads, eps }, &[qkv, query_weight, key_weight])
}

struct QkNorm {
    heads: Heads,
    eps: f64,
}

impl Op for QkNorm {
    fn name(&self) -> &'static str {
        "qk_norm"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, wq, wk) = (inputs[0], inputs[1], inputs[2]);
        if x.device() != Device::Cpu {
            return self.forward_kernels(x, wq, wk);
        }
        let mut y = x.unspecified_like();
        with_real!(x.dtype(), "qk_norm", |T| {
            let weights = [wq.slice::<T>(), wk.slice()];
            reference::forward(y.slice_mut(), x.slice(), weights, self.heads, self.eps);
            Ok(Forward::one(y, inputs.iter().map(|&t| t.clone()).collect()))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let x = &saved[0];
        let dy = only(douts);
        if x.device() != Device::Cpu {
            return self.backward_kernels(saved, dy, grads);
        }
        with_real!(x.dtype(), "qk_norm", |T| {
            let weights = [saved[1].slice::<T>(), saved[2].slice()];
            let (mut dwq, mut dwk) = (vec![], vec![]);
            let mut run = |dx: &mut Tensor, accumulate| {
                let dx = dx.slice_mut::<T>();
                (dwq, dwk) = reference::backward(
                    dx,
                    accumulate,
                    dy.slice(),
                    x.slice(),
                    weights,
                    self.heads,
                    self.eps,
                )
                .into_iter()
                .unzip();
                Ok(())
            };
            if !grads.wanted(0) {
                run(&mut x.unspecified_like(), Accumulate::Assign)?;
            }
            grads.write(0, x, run)?;
            for (input, partials) in [(1, dwq), (2, dwk)] {
                grads.write(input, &saved[input], |dw, accumulate| {
                    cpu::write_sum(dw.slice_mut::<T>(), accumulate, partials);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }
}

/// The operation on a device with kernels.
impl QkNorm {
    /// The queries, keys and values of a row, divided into the pieces that are normalised separately.
    fn parts(&self, wq: &Tensor, wk: &Tensor) -> [Columns; 3] {
        let dim = self.heads.dim;
        let [q, k] = [self.heads.query, self.heads.key_value].map(|heads| heads * dim);
        let part = |first, all, width| Columns {
            first,
            pieces: all / width,
            width,
        };
        [
            part(0, q, wq.elements()),
            part(q, k, wk.elements()),
            part(q + k, k, dim),
        ]
    }

    fn forward_kernels(&self, x: &Tensor, wq: &Tensor, wk: &Tensor) -> Result<Forward> {
        x.expect_dtype("qk_norm", "qkv", DType::Bf16)?;
        let (mut y, rows) = (x.unspecified_like(), x.shape().rows());
        let stream = Stream::of(x.device())?;
        let mut saved = vec![x.clone(), wq.clone(), wk.clone()];
        let weights = [Some(wq), Some(wk), None];
        for (part, w) in self.parts(wq, wk).into_iter().zip(weights) {
            let mut scales = Tensor::unspecified(x.device(), DType::F32, [rows, part.pieces]);
            kernels::QkNorm {
                y: y.output()?.from_element(part.first),
                scales: Some(scales.output()?),
                x: x.input()?.from_element(part.first),
                w: w.map(Tensor::input).transpose()?,
                rows,
                pieces: part.pieces,
                width: part.width,
                pitch: x.shape().width(),
                eps: self.eps as f32,
            }
            .launch(&stream)?;
            if w.is_some() {
                saved.push(scales);
            }
        }
        Ok(Forward::one(y, saved))
    }

    fn backward_kernels(&self, saved: &[Tensor], dy: &Tensor, grads: &mut Grads) -> Result<()> {
        let [x, wq, wk, of_queries, of_keys] = saved else {
            unreachable!("five tensors are kept")
        };
        let mut dx = x.unspecified_like();
        let stream = Stream::of(x.device())?;
        let parts = self.parts(wq, wk);
        let given = [
            (Some(wq), Some(of_queries)),
            (Some(wk), Some(of_keys)),
            (None, None),
        ];
        for (part, (w, scales)) in parts.into_iter().zip(given) {
            QkNormBackward {
                dx: dx.output()?.from_element(part.first),
                scales: scales.map(Tensor::input).transpose()?,
                dy: dy.input()?.from_element(part.first),
                x: x.input()?.from_element(part.first),
                w: w.map(Tensor::input).transpose()?,
                rows: x.shape().rows(),
                pieces: part.pieces,
                width: part.width,
                pitch: x.shape().width(),
            }
            .launch(&stream)?;
        }
        grads.give(0, dx)?;
        for (input, w, scales) in [(1, wq, of_queries), (2, wk, of_keys)] {
            grads.write(input, w, |dw, accumulate| {
                column_sums(dw, accumulate, dy, Some(x), Some(scales), parts[input - 1])
            })?;
        }
        Ok(())
    }
}

/// The operation on slices, for the CPU.
pub(super) mod reference {
    use super::*;

    /// Returns the ends of the queries, the keys and the values in a row.
    fn ends(heads: Heads) -> (usize, usize, usize) {
        let queries = heads.query * heads.dim;
        let keys = queries + heads.key_value * heads.dim;
        (queries, keys, heads.row_width())
    }

    pub fn forward<T: Real>(y: &mut [T], x: &[T], weights: [&[T]; 2], heads: Heads, eps: f64) {
        let (queries, keys, width) = ends(heads);
        cpu::each_row_block(y, width, |first, y| {
            let x = &x[first * width..];
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        for (part, w) in [0..queries, queries..keys].into_iter().zip(weights) {
                            let pieces = y[part.clone()].chunks_exact_mut(w.len());
                            for (y, x) in pieces.zip(x[part].chunks_exact(w.len())) {
                                normalize(y, x, w, eps);
                            }
                        }
                        y[keys..].copy_from_slice(&x[keys..]);
                    }
                },
            );
        });
    }

    /// Writes `dx` and returns partial sums of both weights' gradients, one pair per block of rows.
    pub fn backward<T: Real>(
        dx: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        x: &[T],
        weights: [&[T]; 2],
        heads: Heads,
        eps: f64,
    ) -> Vec<(Vec<T>, Vec<T>)> {
        let (queries, keys, width) = ends(heads);
        cpu::each_row_block(dx, width, |first, dx| {
            let (x, dy) = (&x[first * width..], &dy[first * width..]);
            let mut sums = weights.map(|w| vec![T::zero(); w.len()]);
            cpu::vectorized(
                #[inline(always)]
                || {
                    let inputs = x.chunks_exact(width).zip(dy.chunks_exact(width));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(width).zip(inputs) {
                        let parts = [0..queries, queries..keys].into_iter().zip(weights);
                        for ((part, w), dw) in parts.zip(&mut sums) {
                            let x = x[part.clone()].chunks_exact(w.len());
                            let dy = dy[part.clone()].chunks_exact(w.len());
                            let pieces = dx[part].chunks_exact_mut(w.len());
                            for (dx, (x, dy)) in pieces.zip(x.zip(dy)) {
                                normalize_back(dx, dw, accumulate, dy, x, w, eps);
                            }
                        }
                        for (dx, &dy) in dx[keys..].iter_mut().zip(&dy[keys..]) {
                            *dx = accumulate.onto(*dx, dy);
                        }
                    }
                },
            );
            let [dwq, dwk] = sums;
            (dwq, dwk)
        })
    }
}

pub(super) fn cases() -> Vec<Case> {
    let heads = Heads {
        query: 4,
        key_value: 2,
        dim: 6,
    };
    let case = |tokens: usize, query_weight: usize, key_weight: usize| {
        let name = format!("qk_norm of {tokens} tokens, weights {query_weight}, {key_weight}");
        Case::new(name, move |tape, v| {
            Ok(vec![qk_norm(tape, &v[0], &v[1], &v[2], heads, 1e-5)?])
        })
        .input("qkv", [tokens, heads.row_width()])
        .input("query weight", [query_weight])
        .input("key weight", [key_weight])
    };
    vec![case(1, 6, 6), case(67, 6, 6), case(35, 24, 12)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two query heads and one key head of width 1, value 5.
    fn normalized(query_weight: &[f64]) -> Result<Vec<f64>> {
        let heads = Heads {
            query: 2,
            key_value: 1,
            dim: 1,
        };
        let qkv = Var::constant(Tensor::from_slice([1, 4], &[1.0, -7.0, 3.0, 5.0]));
        let wq = Var::constant(Tensor::from_slice([query_weight.len()], query_weight));
        let wk = Var::constant(Tensor::from_slice([1], &[10.0]));
        let y = qk_norm(&Tape::new(), &qkv, &wq, &wk, heads, 0.0)?;
        Ok(y.tensor().slice::<f64>().to_vec())
    }

    #[test]
    fn one_weight_normalizes_each_head_and_a_wide_one_all_heads_together() {
        // A head of width 1 becomes its sign; together (1, −7) has mean square 25.
        let each = normalized(&[2.0]).unwrap();
        let together = normalized(&[1.0, 2.0]).unwrap();
        for (found, expected) in [
            (each, [2.0, -2.0, 10.0, 5.0]),
            (together, [0.2, -2.8, 10.0, 5.0]),
        ] {
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() <= 1e-14, "{a} for {b}");
            }
        }
    }

    #[test]
    fn a_weight_of_neither_width_is_an_error() {
        let e = normalized(&[1.0; 3]).unwrap_err().to_string();
        assert!(
            e.contains("[1] for each head or [2] for all, got [3]"),
            "{e}"
        );
    }
}
