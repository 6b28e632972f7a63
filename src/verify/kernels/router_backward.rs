//! Checks the router's backward (`kernels/router_backward.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random, half_ulp_bf16};
use super::router::{SCORES, log_sum_exp};
use super::{Buffer, Case, Problem, bind, each, values};
use crate::error::Result;
use crate::kernels::bindings::*;
use crate::kernels::launchers;
use crate::kernels::router_backward::{RouterBackward, RouterWeightGradient, workspace};
use half::bf16;
use rayon::prelude::*;

/// Sizes and settings of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of tokens T.
    pub tokens: usize,
    /// Number of experts E.
    pub experts: usize,
    /// Width D of a row of x.
    pub hidden: usize,
    /// The score function.
    pub score: routegrad_score,
    /// Whether dx and dW are accumulated.
    pub accumulate: bool,
    /// Which of dscores, dmean and dlse2 are given.
    pub given: [bool; 3],
}

/// Inputs and the expected results.
struct Batch {
    shape: Shape,
    scores: Vec<f32>,
    log_sum_exp: Vec<f32>,
    dscores: Option<Vec<f32>>,
    dmean: Option<Vec<f32>>,
    dlse2: Option<f32>,
    x: Vec<bf16>,
    w: Vec<f32>,
    dx_before: Option<Vec<bf16>>,
    dw_before: Option<Vec<f32>>,
    /// dz in float64, and the bound of its error.
    dz: Vec<(f64, f64)>,
}

impl Batch {
    fn new(shape: Shape) -> Self {
        let Shape {
            tokens,
            experts,
            hidden,
            score,
            accumulate,
            given,
        } = shape;
        let mut random = Random((tokens * 37 + experts * 11 + hidden) as u64);
        let logits: Vec<f64> = (0..tokens * experts)
            .map(|_| f64::from(random.normal()) * 2.0)
            .collect();
        let rows = logits.chunks(experts);
        let log_sum_exp: Vec<f32> = rows
            .map(|row| log_sum_exp(row.iter().copied()) as f32)
            .collect();
        let score_of = |i: usize| match score {
            ROUTEGRAD_SCORE_SOFTMAX => (logits[i] - f64::from(log_sum_exp[i / experts])).exp(),
            ROUTEGRAD_SCORE_SIGMOID => 1.0 / (1.0 + (-logits[i]).exp()),
            ROUTEGRAD_SCORE_RELU => logits[i].max(0.0),
            _ => logits[i],
        };
        let mut batch = Self {
            shape,
            scores: (0..tokens * experts).map(|i| score_of(i) as f32).collect(),
            log_sum_exp,
            dscores: given[0].then(|| random.normals(tokens * experts)),
            // The gradient of a mean is divided by T for each token; it is scaled to the magnitude of the other gradients.
            dmean: given[1].then(|| {
                random
                    .normals(experts)
                    .iter()
                    .map(|v| v * tokens as f32)
                    .collect()
            }),
            dlse2: given[2].then_some(0.3 * tokens as f32),
            w: random.normals(experts * hidden),
            dw_before: accumulate.then(|| random.normals(experts * hidden)),
            x: random.normals_bf16(tokens * hidden),
            dx_before: accumulate.then(|| random.normals_bf16(tokens * hidden)),
            dz: Vec::new(),
        };
        batch.dz = (0..tokens).flat_map(|t| batch.dz_of(t)).collect();
        batch
    }

    /// Returns dz of a token and its error bounds.
    fn dz_of(&self, token: usize) -> Vec<(f64, f64)> {
        let Shape {
            tokens,
            experts,
            score,
            ..
        } = self.shape;
        let row = token * experts..(token + 1) * experts;
        let p: Vec<f64> = self.scores[row.clone()].iter().map(|&p| p.into()).collect();
        // d and the sum of the magnitudes of its terms.
        let d: Vec<(f64, f64)> = row
            .enumerate()
            .map(|(e, i)| {
                let own = self.dscores.as_ref().map_or(0.0, |d| f64::from(d[i]));
                let mean = self.dmean.as_ref().map_or(0.0, |d| f64::from(d[e]));
                let mean = mean / tokens as f64;
                (own + mean, own.abs() + mean.abs())
            })
            .collect();
        let lse = f64::from(self.log_sum_exp[token]);
        let square = self.dlse2.map_or(0.0, f64::from) * 2.0 / tokens as f64 * lse;
        let dot: f64 = p.iter().zip(&d).map(|(p, d)| p * d.0).sum();
        let dot_size: f64 = p.iter().zip(&d).map(|(p, d)| p * d.1).sum();
        let roundings = |count: f64, size: f64| F32_ROUNDOFF * count * size;
        let sum = experts as f64 / 4.0 + 8.0;
        p.iter()
            .zip(&d)
            .map(|(&p, &(d, size))| match score {
                ROUTEGRAD_SCORE_SOFTMAX => {
                    let size = size + dot_size + square.abs();
                    (p * (d - dot + square), roundings(sum, p * size))
                }
                ROUTEGRAD_SCORE_SIGMOID => (p * (1.0 - p) * d, roundings(8.0, p * size)),
                ROUTEGRAD_SCORE_RELU => (if p > 0.0 { d } else { 0.0 }, roundings(4.0, size)),
                _ => {
                    let part = square * (p - lse).exp();
                    let exponent = 8.0 + 2.0 * (p.abs() + lse.abs());
                    let bound = roundings(4.0, size) + roundings(exponent, part.abs());
                    (d + part, bound)
                }
            })
            .collect()
    }

    fn judge_dz(&self, got: &[f32]) -> Result<Errors, String> {
        Errors::within("dz", got, |i| self.dz[i])
    }

    /// Checks Σ_e dz W, computed with two terms of each factor and without the product of the two smaller terms.
    fn judge_dx(&self, got: &[bf16]) -> Result<Errors, String> {
        let Shape {
            experts, hidden, ..
        } = self.shape;
        Errors::of_parts(got.par_chunks(hidden).enumerate().map(|(t, got)| {
            let got: Vec<f64> = got.iter().map(|got| got.to_f64()).collect();
            let dz = &self.dz[t * experts..][..experts];
            Errors::within(&format!("dx of token {t}, column"), &got, |d| {
                let (mut want, mut size, mut bound) = (0.0, 0.0, 0.0);
                for (e, &(dz, off)) in dz.iter().enumerate() {
                    let w = f64::from(self.w[e * hidden + d]);
                    want += dz * w;
                    size += (dz * w).abs();
                    bound += off * w.abs();
                }
                let before = self.dx_before.as_ref();
                let before = before.map_or(0.0, |b| b[t * hidden + d].to_f64());
                want += before;
                bound += size * (3.0 / f64::from(1 << 18) + F32_ROUNDOFF * experts as f64);
                bound += F32_ROUNDOFF * 2.0 * (before.abs() + want.abs());
                (want, bound + half_ulp_bf16(want.abs() + bound))
            })
        }))
    }

    fn judge_dw(&self, got: &[f32]) -> Result<Errors, String> {
        let Shape {
            tokens,
            experts,
            hidden,
            ..
        } = self.shape;
        Errors::of_parts(got.par_chunks(hidden).enumerate().map(|(e, got)| {
            let mut sums = vec![(0.0, 0.0); hidden];
            for t in 0..tokens {
                let (dz, off) = self.dz[t * experts + e];
                for (d, (sum, bound)) in sums.iter_mut().enumerate() {
                    let x = self.x[t * hidden + d].to_f64();
                    *sum += dz * x;
                    *bound += (off + dz.abs() * F32_ROUNDOFF * (tokens as f64 + 8.0)) * x.abs();
                }
            }
            Errors::within(&format!("dW of expert {e}, column"), got, |d| {
                let (sum, bound) = sums[d];
                let before = self.dw_before.as_ref();
                let before = before.map_or(0.0, |b| f64::from(b[e * hidden + d]));
                let runs = F32_ROUNDOFF * 256.0 * before.abs();
                (sum + before, bound + runs)
            })
        }))
    }

    fn judge(&self, bytes: &[Vec<u8>]) -> Result<Errors, String> {
        let exact = 1e-6 + 2.0 * F32_ROUNDOFF * self.shape.tokens as f64 / 16.0;
        let mut all = Errors::default();
        let dx = self.judge_dx(&values(&bytes[0]))?;
        // The root mean square error of rounding to 8 bits is 1.6e-3 of the value; for a few values it may reach the
        // maximum, 2^-8.
        let rounding = if dx.values < 1000 { 4e-3 } else { 2e-3 };
        for (name, errors, limit) in [
            ("dz", self.judge_dz(&values(&bytes[1]))?, 1e-6),
            ("dx", dx, rounding),
            ("dW", self.judge_dw(&values(&bytes[2]))?, exact),
        ] {
            let errors = errors.at_most(limit);
            all.merge(errors.map_err(|why| format!("{name}: {why}"))?);
        }
        Ok(all)
    }
}

/// Returns both launches of the backward. Outputs: dx, dz, dW.
///
/// # Errors
/// When the kernel does not support the sizes.
pub fn problem(shape: Shape) -> Result<Problem> {
    let batch = Batch::new(shape);
    let Shape {
        tokens,
        experts,
        hidden,
        score,
        accumulate,
        given,
    } = shape;
    let floats = workspace(launchers::sim()?, tokens, experts, hidden)?;
    let none = [0.0f32; 4];
    let dx = match &batch.dx_before {
        Some(before) => Buffer::changed("dx", before),
        None => Buffer::output("dx", tokens * hidden * 2),
    };
    let dw = match &batch.dw_before {
        Some(before) => Buffer::changed("dw", before),
        None => Buffer::output("dw", experts * hidden * 4),
    };
    let buffers = vec![
        dx,
        Buffer::output("dz", tokens * experts * 4),
        dw,
        Buffer::workspace("dw_partials", floats * 4),
        Buffer::input("scores", &batch.scores),
        Buffer::input("log_sum_exp", &batch.log_sum_exp),
        Buffer::input("dscores", batch.dscores.as_deref().unwrap_or(&none)),
        Buffer::input("dmean", batch.dmean.as_deref().unwrap_or(&none)),
        Buffer::input("dlse2", &[batch.dlse2.unwrap_or(0.0)]),
        Buffer::input("x", &batch.x),
        Buffer::input("w", &batch.w),
    ];
    Ok(Problem {
        label: format!("{shape:?}"),
        buffers,
        launch: Box::new(move |p, stream| {
            bind!(p, RouterBackward {
                dx, dz, dw_partials, scores, log_sum_exp, dscores if given[0],
                dmean if given[1], dlse2 if given[2], x, w;
                tokens, experts, hidden, score, accumulate,
            })
            .launch(stream)?;
            bind!(p, RouterWeightGradient {
                dw, dw_partials;
                tokens, experts, hidden, accumulate,
            })
            .launch(stream)
        }),
        judge: Box::new(move |out| batch.judge(out)),
    })
}

/// Returns all parts of the gradient that exist for the score.
fn all_given(score: routegrad_score) -> [bool; 3] {
    let squares = score == ROUTEGRAD_SCORE_SOFTMAX || score == ROUTEGRAD_SCORE_LOGITS;
    [true, true, squares]
}

fn shape(
    (tokens, experts, hidden): (usize, usize, usize),
    score: routegrad_score,
    accumulate: bool,
    given: [bool; 3],
) -> Shape {
    Shape {
        tokens,
        experts,
        hidden,
        score,
        accumulate,
        given,
    }
}

/// Shapes that every build runs under every schedule.
pub fn small_shapes() -> Vec<Shape> {
    let softmax = ROUTEGRAD_SCORE_SOFTMAX;
    let mut all = vec![
        shape((1, 1, 8), softmax, false, [true; 3]),
        shape((1, 8, 200), softmax, true, [true, false, false]),
        shape((331, 7, 136), softmax, false, [false, true, true]),
    ];
    let score = |(i, score)| shape((67, 33, 328), score, i % 2 == 0, all_given(score));
    all.extend(SCORES.into_iter().enumerate().map(score));
    all
}

/// Every padded number of experts with every score, assigned and accumulated; prime numbers of tokens.
pub fn covering_shapes() -> Vec<Shape> {
    let sizes = [
        (2039, 8, 72),
        (509, 16, 1032),
        (1021, 32, 136),
        (300, 64, 264),
        (257, 128, 72),
        (130, 256, 200),
    ];
    let mut all = Vec::new();
    for (i, sizes) in sizes.into_iter().enumerate() {
        for (j, score) in SCORES.into_iter().enumerate() {
            all.push(shape(sizes, score, (i + j) % 2 == 0, all_given(score)));
        }
    }
    for given in [[true, false, false], [false, false, true], [false; 3]] {
        all.push(shape((70, 48, 72), ROUTEGRAD_SCORE_SOFTMAX, true, given));
        all.push(shape((70, 255, 72), ROUTEGRAD_SCORE_LOGITS, false, given));
    }
    all
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let shapes = [small_shapes(), covering_shapes()];
    Case::both("router_backward", "router_backward", shapes, |all| {
        each(all, problem)
    })
}
