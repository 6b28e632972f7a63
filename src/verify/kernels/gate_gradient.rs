//! Checks the gradient of the gates (`kernels/gate_gradient.cu`) against float64, and the rows of g exactly.

use super::combine::SPLIT;
use super::dispatch::Batch;
use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::routed::{Routed, covering_batches, small_batches};
use super::{Buffer, Case, Problem, bind, each, exactly, values};
use crate::kernels::{DefaultDots, GateGradient};
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// The launched kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `gate_gradient`, with 0 for experts that were not chosen.
    Chosen,
    /// `default_dots` without rows, then `gate_gradient`.
    Dots,
    /// `default_dots` with rows, then `gate_gradient`.
    DotsAndRows,
}
use Kind::{Chosen, Dots, DotsAndRows};

/// Content of g_rows before the launch.
const BEFORE: u16 = 0x4321;

/// The inputs of the launches.
pub struct Inputs {
    /// The routed batch.
    pub routed: Routed,
    /// Width D of a row.
    pub hidden: usize,
    /// Number C of partial dots of a row.
    pub dot_columns: usize,
    /// The launches.
    pub kind: Kind,
    /// `[rows_given, C]`; NaN in rows that belong to no slot.
    pub dots: Vec<f32>,
    /// `[T, D]`, the gradient of y.
    pub g: Vec<bf16>,
    /// `[E, D]`.
    pub vectors: Vec<f32>,
}

impl Inputs {
    /// Creates seeded inputs for a batch.
    pub fn new(batch: Batch, hidden: usize, dot_columns: usize, kind: Kind) -> Self {
        let routed = Routed::new(batch);
        let mut random = Random(hidden as u64 + 19 * routed.rows_given as u64);
        let mut dots = random.normals(routed.rows_given * dot_columns);
        dots[routed.sorted.rows() * dot_columns..].fill(f32::NAN);
        Self {
            hidden,
            dot_columns,
            kind,
            dots,
            g: random.normals_bf16(routed.tokens() * hidden),
            vectors: random.normals(routed.experts() * hidden),
            routed,
        }
    }

    /// Returns the gradient of one gate and the bound of its error.
    fn gate(&self, token: usize, expert: usize, row: Option<usize>) -> (f64, f64) {
        let (hidden, columns) = (self.hidden, self.dot_columns);
        if let Some(row) = row {
            let dots = &self.dots[row * columns..(row + 1) * columns];
            let (want, magnitude) = sums(dots.iter().map(|&d| f64::from(d)));
            return (want, columns as f64 * F32_ROUNDOFF * magnitude);
        }
        if self.kind == Chosen {
            return (0.0, 0.0);
        }
        let g = &self.g[token * hidden..(token + 1) * hidden];
        let vector = &self.vectors[expert * hidden..(expert + 1) * hidden];
        let products = g.iter().zip(vector);
        let (want, magnitude) = sums(products.map(|(g, &v)| g.to_f64() * f64::from(v)));
        // Two products per term; a tensor core may truncate a sum where float64 rounds.
        let bound = (SPLIT + 4.0 * hidden as f64 * F32_ROUNDOFF) * magnitude;
        (want, bound)
    }

    /// Checks that every gate is within the bound of its sum, and not finite where the reference is not.
    ///
    /// # Errors
    /// A text that names the gate.
    fn judge(&self, bytes: &[u8]) -> Result<Errors, String> {
        let got: Vec<f32> = values(bytes);
        let parts = got.par_chunks(self.routed.experts()).enumerate();
        let parts = parts.map(|(token, got)| {
            let mut errors = Errors::default();
            let rows = self.routed.row_of_expert(token);
            for (expert, (&got, row)) in got.iter().zip(rows).enumerate() {
                let (want, bound) = self.gate(token, expert, row);
                let place = || format!("token {token}, expert {expert}");
                errors.add_unless_spoilt(f64::from(got), want, bound, place)?;
            }
            Ok(errors)
        });
        Errors::of_parts(parts)?.at_most(1e-5)
    }

    /// Checks that each row equals g of its token, and that rows that belong to no slot are unchanged.
    fn judge_rows(&self, bytes: &[u8]) -> Result<Errors, String> {
        let mut token_of = vec![None; self.routed.rows_given];
        for token in 0..self.routed.tokens() {
            let rows = self.routed.rows_of(token);
            rows.for_each(|(row, _)| token_of[row] = Some(token));
        }
        let hidden = self.hidden;
        exactly::<u16>("g_rows", bytes, |i| match token_of[i / hidden] {
            Some(token) if self.kind == DotsAndRows => {
                self.g[token * hidden + i % hidden].to_bits()
            }
            _ => BEFORE,
        })
    }

    /// Describes the problem, for messages.
    pub fn label(&self) -> String {
        format!(
            "{:?}, {}, D {}, {} dots a row",
            self.kind,
            self.routed.label(),
            self.hidden,
            self.dot_columns
        )
    }
}

/// Returns the launches for these inputs. Buffers: dgates, g_rows, dots, g, vectors, slot_row, choices.
pub fn problem(inputs: &Arc<Inputs>) -> Problem {
    let i = inputs.clone();
    let mut buffers = vec![
        Buffer::output("dgates", i.routed.gates.len() * 4),
        Buffer::changed("g_rows", &vec![BEFORE; i.routed.rows_given * i.hidden]),
        Buffer::input("dots", &i.dots),
        Buffer::input("g", &i.g),
        Buffer::input("vectors", &i.vectors),
    ];
    buffers.extend(i.routed.slot_buffers());
    let (kind, has_choices) = (i.kind, i.routed.has_choices());
    let (tokens, rows) = (i.routed.tokens(), i.routed.rows_given);
    let (experts, slots) = (i.routed.experts(), i.routed.slots());
    let (hidden, dot_columns) = (i.hidden, i.dot_columns);
    Problem {
        label: i.label(),
        buffers,
        launch: Box::new(move |p, stream| {
            if kind != Chosen {
                let sorts = kind == DotsAndRows;
                bind!(p, DefaultDots {
                    dgates, g_rows if sorts, g, vectors, slot_row if sorts;
                    tokens, rows, experts, hidden, slots,
                })
                .launch(stream)?;
            }
            bind!(p, GateGradient {
                dgates, dots, slot_row, choices if has_choices;
                tokens, rows, experts, slots, dot_columns, keep: kind != Chosen,
            })
            .launch(stream)
        }),
        judge: Box::new(move |out| {
            let mut errors = i.judge(&out[0])?;
            errors.merge(i.judge_rows(&out[1])?);
            Ok(errors)
        }),
    }
}

/// Inputs with gradients and dots that are not finite; these may affect only their own gates.
fn spoilt(kind: Kind) -> Inputs {
    let mut inputs = Inputs::new(Batch::random(150, 16, 2, 21), 136, 3, kind);
    inputs.dots[3 * 5] = f32::NAN;
    inputs.dots[3 * 100 + 2] = f32::INFINITY;
    inputs.g[33 * 136 + 70] = bf16::NAN;
    inputs.g[149 * 136 + 135] = bf16::NEG_INFINITY;
    inputs
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (kind, launcher) in [(Chosen, "gate_gradient"), (DotsAndRows, "default_dots")] {
        let sized = |batches: Vec<Batch>| {
            let widths = [8, 136, 328, 72, 264, 520, 200].into_iter().cycle();
            let sizes = widths.zip([1, 2, 11, 8].into_iter().cycle());
            each(
                batches.into_iter().zip(sizes),
                move |(batch, (hidden, columns))| {
                    problem(&Arc::new(Inputs::new(batch, hidden, columns, kind)))
                },
            )
        };
        let mut small = sized(small_batches());
        small.extend(each([kind], |kind| problem(&Arc::new(spoilt(kind)))));
        if kind == DotsAndRows {
            // More slots than a block can keep rows of, and no output of rows.
            let more = [
                (Batch::random(150, 12, 11, 22), 1, DotsAndRows),
                (Batch::random(130, 70, 2, 23), 2, Dots),
            ];
            small.extend(each(more, |(batch, columns, kind)| {
                problem(&Arc::new(Inputs::new(batch, 72, columns, kind)))
            }));
        }
        all.push(Case::small(launcher, "gate_gradient", small));
        let covering = sized(covering_batches());
        all.push(Case::covering(launcher, "gate_gradient", covering));
    }
    all
}
