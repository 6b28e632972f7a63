//! Checks the router's forward (`kernels/router.cu`) against float64: scores and log-sum-exp within the bound of their
//! arithmetic; choices and counts must be exactly those that follow from the scores that the kernel wrote.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
pub use super::router_shapes::{covering_shapes, small_shapes};
use super::{Buffer, Case, Problem, bind, each, exactly, launch_of, machine::POISON, values};
use crate::error::Result;
use crate::kernels::bindings::*;
use crate::kernels::launchers;
use crate::kernels::router::{RouterForward, RouterStatistics, partials};
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// All score functions.
pub const SCORES: [routegrad_score; 4] = [
    ROUTEGRAD_SCORE_LOGITS,
    ROUTEGRAD_SCORE_SOFTMAX,
    ROUTEGRAD_SCORE_SIGMOID,
    ROUTEGRAD_SCORE_RELU,
];

/// A special property of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Nothing special.
    Ordinary,
    /// A bias with both signs and the magnitude of the scores.
    Biased,
    /// Pairs of experts with equal weights.
    Ties,
    /// For every token, the last expert has by far the highest score.
    OneExpert,
    /// A logit of token 1 overflows to infinity; token 17 contains NaN, and the last token an infinity.
    NonFinite,
    /// Logits with magnitudes up to several hundred.
    Large,
}
use Kind::*;

/// Sizes and settings of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of tokens T.
    pub tokens: usize,
    /// Number of experts E.
    pub experts: usize,
    /// Width D of a row of x.
    pub hidden: usize,
    /// Number of choices K per token.
    pub choices: usize,
    /// The score function.
    pub score: routegrad_score,
    /// The special property of the inputs.
    pub kind: Kind,
}

/// x [T, D] and W [E, D] with their logits in float64: for each element of [T, E] the value and Σ|x w|.
pub struct Batch {
    /// Sizes and settings.
    pub shape: Shape,
    /// Inputs `[T, D]`.
    pub x: Vec<bf16>,
    /// Weight of the router `[E, D]`.
    pub w: Vec<f32>,
    /// Bias of the choice `[E]`, if there is one.
    pub bias: Option<Vec<f32>>,
    /// Logits `[T, E]`: value and Σ|x w|.
    pub logits: Vec<(f64, f64)>,
}

impl Batch {
    /// Creates seeded inputs, and computes their logits.
    pub fn new(shape: Shape) -> Self {
        let Shape {
            tokens,
            experts,
            hidden,
            kind,
            ..
        } = shape;
        let mut random = Random((tokens * 31 + experts * 17 + hidden) as u64);
        let mut x = random.normals_bf16(tokens * hidden);
        let scale = if kind == Large { 100.0 } else { 1.5 } / (hidden as f32).sqrt();
        let mut w: Vec<f32> = (0..experts * hidden)
            .map(|_| random.normal() * scale)
            .collect();
        match kind {
            Ties => {
                for pair in w.chunks_exact_mut(2 * hidden) {
                    pair.copy_within(..hidden, hidden);
                }
            }
            OneExpert => {
                x.iter_mut().step_by(hidden).for_each(|v| *v = bf16::ONE);
                w[(experts - 1) * hidden] = 50.0;
            }
            NonFinite => {
                let (last, spare) = (tokens - 1, hidden / 2 - 1);
                for (token, wrong) in [(last, f32::NEG_INFINITY), (17, f32::NAN)] {
                    x[token.min(last) * hidden + hidden / 2] = bf16::from_f32(wrong);
                }
                // In this column only token 1 is not zero, and the weight of expert 0 is so large that the logit
                // overflows.
                x.iter_mut()
                    .skip(spare)
                    .step_by(hidden)
                    .for_each(|v| *v = bf16::ZERO);
                x[last.min(1) * hidden + spare] = bf16::from_f32(64.0);
                w[spare] = 3e38;
            }
            Ordinary | Biased | Large => {}
        }
        let bias = (kind == Biased).then(|| random.normals(experts));
        let logits = (0..tokens * experts)
            .into_par_iter()
            .map(|i| {
                let (x, w) = (&x[i / experts * hidden..], &w[i % experts * hidden..]);
                let products = (0..hidden).map(|d| x[d].to_f64() * f64::from(w[d]));
                products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
            })
            .collect();
        Self {
            shape,
            x,
            w,
            bias,
            logits,
        }
    }

    /// Returns the error bound of a logit with this Σ|x w|: one rounding per addition, and three terms of W per product.
    fn logit_bound(&self, size: f64) -> f64 {
        F32_ROUNDOFF * (self.shape.hidden as f64 + 4.0) * size
    }

    fn label(&self) -> String {
        format!("{:?}", self.shape)
    }
}

/// Returns log Σ exp, computed without overflow.
pub fn log_sum_exp(logits: impl Iterator<Item = f64> + Clone) -> f64 {
    let highest = logits.clone().fold(f64::NEG_INFINITY, f64::max);
    highest + logits.map(|z| (z - highest).exp()).sum::<f64>().ln()
}

/// Returns the `count` experts with the highest score + bias, in increasing order; ties go to the lower expert, and NaN
/// counts as −∞.
pub fn chosen(scores: &[f32], bias: Option<&[f32]>, count: usize) -> Vec<usize> {
    let value = |e: usize| {
        let value = scores[e] + bias.map_or(0.0, |b| b[e]);
        if value.is_nan() {
            f32::NEG_INFINITY
        } else {
            value
        }
    };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| value(b).total_cmp(&(value(a) + 0.0)).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Compares the scores and log-sum-exp of one token with float64.
fn judge_token(batch: &Batch, token: usize, scores: &[f32], lse: f32) -> Result<Errors, String> {
    let Shape { experts, score, .. } = batch.shape;
    let logits = &batch.logits[token * experts..][..experts];
    let want_lse = log_sum_exp(logits.iter().map(|z| z.0));
    let bounds: Vec<f64> = logits.iter().map(|z| batch.logit_bound(z.1)).collect();
    let widest = bounds.iter().copied().fold(0.0, f64::max);
    let lse_bound = widest + F32_ROUNDOFF * (8.0 + 2.0 * want_lse.abs());
    Errors::within(&format!("log_sum_exp of token {token},"), &[lse], |_| {
        (want_lse, lse_bound)
    })?;
    Errors::within(&format!("score of token {token}, expert"), scores, |e| {
        let z = logits[e].0;
        // Rounding of the exponent's argument, then the relative errors of exp and the division.
        let relative = F32_ROUNDOFF * (16.0 + 2.0 * z.abs() + want_lse.abs());
        match score {
            ROUTEGRAD_SCORE_SOFTMAX => {
                let p = (z - want_lse).exp();
                (p, p * ((2.0 * widest).exp_m1() + 2.0 * relative) + 1e-37)
            }
            ROUTEGRAD_SCORE_SIGMOID => {
                let p = 1.0 / (1.0 + (-z).exp());
                (p, p * (bounds[e].exp_m1() + relative) + 1e-37)
            }
            ROUTEGRAD_SCORE_RELU => (z.max(0.0), bounds[e]),
            _ => (z, bounds[e]),
        }
    })
}

/// The outputs of the kernel.
struct Outputs {
    scores: Vec<f32>,
    log_sum_exp: Vec<f32>,
    choices: Vec<i32>,
    statistics: Vec<f32>,
}

/// Compares the statistics with sums of the values that the kernel wrote.
fn judge_statistics(batch: &Batch, out: &Outputs) -> Result<(), String> {
    let Shape {
        tokens,
        experts,
        choices,
        score,
        kind,
        ..
    } = batch.shape;
    let mut counts = vec![0; experts];
    if choices > 0 {
        out.choices.iter().for_each(|&e| counts[e as usize] += 1);
    } else {
        let positive = |i: &usize| out.scores[*i] > 0.0;
        (0..tokens * experts)
            .filter(positive)
            .for_each(|i| counts[i % experts] += 1);
    }
    for (e, &count) in counts.iter().enumerate() {
        let got = out.statistics[experts + e];
        if got != count as f32 {
            return Err(format!("{got} tokens of expert {e} instead of {count}"));
        }
    }
    if kind == NonFinite {
        return Ok(()); // the sums are not finite, and the step is skipped
    }
    let mut unused = Errors::default();
    // At most 128 additions per block, then one per block.
    let terms = 128.0 + tokens as f64 / 128.0;
    let mut mean = |name: &str, got: f32, of: &mut dyn Iterator<Item = f64>, slack: f64| {
        let (sum, size) = of.fold((0.0, 0.0), |(sum, size), v| (sum + v, size + v.abs()));
        let bound = F32_ROUNDOFF * (terms + 4.0) * size / tokens as f64 + slack;
        let place = || format!("mean {name}");
        unused.add(f64::from(got), sum / tokens as f64, bound, place)
    };
    for e in 0..experts {
        let column = out.scores.iter().skip(e).step_by(experts);
        let name = format!("score of expert {e}");
        mean(
            &name,
            out.statistics[e],
            &mut column.map(|&s| f64::from(s)),
            0.0,
        )?;
    }
    let squares = out.log_sum_exp.iter().map(|&v| f64::from(v).powi(2));
    mean("lse²", out.statistics[2 * experts], &mut { squares }, 0.0)?;
    let entropies = out.scores.chunks(experts).map(|row| {
        if score != ROUTEGRAD_SCORE_SOFTMAX {
            return 0.0;
        }
        let terms = row.iter().map(|&p| f64::from(p));
        terms.filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum::<f64>()
    });
    // log S − Σ p (z − max z): both terms may be large even if the entropy is small.
    let slack = F32_ROUNDOFF * 64.0 * (experts as f64).ln().max(1.0);
    mean(
        "entropy",
        out.statistics[2 * experts + 1],
        &mut { entropies },
        slack,
    )
}

fn judge(batch: &Batch, bytes: &[Vec<u8>]) -> Result<Errors, String> {
    let Shape {
        tokens,
        experts,
        choices,
        kind,
        hidden,
        ..
    } = batch.shape;
    let out = Outputs {
        scores: values(&bytes[0]),
        log_sum_exp: values(&bytes[1]),
        choices: values(&bytes[2]),
        statistics: values(&bytes[4]),
    };
    let finite = |i: usize| (batch.logits[i].0 as f32).is_finite();
    let non_finite = |t: &usize| !(0..experts).all(|e| finite(t * experts + e));
    let flag = (0..tokens).find(non_finite).unwrap_or(i32::MAX as usize);
    exactly::<i32>("first_non_finite", &bytes[3], |_| flag as i32)?;
    if choices == 0 {
        if !bytes[2].iter().all(|&b| b == POISON) {
            return Err("choices were written with K = 0".into());
        }
    } else {
        for (t, got) in out.choices.chunks(choices).enumerate() {
            let scores = &out.scores[t * experts..][..experts];
            let want = chosen(scores, batch.bias.as_deref(), choices);
            if !got.iter().map(|&e| e as usize).eq(want.iter().copied()) {
                return Err(format!("token {t} chose {got:?} instead of {want:?}"));
            }
        }
    }
    judge_statistics(batch, &out)?;
    let mut errors = Errors::default();
    for t in (0..tokens).filter(|t| !non_finite(t)) {
        let scores = &out.scores[t * experts..][..experts];
        errors.merge(judge_token(batch, t, scores, out.log_sum_exp[t])?);
    }
    // Truncation at each step of 16 products; in addition, exp amplifies the error of a logit z by |z| roundings.
    let magnitude = if kind == Large || kind == OneExpert {
        200.0
    } else {
        1.0
    };
    let limit = 1e-6 * magnitude + 2.0 * F32_ROUNDOFF * hidden as f64 / 16.0;
    errors.at_most(limit)
}

/// Returns both launches of the forward. Outputs: scores, log_sum_exp, choices, first_non_finite, statistics.
///
/// # Errors
/// When the kernel does not support the sizes.
pub fn problem(shape: Shape) -> Result<Problem> {
    problem_of(Batch::new(shape))
}

/// As [`problem`], for a given batch.
///
/// # Errors
/// As [`problem`].
pub fn problem_of(batch: Batch) -> Result<Problem> {
    let Shape {
        tokens,
        experts,
        hidden,
        choices,
        score,
        ..
    } = batch.shape;
    let partials = partials(launchers::sim()?, tokens, experts)?;
    let mut buffers = vec![
        Buffer::output("scores", tokens * experts * 4),
        Buffer::output("log_sum_exp", tokens * 4),
        Buffer::output("choices", tokens * choices.max(1) * 4),
        Buffer::changed("first_non_finite", &[i32::MAX]),
        Buffer::output("statistics", (2 * experts + 2) * 4),
        Buffer::workspace("partials", partials * 4),
        Buffer::input("x", &batch.x),
        Buffer::input("w", &batch.w),
    ];
    buffers.extend(batch.bias.as_ref().map(|b| Buffer::input("bias", b)));
    let biased = batch.bias.is_some();
    Ok(Problem {
        label: batch.label(),
        buffers,
        launch: Box::new(move |p, stream| {
            bind!(p, RouterForward {
                scores, log_sum_exp, choices if choices > 0, partials, first_non_finite, x, w,
                selection_bias = "bias" if biased;
                tokens, experts, hidden, choices_per_token: choices, score,
            })
            .launch(stream)?;
            bind!(p, RouterStatistics { statistics, partials; tokens, experts }).launch(stream)
        }),
        judge: Box::new(move |out| judge(&batch, out)),
    })
}

/// Sums of random partial results, as many as a large batch has.
fn statistics(tokens: usize, experts: usize) -> Result<Problem> {
    let width = 2 * experts + 2;
    let mut random = Random((tokens + experts) as u64);
    let floats = partials(launchers::sim()?, tokens, experts)?;
    let partials = random.normals(floats);
    let buffers = vec![
        Buffer::output("statistics", width * 4),
        Buffer::input("partials", &partials),
    ];
    let partials = Arc::new(partials);
    Ok(Problem {
        label: format!("{tokens} tokens, {experts} experts"),
        buffers,
        launch: launch_of!(RouterStatistics { statistics, partials; tokens, experts }),
        judge: Box::new(move |out| {
            Errors::within("statistic", &values::<f32>(&out[0]), |column| {
                let terms = partials.iter().skip(column).step_by(width);
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), &v| {
                    (sum + f64::from(v), size + f64::from(v.abs()))
                });
                let count = (experts..2 * experts).contains(&column);
                let divisor = if count { 1.0 } else { tokens as f64 };
                let bound = F32_ROUNDOFF * (floats / width + 2) as f64 * size / divisor;
                (sum / divisor, bound)
            })
        }),
    })
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let shapes = [small_shapes(), covering_shapes()];
    let forward = Case::both("router_forward", "router", shapes, |all| each(all, problem));
    let sizes = [
        vec![(1, 1), (300, 20), (5000, 3)],
        vec![(100_000, 64), (9000, 256)],
    ];
    let sums = Case::both("router_statistics", "router", sizes, |sizes| {
        each(sizes, |(tokens, experts)| statistics(tokens, experts))
    });
    forward.into_iter().chain(sums).collect()
}
