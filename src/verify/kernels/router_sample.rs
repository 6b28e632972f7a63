//! Checks SparseMixer's sampling (`kernels/router_sample.cu`) against the same arithmetic in f64 with the random numbers
//! of [`crate::tensor::random`]: every choice, factor and mask must be equal.

use super::numbers::{Errors, Random};
use super::{Buffer, Case, Problem, each, exactly, launch_of, pairs};
use crate::error::Result;
use crate::kernels::bindings::routegrad_draws;
use crate::kernels::router_sample::RouterSample;
use crate::tensor::random::{Purpose, Stream};

/// Sizes and settings of a launch; thresholds are those of SparseMixer's second version.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of tokens T.
    pub tokens: usize,
    /// Number of experts E.
    pub experts: usize,
    /// Number of choices K per token, which are made one after another.
    pub stages: usize,
    /// Whether experts are sampled; otherwise the most likely one is chosen, as in evaluation.
    pub sampled: bool,
    /// The kind of logits.
    pub logits: Logits,
}

/// The kind of logits in a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Logits {
    /// All experts have similar probabilities.
    Near,
    /// Logits of both signs, so that most experts are left out.
    Far,
    /// All logits are 0.
    Zero,
    /// Logits whose largest value is not the one with the largest magnitude.
    Negative,
    /// Pairs of equal logits.
    Ties,
    /// Logits with NaN and infinities, and a row of NaN.
    NonFinite,
}

const SEED: u64 = 0x1234_5678_9ABC_DEF0;
const STEP: u64 = 77;
const FIRST_TOKEN: u64 = (1 << 33) + 5;
const LAYER: usize = 3;
const EPSILON: f64 = 0.1;
const THRESHOLD: f64 = 0.75;
const UNTRUSTED: f32 = 1.0 / 3.0;

/// The expected outputs.
struct Outputs {
    experts: Vec<i32>,
    factors: Vec<f32>,
    kept: Vec<i32>,
    choices: Vec<i32>,
}

/// Returns the first of `experts` with the largest value; NaN is smaller than all other values.
fn largest(experts: impl Iterator<Item = usize>, value: impl Fn(usize) -> f64) -> usize {
    let larger = |a: f64, b: f64| a > b || (b.is_nan() && !a.is_nan());
    let best = experts.reduce(|best, e| {
        if larger(value(e), value(best)) {
            e
        } else {
            best
        }
    });
    best.unwrap_or(0)
}

fn reference(shape: Shape, logits: &[f32]) -> Outputs {
    let Shape {
        tokens,
        experts,
        stages,
        sampled,
        ..
    } = shape;
    let stream = Stream::new(SEED, Purpose::Routing, STEP, LAYER);
    let mut out = Outputs {
        experts: vec![0; stages * tokens],
        factors: vec![1.0; stages * tokens],
        kept: vec![0; stages * tokens * experts],
        choices: vec![0; tokens * stages],
    };
    for t in 0..tokens {
        let z = |e: usize| f64::from(logits[t * experts + e]);
        let chosen = &mut out.choices[t * stages..][..stages];
        for stage in 0..stages {
            let usable = |e: &usize| !chosen[..stage].contains(&(*e as i32));
            let likeliest = largest((0..experts).filter(usable), z);
            let top = z(likeliest);
            let dropped = |e: &usize| (top - z(*e)) / z(*e).abs().max(top) > 2.0 * EPSILON;
            let kept: Vec<usize> = (0..experts).filter(|e| usable(e) && !dropped(e)).collect();
            let row = stage * tokens + t;
            for &e in &kept {
                out.kept[row * experts + e] = 1;
            }
            let token = FIRST_TOKEN + t as u64;
            let first_draw = (token * stages as u64 + stage as u64) * (experts as u64 + 1);
            let mut expert = likeliest;
            if sampled {
                let value = |e| z(e) - stream.exponential(first_draw + e as u64).ln();
                expert = largest(kept.into_iter(), value);
                let u = f64::from(stream.uniform(first_draw + experts as u64));
                if expert != likeliest && !(u > THRESHOLD) {
                    out.factors[row] = UNTRUSTED;
                }
            }
            out.experts[row] = expert as i32;
            chosen[stage] = expert as i32;
        }
        chosen.sort_unstable();
    }
    out
}

/// Returns the launch. Outputs: experts, factors, kept, choices.
///
/// # Errors
/// Never: inputs of these shapes can always be created.
pub fn problem(shape: Shape) -> Result<Problem> {
    let Shape {
        tokens,
        experts,
        stages,
        sampled,
        ..
    } = shape;
    let mut random = Random((tokens * experts + stages) as u64);
    let logits: Vec<f32> = (0..tokens * experts)
        .map(|i| match shape.logits {
            Logits::Near => 2.0 + 0.1 * random.normal(),
            Logits::Far => 2.0 * random.normal(),
            Logits::Zero => 0.0,
            Logits::Negative => -1.0 - 0.2 * random.normal().abs(),
            Logits::Ties => (i % experts / 2) as f32,
            Logits::NonFinite if i / experts == 1 => f32::NAN,
            Logits::NonFinite => match random.below(12) {
                0 => f32::NAN,
                1 => f32::INFINITY,
                2 => f32::NEG_INFINITY,
                _ => random.normal(),
            },
        })
        .collect();
    let want = reference(shape, &logits);
    let draws = routegrad_draws {
        seed: SEED,
        step: STEP,
        first_token: FIRST_TOKEN,
    };
    let buffers = vec![
        Buffer::output("experts_chosen", stages * tokens * 4),
        Buffer::output("factors", stages * tokens * 4),
        Buffer::output("kept", stages * tokens * experts * 4),
        Buffer::output("choices", tokens * stages * 4),
        Buffer::input("logits", &logits),
        Buffer::input("draws", &[draws.seed, draws.step, draws.first_token]),
    ];
    Ok(Problem {
        label: format!("{shape:?}"),
        buffers,
        launch: launch_of!(RouterSample {
            experts_chosen, factors, kept, choices, logits, draws if sampled;
            tokens, experts, stages, layer: LAYER, epsilon: EPSILON, threshold: THRESHOLD,
            untrusted: UNTRUSTED,
        }),
        judge: Box::new(move |out| {
            let mut errors = exactly::<i32>("experts", &out[0], |i| want.experts[i])?;
            errors.merge(exactly::<f32>("factors", &out[1], |i| want.factors[i])?);
            errors.merge(exactly::<i32>("kept", &out[2], |i| want.kept[i])?);
            errors.merge(exactly::<i32>("choices", &out[3], |i| want.choices[i])?);
            Ok::<Errors, String>(errors)
        }),
    })
}

fn shape((tokens, experts, stages): (usize, usize, usize), sampled: bool, logits: Logits) -> Shape {
    Shape {
        tokens,
        experts,
        stages,
        sampled,
        logits,
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    use Logits::*;
    let small = vec![
        shape((1, 1, 1), true, Near),
        shape((67, 7, 2), true, Near),
        shape((40, 33, 2), true, Far),
        shape((9, 8, 2), true, NonFinite),
        shape((9, 8, 1), true, Zero),
        shape((40, 16, 2), true, Negative),
        shape((9, 8, 2), false, Ties),
    ];
    let sizes = [
        (2039, 8, 1),
        (509, 32, 2),
        (130, 256, 2),
        (300, 2, 2),
        (61, 100, 1),
    ];
    let kinds = [Near, Far, Zero, Negative, Ties, NonFinite];
    let covering = pairs(pairs(sizes, kinds), [true, false]).into_iter();
    let covering = covering.map(|((sizes, logits), sampled)| shape(sizes, sampled, logits));
    let shapes = [small, covering.collect()];
    Case::both("router_sample", "router_sample", shapes, |all| {
        each(all, problem)
    })
}
