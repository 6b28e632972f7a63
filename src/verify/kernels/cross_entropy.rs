//! Checks the output head and its loss (`kernels/cross_entropy.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::operands::exact;
use super::{BOTH, Buffer, Case, Problem, each, launch_of, pairs, values};
use crate::kernels::cross_entropy::{
    CrossEntropyMean, CrossEntropyRows, GradientScale, HeadLogits, STATISTIC_COLUMNS, statistics,
};
use crate::kernels::launchers::TILE_AUTO;
use half::bf16;

/// A target outside of every vocabulary.
const NO_TARGET: i32 = -7;

/// Returns the launch of `head_logits` with a tile. Buffers: logits, statistics, x, w.
pub fn logits_problem(tokens: usize, vocabulary: usize, hidden: usize, tile: i32) -> Problem {
    let mut random = Random((tokens * 31 + vocabulary) as u64);
    let x = random.normals_bf16(tokens * hidden);
    let w = random.normals_bf16(vocabulary * hidden);
    let buffers = vec![
        Buffer::output("logits", 4 * tokens * vocabulary),
        Buffer::output("statistics", 8 * tokens * statistics(vocabulary)),
        Buffer::input("x", &x),
        Buffer::input("w", &w),
    ];
    Problem {
        label: format!("T {tokens}, V {vocabulary}, D {hidden}"),
        buffers,
        launch: launch_of!(HeadLogits {
            logits, statistics, x, w;
            tokens, vocabulary, hidden, tile,
        }),
        judge: Box::new(move |out| {
            let got: Vec<f32> = values(&out[0]);
            let mut errors = Errors::default();
            judge_statistics(&mut errors, &values::<f32>(&out[1]), &got, vocabulary)?;
            for (token, x) in x.chunks(hidden).enumerate() {
                for (v, w) in w.chunks(hidden).enumerate() {
                    let terms = x.iter().zip(w).map(|(a, b)| exact(*a) * exact(*b));
                    let (want, magnitude) = sums(terms);
                    // Products are exact in f32; the tensor core adds them in an order that is not specified.
                    let bound = (hidden + 8) as f64 * F32_ROUNDOFF * magnitude;
                    let place = || format!("logit {v} of token {token}");
                    let got = f64::from(got[token * vocabulary + v]);
                    errors.add(got, want, bound, place)?;
                }
            }
            Ok(errors)
        }),
    }
}

/// Compares each statistic with the stored logits: the maximum exactly, the sum of exponentials within rounding.
fn judge_statistics(
    errors: &mut Errors,
    got: &[f32],
    logits: &[f32],
    vocabulary: usize,
) -> Result<(), String> {
    let rows = got.chunks(2 * statistics(vocabulary));
    for (token, (z, row)) in logits.chunks(vocabulary).zip(rows).enumerate() {
        for (c, (z, of_columns)) in z.chunks(STATISTIC_COLUMNS).zip(row.chunks(2)).enumerate() {
            let place = || format!("statistic {c} of token {token}");
            let most = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if of_columns[0] != most {
                return Err(format!("{}: got {}, want {most}", place(), of_columns[0]));
            }
            let far = |z: &f32| f64::from(most) - f64::from(*z);
            let sum: f64 = z.iter().map(|z| (-far(z)).exp()).sum();
            // The argument of exp is rounded: an error of |z − m| log₂e roundings; then there are 34 additions.
            let errors_of = |z| (38.0 + 4.0 * far(z)) * F32_ROUNDOFF * (-far(z)).exp() + 1.2e-38;
            errors.add(
                of_columns[1].into(),
                sum,
                z.iter().map(errors_of).sum(),
                place,
            )?;
        }
    }
    Ok(())
}

/// The logits and targets of a problem.
pub struct Rows {
    tokens: usize,
    vocabulary: usize,
    logits: Vec<f32>,  // [T, V]
    targets: Vec<i32>, // [T]
}

impl Rows {
    /// Logits are normal with standard deviation `spread`. With more than four tokens, one token has an invalid target,
    /// one has all its probability on one logit, one has logits of minus infinity, and one has a NaN.
    pub fn new(tokens: usize, vocabulary: usize, spread: f32) -> Self {
        let mut random = Random((tokens * 131 + vocabulary) as u64);
        let logits = (0..tokens * vocabulary).map(|_| spread * random.normal());
        let mut rows = Rows {
            tokens,
            vocabulary,
            logits: logits.collect(),
            targets: (0..tokens)
                .map(|_| random.below(vocabulary) as i32)
                .collect(),
        };
        if tokens > 4 {
            let row = |t: usize| t * vocabulary..(t + 1) * vocabulary;
            rows.targets[1] = NO_TARGET;
            let at = rows.targets[2] as usize;
            rows.logits[row(2)][at] = 3e4;
            rows.logits[row(3)][..vocabulary / 2].fill(f32::NEG_INFINITY);
            rows.targets[3] = vocabulary as i32 - 1;
            rows.logits[row(4)][vocabulary / 3] = f32::NAN;
        }
        rows
    }

    /// Returns the statistics of the rows, `[T, C, 2]`. As in `head_logits`, a maximum is finite and ignores NaN.
    fn statistics(&self) -> Vec<f32> {
        let columns = self.logits.chunks(self.vocabulary);
        let columns = columns.flat_map(|row| row.chunks(STATISTIC_COLUMNS));
        let statistic = |z: &[f32]| {
            let most = z.iter().copied().fold(f32::MIN, f32::max);
            let terms = z.iter().map(|&z| (f64::from(z) - f64::from(most)).exp());
            [most, terms.sum::<f64>() as f32]
        };
        columns.flat_map(statistic).collect()
    }

    /// Returns logsumexp and the softmax of a token's row.
    fn softmax(&self, token: usize) -> (f64, Vec<f64>) {
        let z = &self.logits[token * self.vocabulary..][..self.vocabulary];
        let z: Vec<f64> = z.iter().map(|&z| f64::from(z)).collect();
        let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = z.iter().map(|z| (z - most).exp()).sum();
        let p = z.iter().map(|z| (z - most).exp() / sum).collect();
        (most + sum.ln(), p)
    }
}

/// Returns the launch of `cross_entropy_rows`. Buffers: losses, dlogits, logits, statistics, targets.
pub fn rows_problem(
    rows: Rows,
    factor: f32,
    with_gradient: bool,
    with_statistics: bool,
) -> Problem {
    let (tokens, vocabulary) = (rows.tokens, rows.vocabulary);
    let buffers = vec![
        Buffer::output("losses", 4 * tokens),
        match with_gradient {
            true => Buffer::output("dlogits", 2 * tokens * vocabulary),
            false => Buffer::workspace("dlogits", 16),
        },
        Buffer::input("logits", &rows.logits),
        match with_statistics {
            true => Buffer::input("statistics", &rows.statistics()),
            false => Buffer::workspace("statistics", 16),
        },
        Buffer::input("targets", &rows.targets),
    ];
    Problem {
        label: format!(
            "T {tokens}, V {vocabulary}, gradient {with_gradient}, statistics {with_statistics}"
        ),
        buffers,
        launch: launch_of!(CrossEntropyRows {
            losses, dlogits if with_gradient, logits, statistics if with_statistics, targets;
            tokens, vocabulary, factor,
        }),
        judge: Box::new(move |out| {
            let losses: Vec<f32> = values(&out[0]);
            let dlogits = with_gradient.then(|| values(&out[1]));
            judge_rows(&rows, factor, &losses, &dlogits.unwrap_or_default())
        }),
    }
}

/// Compares losses and, if present, gradients with float64.
fn judge_rows(
    rows: &Rows,
    factor: f32,
    losses: &[f32],
    dlogits: &[bf16],
) -> Result<Errors, String> {
    let vocabulary = rows.vocabulary;
    let mut errors = Errors::default();
    for (token, &loss) in losses.iter().enumerate() {
        let (target, (log_sum_exp, p)) = (rows.targets[token], rows.softmax(token));
        let of_target = usize::try_from(target).map_or(f64::NAN, |at| {
            f64::from(rows.logits[token * vocabulary + at])
        });
        let want = log_sum_exp - of_target;
        let place = || format!("loss of token {token}");
        let got = f64::from(loss);
        match want.is_nan() {
            true if got.is_nan() => {}
            true => return Err(format!("{}: got {got}, want NaN", place())),
            false => {
                let scale = log_sum_exp.abs() + of_target.abs();
                errors.add(got, want, 16.0 * F32_ROUNDOFF * (1.0 + scale), place)?;
            }
        }
        for (v, got) in dlogits
            .iter()
            .skip(token * vocabulary)
            .take(p.len())
            .enumerate()
        {
            let hit = if v as i32 == target { 1.0 } else { 0.0 };
            let want = f64::from(factor) * (p[v] - hit);
            let place = || format!("gradient of logit {v} of token {token}");
            // The argument of exp is rounded twice: an error of |z − m| log₂e roundings each.
            let z = f64::from(rows.logits[token * vocabulary + v]);
            let far = if z.is_finite() {
                (log_sum_exp - z).abs()
            } else {
                0.0
            };
            let own = (16.0 + 4.0 * far) * F32_ROUNDOFF * p[v] * f64::from(factor);
            // exp is 0 below the smallest normal float.
            let error = own.abs() + F32_ROUNDOFF * want.abs() + 1.2e-38;
            errors.add_bf16(*got, want, error, place)?;
        }
    }
    Ok(errors)
}

/// Returns the launch of `cross_entropy_mean`. Buffers: loss, losses.
fn mean_problem(tokens: usize, factor: f32) -> Problem {
    let mut random = Random(tokens as u64);
    let losses: Vec<f32> = (0..tokens).map(|_| random.normal() + 3.0).collect();
    Problem {
        label: format!("T {tokens}"),
        buffers: vec![Buffer::output("loss", 4), Buffer::input("losses", &losses)],
        launch: launch_of!(CrossEntropyMean { loss, losses; tokens, factor }),
        judge: Box::new(move |out| {
            let (sum, magnitude) = sums(losses.iter().map(|&l| f64::from(l)));
            let want = f64::from(factor) * sum;
            let depth = (tokens.div_ceil(256) + 14) as f64;
            let bound = depth * F32_ROUNDOFF * magnitude * f64::from(factor);
            Errors::within("loss", &values::<f32>(&out[0]), |_| (want, bound))
        }),
    }
}

/// Returns the launch of `gradient_scale` on f32 or bf16. Buffers: out, in, factor.
fn scale_problem(elements: usize, narrow: bool, accumulate: bool) -> Problem {
    const FACTOR: f32 = 0.37;
    let mut random = Random(elements as u64 + 3);
    let (input, before) = (random.normals_bf16(elements), random.normals_bf16(elements));
    let wide = |of: &[bf16]| of.iter().map(|v| v.to_f32()).collect::<Vec<f32>>();
    let (out, input_buffer) = match narrow {
        true => (
            Buffer::added_to("out", &before, accumulate),
            Buffer::input("in", &input),
        ),
        false => (
            Buffer::added_to("out", &wide(&before), accumulate),
            Buffer::input("in", &wide(&input)),
        ),
    };
    Problem {
        label: format!("{elements} elements, bf16 {narrow}, accumulate {accumulate}"),
        buffers: vec![out, input_buffer, Buffer::input("factor", &[FACTOR])],
        launch: launch_of!(GradientScale {
            out, input = "in", factor;
            elements, bf16_elements: narrow, accumulate,
        }),
        judge: Box::new(move |out| {
            let want = |i: usize| {
                let old = if accumulate { exact(before[i]) } else { 0.0 };
                let term = f64::from(FACTOR) * exact(input[i]);
                let error = 2.0 * F32_ROUNDOFF * (term.abs() + old.abs());
                (term + old, error)
            };
            match narrow {
                true => Errors::within("element", &values::<bf16>(&out[0]), want),
                false => Errors::within("element", &values::<f32>(&out[0]), want),
            }
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let sizes = [
        (1, 8, 8),
        (67, 264, 72),
        (131, 1000, 136),
        (300, 24, 64),
        (5, 128, 64),
        (3, 136, 8),
    ];
    let logits = each(sizes, |(tokens, vocabulary, hidden)| {
        logits_problem(tokens, vocabulary, hidden, TILE_AUTO)
    });
    let sizes = [(1, 8, 1.0), (7, 264, 4.0), (5, 2056, 30.0), (37, 1000, 1.0)];
    let rows = each(
        pairs(sizes, pairs(BOTH, BOTH)),
        |((tokens, vocabulary, spread), (statistics, gradient))| {
            let rows = Rows::new(tokens, vocabulary, spread);
            rows_problem(rows, 1.0 / tokens as f32, gradient, statistics)
        },
    );
    let large = each(BOTH, |statistics| {
        rows_problem(Rows::new(6, 128_256, 2.0), 1e-4, true, statistics)
    });
    let mean = each([1, 255, 2039, 16_384], |tokens| {
        mean_problem(tokens, 1.0 / tokens as f32)
    });
    let scale = each(
        pairs(pairs(BOTH, BOTH), [8, 2056, 40_008]),
        |((narrow, accumulate), elements)| scale_problem(elements, narrow, accumulate),
    );
    [
        ("head_logits", "small", true, logits),
        ("cross_entropy_rows", "small", true, rows),
        ("cross_entropy_rows", "large vocabulary", false, large),
        ("cross_entropy_mean", "small", true, mean),
        ("gradient_scale", "small", true, scale),
    ]
    .map(|(launcher, name, small, problems)| {
        Case::new(launcher, "cross_entropy", name, small, problems)
    })
    .into()
}
