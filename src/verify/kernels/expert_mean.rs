//! Checks the sums over experts' rows and the moving average of their means (`kernels/expert_mean.cu`) against float64.

use super::dispatch::Batch;
use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::routed::{Routed, covering_batches, small_batches};
use super::{BOTH, Buffer, Case, Problem, each, exactly, launch_of, pairs, values};
use crate::kernels::bindings::{
    ROUTEGRAD_WEIGHTING_COUNT, ROUTEGRAD_WEIGHTING_PLAIN, ROUTEGRAD_WEIGHTING_SUM_P,
    routegrad_weighting,
};
use crate::kernels::{ExpertMean, ExpertMeanUpdate, ExpertSums};
use std::ops::Range;
use std::sync::Arc;

/// Number of rows per line of column sums.
const BLOCK_ROWS: usize = 64;

/// The inputs of `expert_sums` and `expert_mean`.
pub struct Sums {
    /// The routed batch.
    pub routed: Routed,
    /// Width D of a row.
    pub hidden: usize,
    /// Whether rows are weighted by their gates.
    pub weighted: bool,
    /// `[rows_given / 64 + E, D]`; NaN in lines that belong to no expert.
    pub column_sums: Vec<f32>,
}

impl Sums {
    /// Creates seeded inputs for a batch.
    pub fn new(batch: Batch, hidden: usize, weighted: bool) -> Self {
        let routed = Routed::new(batch);
        let lines = routed.rows_given / BLOCK_ROWS + routed.experts();
        let mut sums = Self {
            hidden,
            weighted,
            column_sums: vec![f32::NAN; lines * hidden],
            routed,
        };
        let mut random = Random(hidden as u64 + 23 * lines as u64);
        for expert in 0..sums.routed.experts() {
            let lines = sums.lines(expert);
            sums.column_sums[lines.start * hidden..lines.end * hidden]
                .fill_with(|| random.normal());
        }
        sums
    }

    fn rows(&self, expert: usize) -> Range<usize> {
        let offsets = &self.routed.sorted.offsets;
        offsets[expert] as usize..offsets[expert + 1] as usize
    }

    /// `column_sums`, `gates`, `offsets`, `row_token`.
    fn buffers(&self) -> [Buffer; 4] {
        // Rows after the last one have no token.
        let mut row_token = self.routed.sorted.row_token.clone();
        row_token.resize(self.routed.rows_given, i32::MAX);
        [
            Buffer::input("column_sums", &self.column_sums),
            Buffer::input("gates", &self.routed.gates),
            Buffer::input("offsets", &self.routed.sorted.offsets),
            Buffer::input("row_token", &row_token),
        ]
    }

    /// Returns the gates of the expert's rows.
    fn gates(&self, expert: usize) -> impl Iterator<Item = f32> {
        self.rows(expert).map(move |row| {
            let token = self.routed.sorted.row_token[row] as usize;
            self.routed.gates[token * self.routed.experts() + expert]
        })
    }

    /// Returns the terms of an expert's sum in one column.
    fn terms(&self, expert: usize, column: usize) -> impl Iterator<Item = f32> {
        let line = move |line: usize| self.column_sums[line * self.hidden + column];
        self.lines(expert).map(line)
    }

    /// Returns the indices of the expert's lines in `column_sums`.
    fn lines(&self, expert: usize) -> Range<usize> {
        let rows = self.rows(expert);
        let first = rows.start / BLOCK_ROWS + expert;
        first..first + rows.len().div_ceil(BLOCK_ROWS)
    }

    /// Checks that sums are within the rounding of their terms, and that the numbers of rows are exact.
    ///
    /// # Errors
    /// A text that names the element.
    fn judge(&self, got: &[u8], masses: &[u8]) -> Result<Errors, String> {
        let (hidden, experts) = (self.hidden, self.routed.experts());
        let (got, masses): (Vec<f32>, Vec<f32>) = (values(got), values(masses));
        let mut errors = Errors::default();
        let mut judge = |got: f32, terms: Vec<f32>, place: String| {
            let (want, magnitude) = sums(terms.iter().map(|&term| f64::from(term)));
            let bound = F32_ROUNDOFF * terms.len() as f64 * magnitude;
            errors.add(f64::from(got), want, bound, || place.clone())
        };
        for expert in 0..experts {
            for column in 0..hidden {
                let place = format!("sum of expert {expert}, column {column}");
                let terms = self.terms(expert, column).collect();
                judge(got[expert * hidden + column], terms, place)?;
            }
            let count = self.rows(expert).len() as f32;
            let mass = masses[2 * expert];
            if self.weighted {
                let place = format!("mass of expert {expert}");
                judge(mass, self.gates(expert).collect(), place)?;
            }
            if masses[2 * expert + 1] != count || (!self.weighted && mass != count) {
                let got = &masses[2 * expert..2 * expert + 2];
                return Err(format!(
                    "expert {expert}: masses {got:?} instead of {count} rows"
                ));
            }
        }
        Ok(errors)
    }

    /// Checks that the average of each expert is within the rounding of its terms, and unchanged for an expert without
    /// rows or mass.
    ///
    /// # Errors
    /// A text that names the element.
    fn judge_mean(
        &self,
        got: &[f32],
        old: &[f32],
        keep: f64,
        weighting: routegrad_weighting,
    ) -> Result<Errors, String> {
        let hidden = self.hidden;
        let mut errors = Errors::default();
        for expert in 0..self.routed.experts() {
            let count = self.rows(expert).len() as f64;
            let divisor = match weighting {
                ROUTEGRAD_WEIGHTING_SUM_P => self.gates(expert).map(f64::from).sum(),
                _ => count,
            };
            for column in 0..hidden {
                let place = || format!("expert {expert}, column {column}");
                let at = expert * hidden + column;
                if divisor == 0.0 {
                    errors.add(f64::from(got[at]), f64::from(old[at]), 0.0, place)?;
                    continue;
                }
                let terms = || self.terms(expert, column).map(f64::from);
                let share = (1.0 - keep) / divisor;
                let (sum, size) = sums(terms());
                let (new, magnitude) = (share * sum, share * size);
                let kept = keep * f64::from(old[at]);
                // Roundings: the sums of the columns and of the gates; 1 − β, the quotient, two products and the sum.
                let roundings = terms().count() as f64 + count + 5.0;
                let bound =
                    F32_ROUNDOFF * (2.0 * kept.abs() + roundings * magnitude + (kept + new).abs());
                errors.add(f64::from(got[at]), kept + new, bound, place)?;
            }
        }
        Ok(errors)
    }
}

/// Returns the launch of `expert_sums`. Buffers: sums, masses, column_sums, gates, offsets, row_token.
pub fn sums_problem(inputs: &Arc<Sums>) -> Problem {
    let i = inputs.clone();
    let experts = i.routed.experts();
    let mut buffers = vec![
        Buffer::output("sums", experts * i.hidden * 4),
        Buffer::output("masses", experts * 8),
    ];
    buffers.extend(i.buffers());
    let (weighted, rows, tokens) = (i.weighted, i.routed.rows_given, i.routed.tokens());
    let hidden = i.hidden;
    Problem {
        label: format!("{}, D {hidden}, weighted {weighted}", i.routed.label()),
        buffers,
        launch: launch_of!(ExpertSums {
            sums, masses, column_sums, gates if weighted, offsets, row_token;
            rows, tokens, experts, hidden,
        }),
        judge: Box::new(move |out| i.judge(&out[0], &out[1])),
    }
}

/// Returns the launch of `expert_mean_update` for `experts` experts: every third has no rows and NaN sums; the last has
/// rows without mass.
pub fn update_problem(experts: usize, hidden: usize, weighting: routegrad_weighting) -> Problem {
    let mut random = Random(experts as u64 * 29 + hidden as u64);
    let average = random.normals(experts * hidden);
    let mut sums = random.normals(experts * hidden);
    let mut masses = Vec::new();
    for expert in 0..experts {
        let (rows, mass) = match expert {
            e if e % 3 == 1 => (0.0, 0.0),
            e if e + 1 == experts && e > 0 => (9.0, 0.0),
            e => (e as f32 + 1.0, 0.3 * (e as f32 + 1.0)),
        };
        if rows == 0.0 {
            sums[expert * hidden..(expert + 1) * hidden].fill(f32::NAN);
        }
        masses.extend([mass, rows]);
    }
    let beta = 0.9f32;
    let buffers = vec![
        Buffer::changed("average", &average),
        Buffer::input("sums", &sums),
        Buffer::input("masses", &masses),
        Buffer::input("beta", &[beta]),
    ];
    Problem {
        label: format!("{experts} experts, D {hidden}, weighting {weighting}"),
        buffers,
        launch: launch_of!(ExpertMeanUpdate {
            average, sums, masses, beta;
            experts, hidden, weighting: weighting as i32,
        }),
        judge: Box::new(move |out| {
            let got: Vec<f32> = values(&out[0]);
            let mut errors = Errors::default();
            for expert in 0..experts {
                let range = expert * hidden..(expert + 1) * hidden;
                let (mass, rows) = (masses[2 * expert], masses[2 * expert + 1]);
                let by_mass = weighting == ROUTEGRAD_WEIGHTING_SUM_P;
                let divisor = if by_mass { mass } else { rows };
                if rows == 0.0 || divisor == 0.0 {
                    let bytes = &out[0][range.start * 4..range.end * 4];
                    let kept = exactly::<f32>("average", bytes, |i| average[range.start + i]);
                    errors.merge(kept.map_err(|why| format!("expert {expert}: {why}"))?);
                    continue;
                }
                for i in range {
                    let keep = f64::from(beta);
                    let (old, sum) = (f64::from(average[i]), f64::from(sums[i]));
                    let (kept, new) = (keep * old, (1.0 - keep) * sum / f64::from(divisor));
                    // Roundings: 1 − β, the quotient, two products and the sum.
                    let bound =
                        F32_ROUNDOFF * (2.0 * kept.abs() + 5.0 * new.abs() + (kept + new).abs());
                    let place = || format!("expert {expert}, element {i}");
                    errors.add(f64::from(got[i]), kept + new, bound, place)?;
                }
            }
            Ok(errors)
        }),
    }
}

/// Returns the launch of `expert_mean` together with `expert_sums` and `expert_mean_update`, which must compute the same
/// bytes. Buffers: average, average of two launches, sums, masses, column_sums, gates, offsets, row_token, beta.
pub fn mean_problem(inputs: &Arc<Sums>, weighting: routegrad_weighting) -> Problem {
    let i = inputs.clone();
    let (experts, hidden) = (i.routed.experts(), i.hidden);
    let mut random = Random(experts as u64 * 37 + hidden as u64);
    let old = random.normals(experts * hidden);
    let beta = 0.9f32;
    let mut buffers = vec![
        Buffer::changed("average", &old),
        Buffer::changed("average of two launches", &old),
        Buffer::workspace("sums", experts * hidden * 4),
        Buffer::workspace("masses", experts * 8),
    ];
    buffers.extend(i.buffers());
    buffers.push(Buffer::input("beta", &[beta]));
    let (rows, tokens) = (i.routed.rows_given, i.routed.tokens());
    Problem {
        label: format!("{}, D {hidden}, weighting {weighting}", i.routed.label()),
        buffers,
        launch: launch_of!(
            ExpertMean {
                average, column_sums, gates, offsets, row_token, beta;
                rows, tokens, experts, hidden, weighting: weighting as i32,
            },
            ExpertSums {
                sums, masses, column_sums, gates, offsets, row_token;
                rows, tokens, experts, hidden,
            },
            ExpertMeanUpdate {
                average = "average of two launches", sums, masses, beta;
                experts, hidden, weighting: weighting as i32,
            }
        ),
        judge: Box::new(move |out| {
            let two: Vec<f32> = values(&out[1]);
            exactly::<f32>("average", &out[0], |i| two[i])?;
            i.judge_mean(&values::<f32>(&out[0]), &old, f64::from(beta), weighting)
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let sized = |batches: Vec<Batch>| {
        let widths = [8, 136, 264, 72, 128, 1032].into_iter().cycle();
        batches.into_iter().zip(widths).collect::<Vec<_>>()
    };
    let sums = |batches| {
        each(
            pairs(sized(batches), BOTH),
            |((batch, hidden), weighted)| {
                sums_problem(&Arc::new(Sums::new(batch, hidden, weighted)))
            },
        )
    };
    let updates = each(
        pairs(
            [(1, 8), (7, 136), (64, 1032), (256, 72)],
            [
                ROUTEGRAD_WEIGHTING_PLAIN,
                ROUTEGRAD_WEIGHTING_SUM_P,
                ROUTEGRAD_WEIGHTING_COUNT,
            ],
        ),
        |((experts, hidden), weighting)| update_problem(experts, hidden, weighting),
    );
    let means = |batches| {
        let weightings = [
            ROUTEGRAD_WEIGHTING_SUM_P,
            ROUTEGRAD_WEIGHTING_PLAIN,
            ROUTEGRAD_WEIGHTING_SUM_P,
            ROUTEGRAD_WEIGHTING_COUNT,
        ];
        let shapes = sized(batches)
            .into_iter()
            .zip(weightings.into_iter().cycle());
        each(shapes, |((batch, hidden), weighting)| {
            let mut inputs = Sums::new(batch, hidden, true);
            // The last expert has rows without mass.
            let experts = inputs.routed.experts();
            let last = inputs.routed.gates.iter_mut().skip(experts - 1);
            last.step_by(experts).for_each(|gate| *gate = 0.0);
            mean_problem(&Arc::new(inputs), weighting)
        })
    };
    let batches = || [small_batches(), covering_batches()];
    let mut all = Case::both("expert_sums", "expert_mean", batches(), sums);
    all.push(Case::small("expert_mean_update", "expert_mean", updates));
    all.extend(Case::both("expert_mean", "expert_mean", batches(), means));
    all
}
