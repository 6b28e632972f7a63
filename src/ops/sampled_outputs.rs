//! Outputs of the experts for a few tokens that did not choose them. Sampled default vectors are averages of these
//! outputs.
//!
//! Expert i gives each token t of a micro-batch (over all ranks) the weight `w_t = p_ti` (or 1) if t did not choose
//! expert i, else 0. n tokens are drawn in n strata of equal weight: sample k is the token at which the cumulative
//! sum of w passes `(k + u_k) / n · Σ w`, u_k uniform. A token of large weight may be drawn more than once. The
//! expected mean of the drawn outputs is `Σ w_t e_i(x_t) / Σ w_t` exactly. Weights are integers in units of 2^-32.
//! The sums, and therefore the drawn tokens, do not depend on how the tokens are distributed over the ranks. Nothing
//! here is differentiable.

use super::dispatch::{Dispatch, Selection};
use super::expert_mean::{ExpertSums, Weighting};
use super::experts::sums_of_rows;
use crate::device::Device;
use crate::dist::Collective;
use crate::error::Result;
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;
use crate::tensor::random::Stream;
use crate::with_real;
use std::ops::Range;
use std::rc::Rc;

/// Number of units of a probability of 1.
const UNIT: f64 = (1u64 << 32) as f64;
/// Number of bits used of a draw: with 2^16 samples and sums below 2^53 the product fits in 128 bits.
const DRAWN_BITS: u32 = 48;

/// How tokens are drawn for the experts of one layer.
pub struct Sampling<'a> {
    /// Random numbers of this layer and step.
    pub stream: Stream,
    /// Number of samples of each expert in an optimizer step, below 2^16.
    pub per_step: usize,
    /// The range of these samples that this micro-batch draws from its own tokens.
    pub samples: Range<usize>,
    /// Whether tokens are weighted by their probability; otherwise all weights are equal.
    pub weighted: bool,
    /// The ranks that share the micro-batch.
    pub dist: &'a dyn Collective,
}

impl Sampling<'_> {
    /// Returns the samples of micro-batch `index` of `count`: shares that differ by at most one sample.
    pub fn share(per_step: usize, index: usize, count: usize) -> Range<usize> {
        index * per_step / count..(index + 1) * per_step / count
    }
}

/// Drawn (token, expert) pairs of this rank, and how often each was drawn.
pub struct SampledRows {
    dispatch: Rc<Dispatch>,
    /// `[T, E]`.
    times: Tensor,
    /// `Σ w [E]` over all ranks.
    pub mass: Vec<f64>,
    /// The fraction of the step's samples that this micro-batch drew.
    pub share: f64,
}

/// Draws, for every expert, tokens that did not choose it, by their probabilities `p [T, E]`. Returns `None`, on all
/// ranks, if there is nothing to draw. On a device with kernels it waits for p.
///
/// # Errors
/// Returns an error when p does not fit the choice, or a rank has left.
pub fn sample(
    p: &Tensor,
    chosen: &Selection,
    sampling: &Sampling<'_>,
) -> Result<Option<SampledRows>> {
    let (tokens, experts) = (chosen.num_tokens(), chosen.num_experts());
    p.expect_shape("sampled_outputs", "probabilities", [tokens, experts])?;
    let weights = units(&p.on(Device::Cpu).to_f64()?, chosen, sampling.weighted);
    let mut own = vec![0.0; experts];
    for row in weights.chunks(experts) {
        // These are integers below 2^53, so the sum in f64 is exact.
        own.iter_mut()
            .zip(row)
            .for_each(|(sum, w)| *sum += *w as f64);
    }
    let all = sampling.dist.gather(&own)?;
    let before =
        |rank: usize, e: usize| -> u64 { (0..rank).map(|r| all[r * experts + e] as u64).sum() };
    let total = |e: usize| before(sampling.dist.size(), e);
    if sampling.samples.is_empty() || (0..experts).all(|e| total(e) == 0) {
        return Ok(None);
    }
    let mut times = vec![0u32; tokens * experts];
    for e in (0..experts).filter(|e| total(*e) > 0) {
        let mut targets = targets(sampling, e, total(e)).into_iter().peekable();
        let mut sum = before(sampling.dist.rank(), e);
        while targets.next_if(|t| *t < sum).is_some() {}
        for token in 0..tokens {
            sum += weights[token * experts + e];
            while targets.next_if(|t| *t < sum).is_some() {
                times[token * experts + e] += 1;
            }
        }
    }
    let drawn = Selection::new(tokens, experts, |token, list| {
        let row = (0..).zip(&times[token * experts..(token + 1) * experts]);
        list.extend(row.filter(|(_, n)| **n > 0).map(|(e, _)| e));
    })?;
    let mut counts = Tensor::unspecified(Device::Cpu, p.dtype(), [tokens, experts]);
    with_real!(p.dtype(), "sampled_outputs", |T| {
        let to = counts.slice_mut::<T>().iter_mut().zip(&times);
        to.for_each(|(to, n)| *to = T::of(f64::from(*n)));
        Ok::<(), crate::error::Error>(())
    })?;
    Ok(Some(SampledRows {
        dispatch: Rc::new(Dispatch::new(drawn)),
        times: counts.on(p.device()),
        mass: (0..experts).map(|e| total(e) as f64 / UNIT).collect(),
        share: sampling.samples.len() as f64 / sampling.per_step as f64,
    }))
}

/// The integer weights: 0 for experts that the token chose.
fn units(p: &[f64], chosen: &Selection, weighted: bool) -> Vec<u64> {
    let experts = chosen.num_experts();
    let of = |p: f64| match weighted {
        true => (p * UNIT).round() as u64,
        false => UNIT as u64,
    };
    let mut weights: Vec<u64> = p.iter().map(|p| of(*p)).collect();
    for (token, row) in weights.chunks_mut(experts).enumerate() {
        for &e in chosen.experts(token) {
            row[e as usize] = 0;
        }
    }
    weights
}

/// Positions in the cumulative sum, ascending, one for each stratum of this micro-batch; all below `total`.
fn targets(sampling: &Sampling<'_>, expert: usize, total: u64) -> Vec<u64> {
    let Range { start, end } = sampling.samples;
    let place = |k: usize| {
        let [low, high, ..] = sampling
            .stream
            .bits((expert * sampling.per_step + k) as u64);
        let drawn = (u64::from(high) << 32 | u64::from(low)) >> (64 - DRAWN_BITS);
        let within = (((k - start) as u128) << DRAWN_BITS) | u128::from(drawn);
        ((within * u128::from(total)) / (((end - start) as u128) << DRAWN_BITS)) as u64
    };
    sampling.samples.clone().map(place).collect()
}

impl SampledRows {
    /// Returns how often each (token, expert) pair was drawn, `[T, E]`.
    pub fn times(&self) -> &Tensor {
        &self.times
    }

    /// Returns the sums of the experts' outputs over the drawn pairs of this rank, each counted as often as it was
    /// drawn, and the numbers of draws. Their quotient, summed over all ranks first, is the mean. No gradient flows
    /// through the sums.
    ///
    /// # Errors
    /// Returns an error when the shapes do not fit each other.
    pub fn sums(&self, x: &Tensor, gate_up: &Tensor, down: &Tensor) -> Result<ExpertSums> {
        let weighting = Weighting::BySumOfProbabilities;
        sums_of_rows([x, &self.times, gate_up, down], &self.dispatch, weighting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::SingleRank;
    use crate::tensor::random::Purpose;

    fn sampling(step: u64, per_step: usize) -> Sampling<'static> {
        Sampling {
            stream: Stream::new(7, Purpose::DefaultSamples, step, 1),
            per_step,
            samples: 0..per_step,
            weighted: true,
            dist: &SingleRank,
        }
    }

    fn times(found: &SampledRows) -> Vec<f64> {
        found.times().to_f64().unwrap()
    }

    /// Three tokens, three experts, K = 1: tokens 0 and 2 chose expert 0, token 1 expert 2.
    fn worked() -> (Tensor, Selection) {
        let p = [0.5, 0.25, 0.25, 0.125, 0.375, 0.5, 0.75, 0.125, 0.125];
        (
            Tensor::from_slice([3, 3], &p),
            Selection::from_choices(&[0, 2, 0], 3, 3).unwrap(),
        )
    }

    #[test]
    fn strata_worked_by_hand() {
        let (p, chosen) = worked();
        let (plan, n) = (sampling(0, 4), 4);
        let found = sample(&p, &chosen, &plan).unwrap().unwrap();
        // Tokens that did not choose the expert: expert 0 has only token 1; expert 1 tokens 0, 1, 2 with 2 : 3 : 1;
        // expert 2 tokens 0, 2 with 2 : 1.
        assert_eq!(found.mass, [0.125, 0.75, 0.375]);
        let bounds = [
            vec![0.0, 1.0],
            vec![2.0 / 6.0, 5.0 / 6.0, 1.0],
            vec![2.0 / 3.0, 2.0 / 3.0, 1.0],
        ];
        let mut expected = [[0.0; 3]; 3];
        for (e, bounds) in bounds.iter().enumerate() {
            for k in 0..n {
                let bits = plan.stream.bits((e * n + k) as u64);
                let u = (u64::from(bits[1]) << 32 | u64::from(bits[0])) as f64 / 2f64.powi(64);
                let place = (k as f64 + u) / n as f64;
                expected[bounds.iter().filter(|b| place >= **b).count()][e] += 1.0;
            }
        }
        assert_eq!(times(&found), expected.concat());
        // A token that chose an expert is never drawn for that expert.
        assert_eq!(times(&found)[0] + times(&found)[6] + times(&found)[5], 0.0);
    }

    #[test]
    fn over_many_draws_a_token_is_drawn_by_its_share_of_the_weight() {
        let (p, chosen) = worked();
        const DRAWS: u64 = 4000;
        for (weighted, shares) in [
            (
                true,
                [
                    0.0,
                    2.0 / 6.0,
                    2.0 / 3.0,
                    1.0,
                    3.0 / 6.0,
                    0.0,
                    0.0,
                    1.0 / 6.0,
                    1.0 / 3.0,
                ],
            ),
            (
                false,
                [
                    0.0,
                    1.0 / 3.0,
                    0.5,
                    1.0,
                    1.0 / 3.0,
                    0.0,
                    0.0,
                    1.0 / 3.0,
                    0.5,
                ],
            ),
        ] {
            let mut sums = [0.0; 9];
            for step in 0..DRAWS {
                let plan = Sampling {
                    weighted,
                    ..sampling(step, 5)
                };
                let found = sample(&p, &chosen, &plan).unwrap().unwrap();
                sums.iter_mut()
                    .zip(times(&found))
                    .for_each(|(s, n)| *s += n);
            }
            for (sum, share) in sums.iter().zip(shares) {
                let found = sum / (5 * DRAWS) as f64;
                // The tolerance is five standard errors of independent draws; stratified draws have a smaller error.
                let error = 5.0 * (share * (1.0 - share) / (5 * DRAWS) as f64).sqrt();
                assert!(
                    (found - share).abs() <= error + 1e-12,
                    "{found} for {share}"
                );
            }
        }
    }

    #[test]
    fn an_expert_that_every_token_chose_is_left_out_and_nothing_to_draw_is_none() {
        let p = Tensor::from_slice([2, 2], &[0.75f32, 0.25, 0.5, 0.5]);
        let all = Selection::from_choices(&[0, 0], 2, 2).unwrap();
        let found = sample(&p, &all, &sampling(0, 3)).unwrap().unwrap();
        assert_eq!(times(&found)[0] + times(&found)[2], 0.0);
        assert_eq!(times(&found)[1] + times(&found)[3], 3.0);
        let every = Selection::all(2, 2);
        assert!(sample(&p, &every, &sampling(0, 3)).unwrap().is_none());
        let none = Sampling {
            samples: 1..1,
            ..sampling(0, 3)
        };
        assert!(sample(&p, &all, &none).unwrap().is_none());
    }

    #[test]
    fn micro_batches_share_the_samples_of_a_step() {
        for (per_step, count) in [(16, 1), (16, 3), (16, 5), (2, 7)] {
            let shares: Vec<_> = (0..count)
                .map(|m| Sampling::share(per_step, m, count))
                .collect();
            let all: Vec<usize> = shares.into_iter().flatten().collect();
            assert_eq!(all, (0..per_step).collect::<Vec<_>>());
        }
    }
}
