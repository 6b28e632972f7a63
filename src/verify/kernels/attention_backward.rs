//! Checks the gradient of attention (`kernels/attention_backward.cu`) against float64.

use super::attention::{
    BF16_ROUNDOFF, Inputs, LEAST_NORMAL, Query, Shape, covering_shapes, dot, magnitude,
    small_shapes,
};
use super::numbers::{Errors, F32_ROUNDOFF, Random, half_ulp_bf16};
use super::operands::exact;
use super::rope::{table_buffers, turned};
use super::{Buffer, Case, Problem, each, launch_of, values};
use crate::kernels::AttentionBackward;
use crate::tensor::dtype::nearest_bf16;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// The inputs of one launch: the tensors that forward saved, and an incoming gradient of unit scale.
pub struct Gradient {
    /// The inputs of forward.
    pub inputs: Inputs,
    /// Gradient of the output `[T, H d]`.
    pub dout: Vec<bf16>,
    /// Output of forward `[T, H d]`.
    pub out: Vec<bf16>,
    /// log Σ exp of the scores `[B, H, S]`.
    pub log_sum_exp: Vec<f32>,
}

/// Value and error bound of each element of a line.
type Line = Vec<(f64, f64)>;

/// The contribution of one query and one key to the gradients.
struct Pair {
    /// P and dS.
    p: f64,
    ds: f64,
    /// Bounds of their errors as operands.
    p_error: f64,
    ds_error: f64,
}

fn add(line: &mut Line, factor: f64, factor_error: f64, values: &[f64]) {
    for (line, value) in line.iter_mut().zip(values) {
        *line = (
            line.0 + factor * value,
            line.1 + (factor_error + 64.0 * F32_ROUNDOFF * factor.abs()) * value.abs(),
        );
    }
}

impl Gradient {
    /// Creates seeded inputs, and computes the outputs of forward in float64.
    pub fn new(shape: &Shape) -> Self {
        let inputs = Inputs::new(shape);
        let sizes = shape.sizes;
        let mut random = Random((shape.tokens() + 5 * sizes.heads) as u64);
        let queries: Vec<Query> = (0..shape.tokens() * sizes.heads)
            .map(|i| Query {
                sequence: i / sizes.heads / sizes.sequence,
                row: i / sizes.heads % sizes.sequence,
                head: i % sizes.heads,
            })
            .collect();
        let rows: Vec<(Vec<bf16>, f32)> = queries
            .par_iter()
            .map(|&query| {
                let weights = inputs.weights(query);
                let out = inputs.output(query, &weights);
                let out = out.iter().map(|o| nearest_bf16(o.0)).collect();
                (out, weights.log_sum_exp as f32)
            })
            .collect();
        let mut log_sum_exp = vec![0.0; queries.len()];
        for (query, row) in queries.iter().zip(&rows) {
            log_sum_exp[inputs.statistic(*query)] = row.1;
        }
        Self {
            dout: random.normals_bf16(shape.tokens() * shape.out_width()),
            out: rows.into_iter().flat_map(|row| row.0).collect(),
            log_sum_exp,
            inputs,
        }
    }

    fn of_head(&self, values: &[bf16], query: Query) -> Vec<f64> {
        let part = self.inputs.of_query(values, query).iter();
        part.map(|&v| exact(v)).collect()
    }

    /// `q` and `dout` belong to the query, `k` and `v` to the key.
    fn pair(&self, query: Query, [q, dout, k, v]: [&[f64]; 4]) -> Pair {
        let (inputs, width) = (&self.inputs, self.inputs.shape.sizes.width);
        let lse = f64::from(self.log_sum_exp[inputs.statistic(query)]);
        let out = self.of_head(&self.out, query);
        let p = (dot(q, k) * inputs.scale() - lse).exp();
        let ds = p * (dot(dout, v) - dot(dout, &out));
        let terms = magnitude(dout, v) + magnitude(dout, &out);
        let slack = inputs.slack(magnitude(q, k) * inputs.scale() + lse.abs());
        let rounding = BF16_ROUNDOFF + 2.0 * slack;
        let of_terms = (2.0 * width as f64 * F32_ROUNDOFF * p + LEAST_NORMAL) * terms;
        Pair {
            p,
            ds: ds * inputs.scale(),
            p_error: rounding * p + LEAST_NORMAL,
            ds_error: (rounding * ds.abs() + of_terms) * inputs.scale(),
        }
    }

    fn dq(&self, query: Query) -> Line {
        let inputs = &self.inputs;
        let (q, dout) = (inputs.query(query), self.of_head(&self.dout, query));
        let key_head = inputs.key_head(query.head);
        let mut line = vec![(0.0, 0.0); inputs.shape.sizes.width];
        for row in inputs.first_visible(query.sequence, query.row)..=query.row {
            let k = inputs.key(query.sequence, key_head, row);
            let v = inputs.value(query.sequence, key_head, row);
            let pair = self.pair(query, [&q, &dout, &k, &v]);
            add(&mut line, pair.ds, pair.ds_error, &k);
        }
        line
    }

    /// Returns dK and dV of one key.
    fn dkv(&self, sequence: usize, key_head: usize, row: usize) -> [Line; 2] {
        let (inputs, sizes) = (&self.inputs, self.inputs.shape.sizes);
        let k = inputs.key(sequence, key_head, row);
        let v = inputs.value(sequence, key_head, row);
        let mut lines = [0, 1].map(|_| vec![(0.0, 0.0); sizes.width]);
        let group = sizes.heads / sizes.key_value_heads;
        for head in key_head * group..(key_head + 1) * group {
            let sees = |&other: &usize| inputs.first_visible(sequence, other) <= row;
            for other in (row..sizes.sequence).filter(sees) {
                let query = Query {
                    sequence,
                    head,
                    row: other,
                };
                let (q, dout) = (inputs.query(query), self.of_head(&self.dout, query));
                let pair = self.pair(query, [&q, &dout, &k, &v]);
                add(&mut lines[0], pair.ds, pair.ds_error, &q);
                add(&mut lines[1], pair.p, pair.p_error, &dout);
            }
        }
        lines
    }

    /// Returns the rows of sequences to check: all, or some that include the edges of the tiles.
    fn judged(&self) -> Vec<(usize, usize)> {
        let sizes = self.inputs.shape.sizes;
        let all = sizes.sequences * sizes.sequence;
        let place = |i: usize| (i / sizes.sequence, i % sizes.sequence);
        if all * sizes.heads * sizes.sequence <= 600_000 {
            return (0..all).map(place).collect();
        }
        let mut random = Random(all as u64);
        let edges = [0, 63, 64, 127, 128, all - 1];
        let sampled = (0..24).map(|_| random.below(all));
        edges.into_iter().chain(sampled).map(place).collect()
    }

    fn judge(&self, dqkv: &[u8]) -> Result<Errors, String> {
        let got: Vec<bf16> = values(dqkv);
        let shape = self.inputs.shape;
        let sizes = shape.sizes;
        let parts = self.judged().into_par_iter();
        let parts = parts.map(|(sequence, row)| {
            let mut lines: Vec<Line> = (0..sizes.heads)
                .map(|head| {
                    self.dq(Query {
                        sequence,
                        head,
                        row,
                    })
                })
                .collect();
            let keys: Vec<[Line; 2]> = (0..sizes.key_value_heads)
                .map(|head| self.dkv(sequence, head, row))
                .collect();
            lines.extend(keys.iter().map(|k| k[0].clone()));
            if shape.turned {
                lines = lines.iter().map(|line| turned(row, line, true)).collect();
            }
            lines.extend(keys.iter().map(|k| k[1].clone()));
            let at = (sequence * sizes.sequence + row) * shape.qkv_width();
            let got = &got[at..][..shape.qkv_width()];
            let mut errors = Errors::default();
            for (i, (got, &(want, error))) in got.iter().zip(lines.iter().flatten()).enumerate() {
                let bound = half_ulp_bf16(want.abs() + error) + error;
                let place = || {
                    let (head, column) = (i / sizes.width, i % sizes.width);
                    format!("sequence {sequence}, row {row}, head {head}, column {column}")
                };
                errors.add(exact(*got), want, bound, place)?;
            }
            Ok(errors)
        });
        let errors = Errors::of_parts(parts)?;
        // If one key has all the weight, the gradient of the scores consists only of rounding errors.
        match shape.magnitude == 1.0 && sizes.sequence > 1 {
            true => errors.at_most(5e-3),
            false => Ok(errors),
        }
    }
}

/// Returns the number of floats in the workspace.
pub fn workspace(shape: &Shape) -> usize {
    let s = shape.sizes;
    2 * s.sequences * s.heads * s.sequence.next_multiple_of(128)
}

/// Returns the launch for these inputs. Buffers: dqkv, workspace, dout, qkv, out, log_sum_exp; if present, first_key;
/// cosines, sines.
pub fn problem(gradient: &Arc<Gradient>) -> Problem {
    let g = gradient.clone();
    let (shape, sizes) = (g.inputs.shape, g.inputs.shape.sizes);
    let mut buffers = vec![
        Buffer::output("dqkv", g.inputs.qkv.len() * 2),
        Buffer::workspace("workspace", workspace(&shape) * 4),
        Buffer::input("dout", &g.dout),
        Buffer::input("qkv", &g.inputs.qkv),
        Buffer::input("out", &g.out),
        Buffer::input("log_sum_exp", &g.log_sum_exp),
    ];
    let first_key = g.inputs.first_key.as_ref();
    let packed = first_key.is_some();
    buffers.extend(first_key.map(|f| Buffer::input("first_key", f)));
    if shape.turned {
        buffers.extend(table_buffers(sizes.sequence, sizes.width));
    }
    Problem {
        label: format!("backward, {shape:?}"),
        buffers,
        launch: launch_of!(AttentionBackward {
            dqkv, workspace, dout, qkv, out, log_sum_exp, first_key if packed,
            cosines if shape.turned, sines if shape.turned;
            tokens: shape.tokens(), sequence: sizes.sequence, heads: sizes.heads,
            key_value_heads: sizes.key_value_heads, head_width: sizes.width,
        }),
        judge: Box::new(move |out| g.judge(&out[0])),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let long = vec![
        Shape::new(1, 2048, 1, 1, 64).packed(),
        Shape::new(1, 1000, 2, 1, 128),
    ];
    let turned = vec![
        Shape::new(2, 70, 4, 2, 64).turned(),
        Shape::new(1, 131, 2, 1, 128).packed().turned(),
        Shape::new(3, 1, 1, 1, 128).turned(),
    ];
    [
        ("small", small_shapes(), true),
        ("turned", turned, true),
        ("covering", covering_shapes(), false),
        ("long", long, false),
    ]
    .map(|(name, shapes, small)| {
        let problems = each(shapes, |shape| problem(&Arc::new(Gradient::new(&shape))));
        let launcher = "attention_backward";
        Case::new(launcher, launcher, name, small, problems)
    })
    .into()
}
