//! Checks attention (`kernels/attention.cu`) against float64, and provides the inputs that the checks of its backward
//! share.

use super::numbers::{Errors, F32_ROUNDOFF, Random, half_ulp_bf16};
use super::operands::exact;
use super::{Buffer, Case, Problem, each, launch_of, values};
use crate::kernels::AttentionForward;
use crate::kernels::attention::AttentionSizes;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// Relative rounding error of a bf16 operand of a product.
pub const BF16_ROUNDOFF: f64 = 1.0 / 256.0;

/// Possible error of an exponential with a smaller result: the smallest normal f32.
pub const LEAST_NORMAL: f64 = f32::MIN_POSITIVE as f64;

/// Sizes and other properties of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Numbers of sequences, rows and heads, and the width of a head.
    pub sizes: AttentionSizes,
    /// Whether sequences are packed documents; some rows belong to no document.
    pub documents: bool,
    /// Scale of the queries relative to a standard normal.
    pub magnitude: f32,
    /// Whether backward applies the inverse rotation to the gradients of queries and keys.
    pub turned: bool,
}

impl Shape {
    /// B sequences of S rows, with H query heads, `key_value_heads` key heads, and this head width.
    pub fn new(b: usize, s: usize, heads: usize, key_value_heads: usize, width: usize) -> Self {
        let sizes = AttentionSizes {
            sequences: b,
            sequence: s,
            heads,
            key_value_heads,
            width,
        };
        Self {
            sizes,
            documents: false,
            magnitude: 1.0,
            turned: false,
        }
    }

    /// The same problem with packed documents.
    pub fn packed(self) -> Self {
        Self {
            documents: true,
            ..self
        }
    }

    /// The same problem with another scale of the queries.
    pub fn with_magnitude(self, magnitude: f32) -> Self {
        Self { magnitude, ..self }
    }

    /// The same problem with the inverse rotation in backward.
    pub fn turned(self) -> Self {
        Self {
            turned: true,
            ..self
        }
    }

    /// Returns the number of tokens T of all sequences.
    pub fn tokens(&self) -> usize {
        self.sizes.sequences * self.sizes.sequence
    }

    /// Returns the number of elements of a row of qkv.
    pub fn qkv_width(&self) -> usize {
        (self.sizes.heads + 2 * self.sizes.key_value_heads) * self.sizes.width
    }

    /// Returns the number of elements of a row of the output, H d.
    pub fn out_width(&self) -> usize {
        self.sizes.heads * self.sizes.width
    }
}

/// The inputs of a launch.
pub struct Inputs {
    /// The shape of the problem.
    pub shape: Shape,
    /// Queries, keys and values `[T, (H + 2 KV) d]`.
    pub qkv: Vec<bf16>,
    /// First visible key of each row `[T]`, an index within its sequence; `None` if all earlier rows are visible.
    pub first_key: Option<Vec<i32>>,
}

/// A query row of one head.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Index of the sequence.
    pub sequence: usize,
    /// Index of the query head.
    pub head: usize,
    /// Index of the row in its sequence.
    pub row: usize,
}

/// The attention weights of a query over the keys that it sees.
pub struct Weights {
    /// Index of the first visible key.
    pub first: usize,
    /// Scaled scores, one per visible key.
    pub scores: Vec<f64>,
    /// log Σ exp of the scores; −∞ if no key is visible.
    pub log_sum_exp: f64,
    /// Bound of the relative error of exp(score − log Σ exp) in f32.
    pub slack: f64,
}

/// Returns the sum of `of` each product of two elements.
fn products(a: &[f64], b: &[f64], of: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for i in 0..8 {
            sums[i] += of(a[i] * b[i]);
        }
    }
    sums.iter().sum()
}

/// Returns the inner product of two vectors of equal length.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    products(a, b, |product| product)
}

/// Σ |a b|.
pub fn magnitude(a: &[f64], b: &[f64]) -> f64 {
    products(a, b, f64::abs)
}

/// Returns documents of random length; between some of them there are rows that see no keys.
fn packed(shape: &Shape) -> Vec<i32> {
    let s = shape.sizes.sequence;
    let mut first_key = Vec::new();
    for sequence in 0..shape.sizes.sequences {
        let mut random = Random((s * 7 + sequence) as u64);
        let mut start = 0;
        while start < s {
            let length = (1 + random.below(s.max(8) / 2)).min(s - start);
            // Rows that belong to no document have a first key after themselves, at which the next document begins.
            let empty = random.below(3) == 0 || s == 1;
            let first = if empty { start + length } else { start };
            first_key.extend(std::iter::repeat_n(first as i32, length));
            start += length;
        }
    }
    first_key
}

impl Inputs {
    /// Creates seeded inputs.
    pub fn new(shape: &Shape) -> Self {
        let mut random = Random((shape.tokens() * 31 + shape.qkv_width()) as u64);
        let mut qkv = random.normals_bf16(shape.tokens() * shape.qkv_width());
        for row in qkv.chunks_mut(shape.qkv_width()) {
            for q in &mut row[..shape.out_width()] {
                *q = bf16::from_f32(q.to_f32() * shape.magnitude);
            }
        }
        Self {
            first_key: shape.documents.then(|| packed(shape)),
            shape: *shape,
            qkv,
        }
    }

    fn part(&self, sequence: usize, row: usize, column: usize) -> Vec<f64> {
        let width = self.shape.sizes.width;
        let at = (sequence * self.shape.sizes.sequence + row) * self.shape.qkv_width();
        let part = &self.qkv[at + column * width..][..width];
        part.iter().map(|&v| exact(v)).collect()
    }
    /// Returns a query `[d]`.
    pub fn query(&self, q: Query) -> Vec<f64> {
        self.part(q.sequence, q.row, q.head)
    }
    /// Returns the key head that a query head uses.
    pub fn key_head(&self, head: usize) -> usize {
        head / (self.shape.sizes.heads / self.shape.sizes.key_value_heads)
    }
    /// Returns a key `[d]`.
    pub fn key(&self, sequence: usize, key_head: usize, row: usize) -> Vec<f64> {
        self.part(sequence, row, self.shape.sizes.heads + key_head)
    }
    /// Returns a value `[d]`.
    pub fn value(&self, sequence: usize, key_head: usize, row: usize) -> Vec<f64> {
        let sizes = self.shape.sizes;
        let column = sizes.heads + sizes.key_value_heads + key_head;
        self.part(sequence, row, column)
    }

    /// Returns the index of a query's log Σ exp.
    pub fn statistic(&self, q: Query) -> usize {
        let sizes = self.shape.sizes;
        (q.sequence * sizes.heads + q.head) * sizes.sequence + q.row
    }
    /// Returns a query's part of tensors with the shape of the output.
    pub fn of_query<'a>(&self, outputs: &'a [bf16], q: Query) -> &'a [bf16] {
        let sizes = self.shape.sizes;
        let line = (q.sequence * sizes.sequence + q.row) * self.shape.out_width();
        &outputs[line + q.head * sizes.width..][..sizes.width]
    }

    /// Returns the index of the first key that a row sees, within its sequence.
    pub fn first_visible(&self, sequence: usize, row: usize) -> usize {
        let at = sequence * self.shape.sizes.sequence + row;
        self.first_key.as_ref().map_or(0, |f| f[at] as usize)
    }

    /// 1 / √d.
    pub fn scale(&self) -> f64 {
        (self.shape.sizes.width as f64).sqrt().recip()
    }

    /// Returns a bound of the relative error of an exponential of f32 sums; `terms` is the sum of the magnitudes of their
    /// terms.
    pub fn slack(&self, terms: f64) -> f64 {
        let depth = self.shape.sizes.width as f64 + 8.0;
        2e-6 + 2.0 * depth * F32_ROUNDOFF * terms
    }

    /// Computes the attention weights of a query in float64.
    pub fn weights(&self, query: Query) -> Weights {
        let q = self.query(query);
        let first = self.first_visible(query.sequence, query.row);
        let key_head = self.key_head(query.head);
        let mut terms = 0.0f64;
        let scores: Vec<f64> = (first..=query.row)
            .map(|key| {
                let k = self.key(query.sequence, key_head, key);
                terms = terms.max(magnitude(&q, &k) * self.scale());
                dot(&q, &k) * self.scale()
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
        Weights {
            first,
            log_sum_exp: if scores.is_empty() {
                f64::NEG_INFINITY
            } else {
                largest + sum.ln()
            },
            slack: self.slack(terms),
            scores,
        }
    }

    /// Returns each element of a query's output, with the sum of the magnitudes of its terms.
    pub fn output(&self, query: Query, weights: &Weights) -> Vec<(f64, f64)> {
        let mut out = vec![(0.0, 0.0); self.shape.sizes.width];
        let key_head = self.key_head(query.head);
        for (i, score) in weights.scores.iter().enumerate() {
            let p = (score - weights.log_sum_exp).exp();
            let v = self.value(query.sequence, key_head, weights.first + i);
            for (out, v) in out.iter_mut().zip(v) {
                *out = (out.0 + p * v, out.1 + p * v.abs());
            }
        }
        out
    }

    /// Returns all queries, or 96 of them that include the first and last of each tile.
    fn judged(&self) -> Vec<Query> {
        let sizes = self.shape.sizes;
        let query = |i: usize| Query {
            sequence: i / (sizes.sequence * sizes.heads),
            head: i / sizes.sequence % sizes.heads,
            row: i % sizes.sequence,
        };
        let all = sizes.sequences * sizes.heads * sizes.sequence;
        if all <= 2500 {
            return (0..all).map(query).collect();
        }
        let mut random = Random(all as u64);
        let edges = [0, 63, 64, 127, 128, 255, sizes.sequence - 1];
        let sampled = (0..96).map(|_| random.below(all));
        edges.into_iter().chain(sampled).map(query).collect()
    }

    /// Checks that the output is within the rounding of its bf16 weights, and log Σ exp within that of f32.
    ///
    /// # Errors
    /// A text that names the element.
    pub fn judge(&self, out: &[u8], log_sum_exp: &[u8]) -> Result<Errors, String> {
        let (out, lse): (Vec<bf16>, Vec<f32>) = (values(out), values(log_sum_exp));
        let parts = self.judged().into_par_iter();
        let parts = parts.map(|query| {
            let mut errors = Errors::default();
            let weights = self.weights(query);
            let got = f64::from(lse[self.statistic(query)]);
            let want = weights.log_sum_exp;
            let sums = weights.scores.len() as f64 * F32_ROUNDOFF + weights.slack;
            if weights.scores.is_empty() {
                if got != want {
                    return Err(format!("{query:?}: log Σ exp is {got} instead of {want}"));
                }
            } else {
                let bound = sums + 4.0 * F32_ROUNDOFF * want.abs();
                let mut of_lse = Errors::default();
                of_lse.add(got, want, bound, || format!("{query:?}: log Σ exp"))?;
            }
            let got = self.of_query(&out, query).iter();
            for (i, (got, (want, terms))) in got.zip(self.output(query, &weights)).enumerate() {
                let sum = (BF16_ROUNDOFF + 2.0 * sums) * terms + LEAST_NORMAL;
                let bound = half_ulp_bf16(want.abs() + sum) + sum;
                let place = || format!("{query:?}, column {i}");
                errors.add(exact(*got), want, bound, place)?;
            }
            Ok(errors)
        });
        Errors::of_parts(parts)?.at_most(4e-3)
    }
}

/// Returns the launch for these inputs. Buffers: out, log_sum_exp, qkv, first_key.
pub fn problem(inputs: &Arc<Inputs>) -> Problem {
    let i = inputs.clone();
    let (shape, sizes, packed) = (i.shape, i.shape.sizes, i.first_key.is_some());
    let mut buffers = vec![
        Buffer::output("out", shape.tokens() * shape.out_width() * 2),
        Buffer::output("log_sum_exp", shape.tokens() * shape.sizes.heads * 4),
        Buffer::input("qkv", &i.qkv),
    ];
    buffers.extend(i.first_key.as_ref().map(|f| Buffer::input("first_key", f)));
    Problem {
        label: format!("{shape:?}"),
        buffers,
        launch: launch_of!(AttentionForward {
            out, log_sum_exp, qkv, first_key if packed;
            tokens: shape.tokens(), sequence: sizes.sequence, heads: sizes.heads,
            key_value_heads: sizes.key_value_heads, head_width: sizes.width,
        }),
        judge: Box::new(move |out| i.judge(&out[0], &out[1])),
    }
}

/// Returns shapes for slow tools.
pub fn small_shapes() -> Vec<Shape> {
    vec![
        Shape::new(1, 1, 1, 1, 64),
        Shape::new(2, 1, 1, 1, 128).packed(),
        Shape::new(2, 17, 4, 2, 64),
        Shape::new(2, 300, 2, 1, 64).packed(),
        Shape::new(1, 255, 2, 2, 128),
        // More key tiles than ring stages, and more query tiles than concurrent blocks.
        Shape::new(2, 430, 2, 1, 128),
    ]
}

/// Returns shapes that reach all paths of the kernels.
pub fn covering_shapes() -> Vec<Shape> {
    vec![
        Shape::new(3, 17, 4, 4, 128).packed(),
        Shape::new(1, 128, 3, 1, 64),
        Shape::new(2, 129, 4, 1, 128),
        Shape::new(1, 640, 2, 1, 128).packed(),
        Shape::new(5, 200, 4, 2, 64).packed(),
        Shape::new(1, 255, 1, 1, 64).with_magnitude(128.0),
        Shape::new(2, 192, 2, 1, 128)
            .packed()
            .with_magnitude(1024.0),
    ]
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let long = vec![
        Shape::new(1, 2048, 1, 1, 64),
        Shape::new(1, 2048, 2, 1, 128).packed(),
    ];
    [
        ("small", small_shapes(), true),
        ("covering", covering_shapes(), false),
        ("long", long, false),
    ]
    .map(|(name, shapes, small)| {
        let problems = each(shapes, |shape| problem(&Arc::new(Inputs::new(&shape))));
        Case::new("attention_forward", "attention", name, small, problems)
    })
    .into()
}
