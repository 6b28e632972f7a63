//! Checks combine (`kernels/combine.cu`) against float64.

use super::dispatch::Batch;
use super::numbers::{Errors, F32_ROUNDOFF, Random, half_ulp_bf16};
use super::routed::{Routed, covering_batches, small_batches};
use super::{Buffer, Case, Problem, each, launch_of, values};
use crate::kernels::Combine;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// The variant of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Whether rows are weighted by gates; otherwise each row has weight 1.
    pub gates: bool,
    /// Whether the default vectors of the experts that were not chosen are added.
    pub vectors: bool,
    /// Whether the result is added to y.
    pub accumulate: bool,
}

/// Forward of `topk`; gradient of x, assigned and accumulated; forward of `default`, assigned and accumulated.
pub const MODES: [Mode; 5] = [
    Mode::new(true, false, false),
    Mode::new(false, false, false),
    Mode::new(false, false, true),
    Mode::new(true, true, false),
    Mode::new(true, true, true),
];

impl Mode {
    const fn new(gates: bool, vectors: bool, accumulate: bool) -> Self {
        Self {
            gates,
            vectors,
            accumulate,
        }
    }
}

/// The inputs of one launch.
pub struct Inputs {
    /// The routed batch.
    pub routed: Routed,
    /// Width D of a row.
    pub hidden: usize,
    /// The variant.
    pub mode: Mode,
    /// `[rows_given, D]`; NaN in rows that belong to no slot.
    pub rows: Vec<bf16>,
    /// `[E, D]`.
    pub vectors: Vec<f32>,
    /// `[T, D]`: the previous content of y.
    pub before: Vec<bf16>,
}

/// Relative error of a float represented by two bf16 terms: half an ulp of half an ulp.
pub(super) const SPLIT: f64 = 1.0 / 65536.0;

impl Inputs {
    /// Creates seeded inputs for a batch.
    pub fn new(batch: Batch, hidden: usize, mode: Mode) -> Self {
        let routed = Routed::new(batch);
        let mut random = Random(hidden as u64 + 17 * routed.rows_given as u64);
        let mut rows = random.normals_bf16(routed.rows_given * hidden);
        rows[routed.sorted.rows() * hidden..].fill(bf16::NAN);
        Self {
            hidden,
            mode,
            rows,
            vectors: random.normals(routed.experts() * hidden),
            before: random.normals_bf16(routed.tokens() * hidden),
            routed,
        }
    }

    /// Returns for each element of y of one token the value, the sum of the magnitudes of its terms, and that of the terms
    /// with ê only.
    fn token(&self, token: usize) -> Vec<(f64, f64, f64)> {
        let (hidden, experts) = (self.hidden, self.routed.experts());
        let mut sums = vec![(0.0, 0.0, 0.0); hidden];
        let gate = |expert: usize| f64::from(self.routed.gates[token * experts + expert]);
        for (row, expert) in self.routed.rows_of(token) {
            let gate = if self.mode.gates { gate(expert) } else { 1.0 };
            let row = &self.rows[row * hidden..(row + 1) * hidden];
            for (sum, value) in sums.iter_mut().zip(row) {
                let term = gate * value.to_f64();
                *sum = (sum.0 + term, sum.1 + term.abs(), 0.0);
            }
        }
        let rows = self.routed.row_of_expert(token);
        for expert in (0..experts).filter(|&e| self.mode.vectors && rows[e].is_none()) {
            let vector = &self.vectors[expert * hidden..(expert + 1) * hidden];
            for (sum, &value) in sums.iter_mut().zip(vector) {
                let term = gate(expert) * f64::from(value);
                *sum = (sum.0 + term, sum.1 + term.abs(), sum.2 + term.abs());
            }
        }
        if self.mode.accumulate {
            let before = &self.before[token * hidden..(token + 1) * hidden];
            for (sum, value) in sums.iter_mut().zip(before) {
                let term = value.to_f64();
                *sum = (sum.0 + term, sum.1 + term.abs(), sum.2);
            }
        }
        sums
    }

    /// Checks that every element is within half an ulp of bf16 and the rounding of its sum, and not finite where the
    /// reference is not.
    ///
    /// # Errors
    /// A text that names the element.
    fn judge(&self, bytes: &[u8]) -> Result<Errors, String> {
        let got: Vec<bf16> = values(bytes);
        let terms = (self.routed.experts() + self.routed.slots() + 2) as f64;
        let parts = got.par_chunks(self.hidden).enumerate();
        let parts = parts.map(|(token, got)| {
            let mut errors = Errors::default();
            for (column, (got, want)) in got.iter().zip(self.token(token)).enumerate() {
                let (want, magnitude, of_vectors) = want;
                let sum = terms * F32_ROUNDOFF * magnitude + 3.0 * SPLIT * of_vectors;
                let bound = half_ulp_bf16(want.abs() + sum) + sum;
                let place = || format!("token {token}, column {column}");
                errors.add_unless_spoilt(got.to_f64(), want, bound, place)?;
            }
            Ok(errors)
        });
        Errors::of_parts(parts)?.at_most(2e-3)
    }

    /// Describes the problem, for messages.
    pub fn label(&self) -> String {
        format!(
            "{:?}, {}, D {}",
            self.mode,
            self.routed.label(),
            self.hidden
        )
    }
}

/// Returns the launch for these inputs. Buffers: y, rows, gates, vectors, slot_row, choices.
pub fn problem(inputs: &Arc<Inputs>) -> Problem {
    let i = inputs.clone();
    let mode = i.mode;
    let mut buffers = vec![
        Buffer::added_to("y", &i.before, mode.accumulate),
        Buffer::input("rows_in", &i.rows),
        Buffer::input("gates", &i.routed.gates),
        Buffer::input("vectors", &i.vectors),
    ];
    buffers.extend(i.routed.slot_buffers());
    let has_choices = i.routed.has_choices();
    let (tokens, rows) = (i.routed.tokens(), i.routed.rows_given);
    let (experts, slots) = (i.routed.experts(), i.routed.slots());
    let hidden = i.hidden;
    Problem {
        label: i.label(),
        buffers,
        launch: launch_of!(Combine {
            y, rows_in, gates if mode.gates, slot_row, choices if has_choices,
            vectors if mode.vectors;
            tokens, rows, experts, hidden, slots, accumulate: mode.accumulate,
        }),
        judge: Box::new(move |out| i.judge(&out[0])),
    }
}

/// Inputs with rows and gates that are not finite; these may affect only their own tokens.
fn spoilt(mode: Mode) -> Inputs {
    let mut inputs = Inputs::new(Batch::random(70, 16, 2, 20), 136, mode);
    let hidden = inputs.hidden;
    inputs.rows[3 * hidden..4 * hidden].fill(bf16::NAN);
    inputs.rows[40 * hidden..41 * hidden].fill(bf16::INFINITY);
    inputs.routed.gates[33 * 16..34 * 16].fill(f32::NAN);
    inputs.routed.gates[69 * 16 + 5] = f32::INFINITY;
    inputs
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let widths = [8, 136, 264, 72, 384, 1032, 520];
    let mut all = Vec::new();
    for mode in MODES {
        let sized = |batches: Vec<Batch>| {
            let shapes = batches.into_iter().zip(widths.into_iter().cycle());
            each(shapes, move |(batch, hidden)| {
                problem(&Arc::new(Inputs::new(batch, hidden, mode)))
            })
        };
        let mut small = sized(small_batches());
        small.extend(each([mode], |mode| problem(&Arc::new(spoilt(mode)))));
        let case = |name, small, problems| {
            let name = format!("{name} {}", mode.name());
            Case::new("combine", "combine", &name, small, problems)
        };
        all.push(case("small", true, small));
        all.push(case("covering", false, sized(covering_batches())));
    }
    all
}

impl Mode {
    fn name(self) -> String {
        let parts = [
            (self.gates, "gates"),
            (self.vectors, "vectors"),
            (self.accumulate, "accumulated"),
        ];
        let on: Vec<&str> = parts.iter().filter(|p| p.0).map(|p| p.1).collect();
        if on.is_empty() {
            "rows alone".into()
        } else {
            on.join(" ")
        }
    }
}
