//! The gates' gradient (`kernels/gate_gradient.cu`) against float64.

use super::dispatch::Batch;
use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::routed::{Routed, covering_batches, small_batches};
use super::{Buffer, Case, MakeProblem, Problem, values};
use crate::kernels::GateGradient;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// The inputs of one launch.
pub struct Inputs {
    pub routed: Routed,
    pub hidden: usize,
    pub dot_columns: usize,
    /// Whether the gates of experts that were not chosen get a gradient.
    pub dense: bool,
    /// `[rows_given, C]`; NaN where no slot names a row.
    pub dots: Vec<f32>,
    /// `[T, D]`, the gradient of y.
    pub g: Vec<bf16>,
    /// `[E, D]`.
    pub vectors: Vec<f32>,
}

/// Relative error that two bf16 terms leave of a float: half an ulp of half an ulp.
const SPLIT: f64 = 1.0 / 65536.0;

impl Inputs {
    pub fn new(batch: Batch, hidden: usize, dot_columns: usize, dense: bool) -> Self {
        let routed = Routed::new(batch);
        let mut random = Random(hidden as u64 + 19 * routed.rows_given as u64);
        let mut dots: Vec<f32> = (0..routed.rows_given * dot_columns)
            .map(|_| random.normal())
            .collect();
        dots[routed.sorted.rows() * dot_columns..].fill(f32::NAN);
        Self {
            hidden,
            dot_columns,
            dense,
            dots,
            g: random.normals_bf16(routed.tokens() * hidden),
            vectors: (0..routed.experts() * hidden)
                .map(|_| random.normal())
                .collect(),
            routed,
        }
    }

    /// The gradient of one gate and the bound of its error.
    fn gate(&self, token: usize, expert: usize, row: Option<usize>) -> (f64, f64) {
        let (hidden, columns) = (self.hidden, self.dot_columns);
        let sum = |terms: &mut dyn Iterator<Item = f64>| {
            terms.fold((0.0, 0.0), |(sum, magnitude), term: f64| {
                (sum + term, magnitude + term.abs())
            })
        };
        if let Some(row) = row {
            let dots = &self.dots[row * columns..(row + 1) * columns];
            let (want, magnitude) = sum(&mut dots.iter().map(|&d| f64::from(d)));
            return (want, columns as f64 * F32_ROUNDOFF * magnitude);
        }
        if !self.dense {
            return (0.0, 0.0);
        }
        let g = &self.g[token * hidden..(token + 1) * hidden];
        let vector = &self.vectors[expert * hidden..(expert + 1) * hidden];
        let (want, magnitude) = sum(&mut g
            .iter()
            .zip(vector)
            .map(|(g, &v)| g.to_f64() * f64::from(v)));
        // Two products a term; a tensor core may cut a sum off where float64 rounds.
        let bound = (SPLIT + 4.0 * hidden as f64 * F32_ROUNDOFF) * magnitude;
        (want, bound)
    }

    /// Every gate within the bound of its sum; not finite where the reference is not.
    ///
    /// # Errors
    /// The text names the gate.
    fn judge(&self, bytes: &[u8]) -> Result<Errors, String> {
        let got: Vec<f32> = values(bytes);
        let judged: Result<Vec<Errors>, String> = got
            .par_chunks(self.routed.experts())
            .enumerate()
            .map(|(token, got)| {
                let mut errors = Errors::default();
                let rows = self.routed.row_of_expert(token);
                for (expert, (&got, row)) in got.iter().zip(rows).enumerate() {
                    let (want, bound) = self.gate(token, expert, row);
                    let place = || format!("token {token}, expert {expert}");
                    if want.is_finite() {
                        errors.add(f64::from(got), want, bound, place)?;
                    } else if got.is_finite() {
                        return Err(format!("{}: got {got} instead of {want}", place()));
                    }
                }
                Ok(errors)
            })
            .collect();
        let mut errors = Errors::default();
        judged?.into_iter().for_each(|token| errors.merge(token));
        if !(errors.relative() <= 1e-5) {
            return Err(format!("relative error {:.2e} > 1e-5", errors.relative()));
        }
        Ok(errors)
    }

    pub fn label(&self) -> String {
        let kind = if self.dense { "dense" } else { "chosen" };
        format!(
            "{kind}, {}, D {}, {} dots a row",
            self.routed.label(),
            self.hidden,
            self.dot_columns
        )
    }
}

/// The launch of these inputs. Buffers: dgates, dots, g, vectors, slot_row, choices.
pub fn problem(inputs: &Arc<Inputs>) -> Problem {
    let i = inputs.clone();
    let mut buffers = vec![
        Buffer::output("dgates", i.routed.gates.len() * 4),
        Buffer::input("dots", &i.dots),
        Buffer::input("g", &i.g),
        Buffer::input("vectors", &i.vectors),
    ];
    buffers.extend(i.routed.slot_buffers());
    let (dense, has_choices) = (i.dense, i.routed.has_choices());
    let (tokens, rows) = (i.routed.tokens(), i.routed.rows_given);
    let (experts, slots) = (i.routed.experts(), i.routed.slots());
    let (hidden, dot_columns) = (i.hidden, i.dot_columns);
    Problem {
        label: i.label(),
        buffers,
        launch: Box::new(move |p, stream| {
            GateGradient {
                dgates: p[0].output(),
                dots: p[1].input(),
                g: dense.then(|| p[2].input()),
                vectors: dense.then(|| p[3].input()),
                slot_row: p[4].input(),
                choices: has_choices.then(|| p[5].input()),
                tokens,
                rows,
                experts,
                hidden,
                slots,
                dot_columns,
            }
            .launch(stream)
        }),
        judge: Box::new(move |out| i.judge(&out[0])),
    }
}

/// Gradients and dots that are not finite: they must spoil their own gates alone.
fn spoilt(dense: bool) -> Inputs {
    let mut inputs = Inputs::new(Batch::random(150, 16, 2, 21), 136, 3, dense);
    inputs.dots[3 * 5] = f32::NAN;
    inputs.dots[3 * 100 + 2] = f32::INFINITY;
    inputs.g[33 * 136 + 70] = bf16::NAN;
    inputs.g[149 * 136 + 135] = bf16::NEG_INFINITY;
    inputs
}

pub fn cases() -> Vec<Case> {
    let widths = [8, 136, 328, 72, 264, 520, 200];
    let columns = [1, 2, 11, 8];
    [false, true]
        .into_iter()
        .flat_map(|dense| {
            let shapes = move |batches: Vec<Batch>| -> Vec<MakeProblem> {
                let sizes = widths.into_iter().cycle().zip(columns.into_iter().cycle());
                let make = move |(batch, (hidden, columns)): (Batch, (usize, usize))| {
                    Box::new(move || {
                        let inputs = Inputs::new(batch.clone(), hidden, columns, dense);
                        Ok(problem(&Arc::new(inputs)))
                    }) as MakeProblem
                };
                batches.into_iter().zip(sizes).map(make).collect()
            };
            let mut small = shapes(small_batches());
            small.push(Box::new(move || Ok(problem(&Arc::new(spoilt(dense))))));
            let kind = if dense { "dense" } else { "chosen" };
            [
                ("small", small, true),
                ("covering", shapes(covering_batches()), false),
            ]
            .map(|(name, problems, small)| Case {
                name: format!("gate_gradient {name} {kind}"),
                launcher: "gate_gradient",
                source: "gate_gradient",
                problems,
                small,
            })
        })
        .collect()
}
