//! The best substitutes for the output of an expert that did not run, fitted on text on which every expert ran: the
//! mean of its outputs over the tokens that did not choose it, and a linear function of a token's hidden state. A
//! router cannot know them without running every expert. They show how good default vectors, or any linear function of
//! x, can be at best.
//!
//! The weights are `w_t = p_ti` for the tokens t that did not choose i, and 0 for the others. `ν_i = Σ w_t e_i(x_t) / Σ
//! w_t`, and `x̄` is the mean of `x_t` with the same weights. `B_i` minimises `Σ w_t ‖e_i(x_t) − ν_i − Bᵀ (x_t − x̄)‖²
//! + λ ‖B‖²`, where λ is [`RIDGE`] times the mean eigenvalue of `Σ w_t (x_t − x̄)(x_t − x̄)ᵀ`.

use super::probe::Seen;
use crate::dist::SingleRank;
use crate::error::Result;
use crate::ops::dispatch::{Dispatch, Selection};
use crate::ops::expert_rows::expert_rows;
use crate::ops::router::{logits, softmax};
use crate::ops::sampled_outputs::{Sampling, sample};
use crate::routers::default::DefaultMoe;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::cpu::{Accumulate, Mat, matmul};
use crate::tensor::random::{Purpose, Stream};
use std::rc::Rc;

/// Ridge factor: the number that is added to the diagonal, divided by the mean eigenvalue. It is large because there
/// are few tokens for D inputs.
pub const RIDGE: f64 = 0.3;

/// Number of draws for sampled default vectors. After them the initial zeros have a weight of 0.9^64 = 0.1%.
pub const DRAWS: u64 = 64;

/// The weights of one MoE layer.
#[derive(Clone, Copy)]
pub struct LayerWeights<'a> {
    /// Weight of the router `[E, D]`.
    pub gate: &'a Tensor,
    /// Gate and up projections of the experts `[E, 2F, D]`.
    pub gate_up: &'a Tensor,
    /// Down projections of the experts `[E, D, F]`.
    pub down: &'a Tensor,
}

impl LayerWeights<'_> {
    /// Returns the router's logits `[T, E]` for `x [T, D]`, with the operation of training.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let [x, gate] = [x, self.gate].map(|t| Var::constant(t.clone()));
        let z = logits(&Tape::without_gradients(), &x, &gate)?;
        Ok(z.tensor().clone())
    }

    /// Returns `softmax(z) [T, E]`.
    pub fn probabilities(&self, z: &Tensor) -> Result<Tensor> {
        let p = softmax(&Tape::without_gradients(), &Var::constant(z.clone()))?;
        Ok(p.tensor().clone())
    }

    /// Returns the outputs `e_i(x_t) [T, D]` of one expert for every token, with the operations of training.
    pub fn outputs(&self, x: &Tensor, expert: usize) -> Result<Vec<f64>> {
        let experts = self.gate.shape()[0];
        let all = Selection::new(x.shape().rows(), experts, |_, chosen| {
            chosen.push(expert as i32);
        })?;
        let (tape, all) = (Tape::without_gradients(), Rc::new(Dispatch::new(all)));
        let [x, gate_up, down] = [x, self.gate_up, self.down].map(|t| Var::constant(t.clone()));
        let e = expert_rows(&tape, [&x, &gate_up, &down], &all)?;
        e.tensor().to_f64()
    }
}

/// The substitutes of all experts of a layer.
pub struct Substitutes {
    /// `Σ_t w_t [E]`: 0 for an expert that every token chose, whose mean is then 0.
    pub mass: Vec<f64>,
    /// ν `[E, D]`.
    pub mean: Vec<f64>,
    /// Sampled default vectors `[E, D]` with unchanged weights: the moving average, with β = 0.9 from zero, of
    /// [`DRAWS`] draws of 16 tokens per expert.
    pub sampled: Vec<f64>,
    linear: Vec<Linear>,
}

/// `x ↦ ν + Bᵀ (x − x̄)`.
struct Linear {
    center: Vec<f64>,
    /// B `[D, D]`: inputs by outputs.
    map: Vec<f64>,
}

impl Substitutes {
    /// Fits the substitutes to the inputs and choices of a layer.
    ///
    /// # Errors
    /// Returns an error when the shapes of the weights do not match the inputs.
    pub fn fit(weights: LayerWeights<'_>, seen: &Seen) -> Result<Self> {
        let (experts, width) = (weights.gate.shape()[0], seen.x.shape().width());
        let p = weights.probabilities(&weights.logits(&seen.x)?)?;
        let draws = draws(&p, &seen.chosen)?;
        let p = p.to_f64()?;
        let x = seen.x.to_f64()?;
        let mut found = Substitutes {
            mass: Vec::new(),
            mean: Vec::new(),
            sampled: Vec::new(),
            linear: Vec::new(),
        };
        for expert in 0..experts {
            let weight = |t: usize| match seen.chosen.experts(t).contains(&(expert as i32)) {
                true => 0.0,
                false => p[t * experts + expert],
            };
            let w: Vec<f64> = (0..seen.chosen.num_tokens()).map(weight).collect();
            let outputs = weights.outputs(&seen.x, expert)?;
            let (mass, mean) = weighted_mean(&outputs, &w, width);
            let center = weighted_mean(&x, &w, width).1;
            let [from, to] = [(&x, &center), (&outputs, &mean)].map(|(rows, mean)| {
                let rows = rows.chunks(width).zip(&w);
                let scaled = rows.flat_map(|(row, w)| {
                    let values = row.iter().zip(mean);
                    values.map(move |(v, m)| w.sqrt() * (v - m))
                });
                scaled.collect::<Vec<f64>>()
            });
            let map = ridge(&from, &to, width);
            found.mass.push(mass);
            found.mean.extend(mean);
            found
                .sampled
                .extend(moving_average(&draws, &outputs, expert, experts));
            found.linear.push(Linear { center, map });
        }
        Ok(found)
    }

    /// Returns `⟨g_t, ν + Bᵀ (x_t − x̄)⟩` of every token for one expert, given `x, g [T, D]`.
    pub fn linear_dots(&self, expert: usize, x: &[f64], g: &[f64]) -> Vec<f64> {
        let Linear { center, map } = &self.linear[expert];
        let width = center.len();
        let mean = &self.mean[expert * width..(expert + 1) * width];
        let centred: Vec<f64> = x
            .chunks(width)
            .flat_map(|row| row.iter().zip(center).map(|(x, c)| x - c))
            .collect();
        let mut values = vec![0.0; x.len()];
        let (rows, map) = (
            Mat::new(&centred, x.len() / width, width),
            Mat::new(map, width, width),
        );
        matmul(&mut values, Accumulate::Assign, rows, map);
        let rows = values.chunks(width).zip(g.chunks(width));
        rows.map(|(v, g)| {
            v.iter()
                .zip(mean)
                .zip(g)
                .map(|((v, m), g)| (v + m) * g)
                .sum()
        })
        .collect()
    }
}

/// Returns how often each of [`DRAWS`] draws took each (token, expert) pair. The draws are those of `default`.
fn draws(p: &Tensor, chosen: &Selection) -> Result<Vec<Vec<f64>>> {
    let router = DefaultMoe::default();
    let draw = |step: u64| {
        let sampling = Sampling {
            stream: Stream::new(0, Purpose::Check, step, 0),
            per_step: router.samples,
            samples: 0..router.samples,
            weighted: true,
            dist: &SingleRank,
        };
        let drawn = sample(p, chosen, &sampling)?;
        drawn.map_or(Ok(vec![0.0; p.elements()]), |d| d.times().to_f64())
    };
    (0..DRAWS).map(draw).collect()
}

/// Returns ê of one expert after all draws, given its outputs `[T, D]`.
fn moving_average(draws: &[Vec<f64>], outputs: &[f64], expert: usize, experts: usize) -> Vec<f64> {
    let beta = DefaultMoe::default().beta;
    let width = experts * outputs.len() / draws.first().map_or(1, Vec::len).max(1);
    let mut average = vec![0.0; width];
    for times in draws {
        let own: Vec<f64> = times.chunks(experts).map(|row| row[expert]).collect();
        let (count, mean) = weighted_mean(outputs, &own, width);
        for (a, m) in average.iter_mut().zip(mean).filter(|_| count > 0.0) {
            *a = beta * *a + (1.0 - beta) * m;
        }
    }
    average
}

/// Returns `Σ w` and `Σ w row / Σ w` of rows `[T, width]`; zeros if the weights sum to 0.
fn weighted_mean(rows: &[f64], w: &[f64], width: usize) -> (f64, Vec<f64>) {
    let mass: f64 = w.iter().sum();
    let mut mean = vec![0.0; width];
    for (row, w) in rows.chunks(width).zip(w).filter(|_| mass > 0.0) {
        for (m, v) in mean.iter_mut().zip(row) {
            *m += w / mass * v;
        }
    }
    (mass, mean)
}

/// Returns B `[D, D]` that minimises `‖to − from B‖² + λ ‖B‖²`, with the normal equations and a Cholesky factorization;
/// `from, to [T, D]`.
fn ridge(from: &[f64], to: &[f64], width: usize) -> Vec<f64> {
    let rows = from.len() / width;
    let (from, to) = (Mat::new(from, rows, width), Mat::new(to, rows, width));
    let [mut square, mut b] = [vec![0.0; width * width], vec![0.0; width * width]];
    matmul(&mut square, Accumulate::Assign, from.t(), from);
    matmul(&mut b, Accumulate::Assign, from.t(), to);
    let trace: f64 = (0..width).map(|i| square[i * width + i]).sum();
    if trace <= 0.0 {
        return vec![0.0; width * width];
    }
    for i in 0..width {
        square[i * width + i] += RIDGE * trace / width as f64;
    }
    cholesky(&mut square, width);
    solve(&square, &mut b, width);
    b
}

/// Replaces a positive definite matrix `L Lᵀ` by its lower Cholesky factor L.
fn cholesky(a: &mut [f64], n: usize) {
    for j in 0..n {
        for i in j..n {
            let (row_i, row_j) = (&a[i * n..i * n + j], &a[j * n..j * n + j]);
            let dot: f64 = row_i.iter().zip(row_j).map(|(x, y)| x * y).sum();
            let rest = a[i * n + j] - dot;
            a[i * n + j] = match i == j {
                true => rest.sqrt(),
                false => rest / a[j * n + j],
            };
        }
    }
}

/// Solves `L Lᵀ X = B`, and replaces B `[n, n]` by X.
fn solve(l: &[f64], b: &mut [f64], n: usize) {
    let mut eliminate =
        |row: usize, others: std::ops::Range<usize>, factor: &dyn Fn(usize) -> f64| {
            for other in others {
                let f = factor(other);
                for c in 0..n {
                    b[row * n + c] -= f * b[other * n + c];
                }
            }
            for c in 0..n {
                b[row * n + c] /= l[row * n + row];
            }
        };
    for i in 0..n {
        eliminate(i, 0..i, &|k| l[i * n + k]);
    }
    for i in (0..n).rev() {
        eliminate(i, i + 1..n, &|k| l[k * n + i]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::check::normal_numbers;

    #[test]
    fn the_ridge_solves_its_normal_equations() {
        let (rows, width) = (9, 4);
        let (from, to) = (
            normal_numbers(rows * width, 1),
            normal_numbers(rows * width, 2),
        );
        let b = ridge(&from, &to, width);
        let inner = |a: &[f64], i: usize, c: &[f64], j: usize| -> f64 {
            (0..rows).map(|t| a[t * width + i] * c[t * width + j]).sum()
        };
        let lambda =
            RIDGE * (0..width).map(|i| inner(&from, i, &from, i)).sum::<f64>() / width as f64;
        for i in 0..width {
            for j in 0..width {
                let product: f64 = (0..width)
                    .map(|k| inner(&from, i, &from, k) * b[k * width + j])
                    .sum();
                let left = product + lambda * b[i * width + j];
                assert!((left - inner(&from, i, &to, j)).abs() <= 1e-12, "{i} {j}");
            }
        }
        assert_eq!(ridge(&[0.0; 8], &[1.0; 8], 4), [0.0; 16]);
    }
}
