//! One expert for each token, sampled among the likely ones, and its gate (SparseMixer).
//!
//! Of the experts that are not excluded, those with `(z* − z_i) / max(|z_i|, z*) ≤ 2ε` are *kept*, where z* is the
//! largest logit that is not excluded (0/0 is kept). `p` is the softmax over the kept experts, 0 elsewhere. The
//! sampled expert is `a = argmax z_i − ln ξ_i` over the kept experts, with ξ exponential: a draw from p (Gumbel). It
//! is *trusted* if it is the likeliest expert or if `u > threshold`, u uniform. The gate is `w_a = h p_a`, with h = 1
//! if a is trusted and less otherwise; the gates of the other experts are 0.
//!
//! Backward is an estimator: `dz_j = c dw_a p_a (1[j=a] − p_j)`, independent of h. Choice, mask and h are constants.
//! Sources: 2310.00811 (c = 2, threshold 1/2, h 1/2), 2409.12136 (c = 1, threshold 3/4, h 1/3), and the authors'
//! code.

use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu;
use crate::tensor::dtype::Real;
use crate::with_real;

/// One expert for each token, and the constants of its gate. No gradient flows to them.
#[derive(Clone, Debug)]
pub struct Choice {
    /// `[T]`, i32: the expert a.
    pub expert: Tensor,
    /// `[T]`: h.
    pub factor: Tensor,
    /// `[T, E]`, i32: 1 where the expert is kept, else 0.
    pub kept: Tensor,
}

/// How the expert is chosen among the kept ones.
#[derive(Clone, Copy)]
pub enum Draw<'a> {
    /// The likeliest expert, h = 1: evaluation.
    Likeliest,
    /// Sampled.
    Sampled {
        /// ξ of (token, expert).
        exponential: &'a (dyn Fn(usize, usize) -> f64 + Sync),
        /// u of a token.
        uniform: &'a (dyn Fn(usize) -> f64 + Sync),
        /// A sample that is not the likeliest expert is trusted, h = 1, if u exceeds this threshold.
        threshold: f64,
        /// h of a sample that is not trusted.
        untrusted: f64,
    },
}

/// Chooses an expert for each row of `z [T, E]`, but never the expert that `excluded [T]` names for the row.
///
/// # Errors
/// Returns an error when `z` is not real, or `excluded` does not fit it.
pub fn choose(
    z: &Tensor,
    excluded: Option<&Tensor>,
    epsilon: f64,
    draw: Draw<'_>,
) -> Result<Choice> {
    let (tokens, experts) = (z.shape().rows(), z.shape().width());
    if let Some(excluded) = excluded {
        excluded.expect_shape("sampled_gate", "excluded experts", [tokens])?;
    }
    let excluded = excluded.map(|e| e.slice::<i32>());
    with_real!(z.dtype(), "sampled_gate", |T| {
        let z = z.slice::<T>();
        let blocks = cpu::blocks(tokens, 256, |_, range| {
            let mut rows = Vec::with_capacity(range.len());
            for t in range {
                let row = &z[t * experts..(t + 1) * experts];
                let mut kept = vec![0; experts];
                let excluded = excluded.map(|e| e[t] as usize);
                let (expert, factor) =
                    reference::choose(&mut kept, t, row, excluded, epsilon, draw);
                rows.push((expert as i32, T::of(factor), kept));
            }
            rows
        });
        let rows: Vec<_> = blocks.into_iter().flatten().collect();
        let experts_chosen: Vec<i32> = rows.iter().map(|r| r.0).collect();
        let factors: Vec<T> = rows.iter().map(|r| r.1).collect();
        let kept: Vec<i32> = rows.into_iter().flat_map(|r| r.2).collect();
        Ok(Choice {
            expert: Tensor::from_slice([tokens], &experts_chosen),
            factor: Tensor::from_slice([tokens], &factors),
            kept: Tensor::from_slice([tokens, experts], &kept),
        })
    })
}

/// Returns the gates `[T, E]`, `h p_a` for the chosen expert and 0 for the others, from the logits `z [T, E]`;
/// `estimator` is the factor c of their gradient.
///
/// # Errors
/// Returns an error when the choice does not fit the logits.
pub fn sampled_gate(tape: &Tape, z: &Var, choice: &Choice, estimator: f64) -> Result<Var> {
    let shape = z.tensor().shape();
    choice
        .kept
        .expect_shape("sampled_gate", "kept experts", shape)?;
    choice
        .factor
        .expect_dtype("sampled_gate", "factors", z.tensor().dtype())?;
    tape.apply_one(
        SampledGate {
            choice: choice.clone(),
            estimator,
        },
        &[z],
    )
}

pub(crate) struct SampledGate {
    pub(crate) choice: Choice,
    pub(crate) estimator: f64,
}

impl Op for SampledGate {
    fn name(&self) -> &'static str {
        "sampled_gate"
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let z = inputs[0];
        let experts = z.shape().width();
        let mut p = z.unspecified_like();
        let mut w = Tensor::zeros(z.device(), z.dtype(), z.shape());
        with_real!(z.dtype(), "sampled_gate", |T| {
            let kept = self.choice.kept.slice::<i32>();
            reference::masked_softmax(p.slice_mut::<T>(), z.slice(), kept, experts);
            let (gates, p_all) = (w.slice_mut::<T>(), p.slice::<T>());
            let given = self.choice.expert.slice::<i32>().iter();
            for (t, (&a, &h)) in given.zip(self.choice.factor.slice::<T>()).enumerate() {
                let at = t * experts + a as usize;
                gates[at] = h * p_all[at];
            }
            Ok(Forward::one(w, vec![p]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (p, dw) = (&saved[0], only(douts));
        let mut dz = p.unspecified_like();
        let experts = p.shape().width();
        with_real!(p.dtype(), "sampled_gate", |T| {
            let chosen = self.choice.expert.slice::<i32>();
            let scale = T::of(self.estimator);
            reference::backward(
                dz.slice_mut::<T>(),
                dw.slice(),
                p.slice(),
                chosen,
                scale,
                experts,
            );
            grads.give(0, dz)
        })
    }
}

mod reference {
    use super::*;

    /// Marks the kept experts of one row; returns the chosen expert and its h. If no logit is finite, an expert is
    /// chosen all the same: the router flags such rows.
    pub fn choose<T: Real>(
        kept: &mut [i32],
        token: usize,
        z: &[T],
        excluded: Option<usize>,
        epsilon: f64,
        draw: Draw<'_>,
    ) -> (usize, f64) {
        let z = |i: usize| z[i].f64();
        let usable = || (0..kept.len()).filter(|&i| Some(i) != excluded);
        let likeliest = largest(usable(), z);
        let top = z(likeliest);
        // Not `<=`: 0/0 keeps the expert.
        let dropped = |i: usize| (top - z(i)) / z(i).abs().max(top) > 2.0 * epsilon;
        let keep: Vec<usize> = usable().filter(|&i| !dropped(i)).collect();
        for &i in &keep {
            kept[i] = 1;
        }
        match draw {
            Draw::Likeliest => (likeliest, 1.0),
            Draw::Sampled {
                exponential,
                uniform,
                threshold,
                untrusted,
            } => {
                let a = largest(keep.into_iter(), |i| z(i) - exponential(token, i).ln());
                let trusted = a == likeliest || uniform(token) > threshold;
                (a, if trusted { 1.0 } else { untrusted })
            }
        }
    }

    /// The first of `experts` with the largest score. NaN is treated as smaller than every number.
    fn largest(experts: impl Iterator<Item = usize>, score: impl Fn(usize) -> f64) -> usize {
        let mut best: Option<(usize, f64)> = None;
        for i in experts {
            let s = score(i);
            if best.is_none_or(|(_, b)| s > b || (b.is_nan() && !s.is_nan())) {
                best = Some((i, s));
            }
        }
        best.map_or(0, |(i, _)| i)
    }

    /// Softmax over the kept experts of each row, 0 elsewhere.
    pub fn masked_softmax<T: Real>(p: &mut [T], z: &[T], kept: &[i32], experts: usize) {
        let rows = p.chunks_mut(experts).zip(z.chunks(experts));
        for ((p, z), kept) in rows.zip(kept.chunks(experts)) {
            let live = || z.iter().zip(kept).filter(|(_, kept)| **kept != 0);
            let max = live().fold(T::neg_infinity(), |m, (&z, _)| m.max(z));
            let mut sum = T::zero();
            for ((p, &z), &kept) in p.iter_mut().zip(z).zip(kept) {
                *p = if kept != 0 {
                    (z - max).exp()
                } else {
                    T::zero()
                };
                sum += *p;
            }
            p.iter_mut().for_each(|p| *p /= sum);
        }
    }

    pub fn backward<T: Real>(
        dz: &mut [T],
        dw: &[T],
        p: &[T],
        chosen: &[i32],
        scale: T,
        experts: usize,
    ) {
        let rows = dz.chunks_mut(experts).zip(dw.chunks(experts));
        for (((dz, dw), p), &a) in rows.zip(p.chunks(experts)).zip(chosen) {
            let a = a as usize;
            let s = scale * dw[a] * p[a];
            for (dz, &p) in dz.iter_mut().zip(p) {
                *dz = -s * p;
            }
            dz[a] += s;
        }
    }
}

/// Gates with the factor c: the estimator's gradient is their derivative.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (t, e, c) in [(1, 1, 1.0), (1, 4, 2.0), (9, 5, 2.0), (130, 8, 1.0)] {
        let name = format!("sampled_gate [{t}, {e}] h = c = {c}");
        let case = Case::new(name, move |tape, v| {
            let chosen: Vec<i32> = (0..t).map(|t| (t * 7 % e) as i32).collect();
            let kept = (0..t * e).map(|i| {
                let (t, e) = (i / e, i % e);
                i32::from(e as i32 == chosen[t] || (t + e) % 3 != 0)
            });
            let dtype = v[0].tensor().dtype();
            let factor = with_real!(dtype, "sampled_gate", |T| {
                Ok(Tensor::from_slice([t], &vec![T::of(c); t]))
            })?;
            let choice = Choice {
                kept: Tensor::from_slice([t, e], &kept.collect::<Vec<i32>>()),
                expert: Tensor::from_slice([t], &chosen),
                factor,
            };
            Ok(vec![sampled_gate(tape, &v[0], &choice, c)?])
        });
        cases.push(case.input("z", [t, e]));
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(z: &[f64], excluded: Option<i32>) -> Vec<i32> {
        let excluded = excluded.map(|e| Tensor::from_slice([1], &[e]));
        let z = Tensor::from_slice([1, z.len()], z);
        let choice = choose(&z, excluded.as_ref(), 0.1, Draw::Likeliest).unwrap();
        choice.kept.slice::<i32>().to_vec()
    }

    #[test]
    fn the_mask_worked_by_hand() {
        // (2 − 1.7) / 2 = 0.15, (2 − 1.5) / 2 = 0.25.
        assert_eq!(kept(&[2.0, 1.7, 1.5, -0.2], None), [1, 1, 0, 0]);
        // 0.1 / 1.1 = 0.09, 0.3 / 1.3 = 0.23: the mask changes when all logits are shifted.
        assert_eq!(kept(&[-1.0, -1.1, -1.3, -2.0], None), [1, 1, 0, 0]);
        // If expert 0 is excluded, 1.5 is close enough to 1.7.
        assert_eq!(kept(&[2.0, 1.7, 1.5, -0.2], Some(0)), [0, 1, 1, 0]);
        // 0 / 0 is kept.
        assert_eq!(kept(&[0.0, 0.0, -1.0], None), [1, 1, 0]);
    }

    #[test]
    fn rows_that_are_not_finite_choose_an_expert_in_range_and_never_the_excluded_one() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let z = Tensor::from_slice([1, 3], &[bad; 3]);
            let excluded = Tensor::from_slice([1], &[0]);
            let draw = Draw::Sampled {
                exponential: &|_, _| 1.0,
                uniform: &|_| 0.0,
                threshold: 0.5,
                untrusted: 0.5,
            };
            let choice = choose(&z, Some(&excluded), 0.1, draw).unwrap();
            assert!([1, 2].contains(&choice.expert.slice::<i32>()[0]), "{bad}");
        }
    }

    #[test]
    fn sampled_experts_follow_the_masked_softmax() {
        let n = 40_000;
        let row = [0.4, 0.5, 0.45, -1.0];
        let z = Tensor::from_slice([n, 4], &row.repeat(n));
        let stream =
            crate::tensor::random::Stream::new(3, crate::tensor::random::Purpose::Check, 0, 0);
        let draw = Draw::Sampled {
            exponential: &|t, i| stream.exponential((t * 4 + i) as u64),
            uniform: &|_| 0.0,
            threshold: 0.5,
            untrusted: 0.5,
        };
        let choice = choose(&z, None, 0.1, draw).unwrap();
        let exponentials: Vec<f64> = row[..3].iter().map(|z: &f64| z.exp()).collect();
        for (i, e) in exponentials.iter().enumerate() {
            let p = e / exponentials.iter().sum::<f64>();
            let chosen = choice.expert.slice::<i32>();
            let share = chosen.iter().filter(|a| **a == i as i32).count() as f64 / n as f64;
            // The tolerance is five standard errors.
            let tolerance = 5.0 * (p * (1.0 - p) / n as f64).sqrt();
            assert!(
                (share - p).abs() <= tolerance,
                "expert {i}: {share}, not {p}"
            );
        }
    }
}
