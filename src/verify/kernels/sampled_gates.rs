//! Checks SparseMixer's gates and their gradient estimator (`kernels/gates.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::{Buffer, Case, Problem, each, launch_of, values};
use crate::kernels::gates::{SampledGates, SampledGatesBackward};

/// Tokens, experts, stages, and the scale of the logits relative to a standard normal.
type Shape = (usize, usize, usize, f32);

const ESTIMATOR: f32 = 2.0;

struct Inputs {
    logits: Vec<f32>,
    dw: Vec<f32>,
    /// Stage by stage.
    chosen: Vec<i32>,
    factors: Vec<f32>,
    kept: Vec<i32>,
}

impl Inputs {
    /// Every stage keeps some random experts, including its own sample; no stage keeps the sample of the other.
    fn new((tokens, experts, stages, spread): Shape) -> Self {
        let mut random = Random((tokens * experts + stages) as u64);
        let count = tokens * experts;
        let mut inputs = Inputs {
            logits: (0..count).map(|_| spread * random.normal()).collect(),
            dw: random.normals(count),
            chosen: Vec::new(),
            factors: Vec::new(),
            kept: Vec::new(),
        };
        for stage in 0..stages {
            for token in 0..tokens {
                let before = (stage > 0).then(|| inputs.chosen[token]);
                let mut expert = random.below(experts) as i32;
                if Some(expert) == before {
                    expert = (expert + 1) % experts as i32;
                }
                inputs.chosen.push(expert);
                inputs.factors.push([1.0, 1.0 / 3.0][random.below(2)]);
                inputs.kept.extend((0..experts as i32).map(|e| {
                    let keeps = random.below(3) > 0 && Some(e) != before;
                    i32::from(e == expert || keeps)
                }));
            }
        }
        inputs
    }

    /// Returns q of a stage with the bounds of its errors; for experts that are not kept, 0 with the bound 0.
    fn probabilities(&self, row: usize, z: &[f32]) -> Vec<(f64, f64)> {
        let experts = z.len();
        let kept = &self.kept[row * experts..(row + 1) * experts];
        let live = || (0..experts).filter(|&e| kept[e] != 0);
        let largest = live().map(|e| f64::from(z[e])).fold(f64::MIN, f64::max);
        let exp = |e: usize| (f64::from(z[e]) - largest).exp();
        let sum: f64 = live().map(exp).sum();
        let of = |e: usize| match kept[e] {
            0 => (0.0, 0.0),
            _ => {
                let distance = (f64::from(z[e]) - largest).abs();
                let roundings = (experts as f64 + 12.0 + distance) * F32_ROUNDOFF;
                (exp(e) / sum, roundings * exp(e) / sum + 1e-37)
            }
        };
        (0..experts).map(of).collect()
    }

    /// Returns the gates of a token, or the gradients of its logits, with the bounds of their errors.
    fn row(&self, token: usize, shape: Shape, backward: bool) -> Vec<(f64, f64)> {
        let (tokens, experts, stages, _) = shape;
        let z = &self.logits[token * experts..(token + 1) * experts];
        let mut line = vec![(0.0, 0.0); experts];
        for stage in 0..stages {
            let row = stage * tokens + token;
            let q = self.probabilities(row, z);
            let a = self.chosen[row] as usize;
            if !backward {
                let h = f64::from(self.factors[row]);
                line[a] = (h * q[a].0, h * (q[a].1 + 2.0 * F32_ROUNDOFF * q[a].0));
                continue;
            }
            let s = f64::from(ESTIMATOR) * f64::from(self.dw[token * experts + a]);
            for (j, line) in line.iter_mut().enumerate() {
                let own = f64::from(u8::from(j == a));
                let size = own + q[j].0;
                let term = s * q[a].0 * (own - q[j].0);
                let error =
                    s.abs() * (q[a].1 * size + q[a].0 * (q[j].1 + 8.0 * F32_ROUNDOFF * size));
                *line = (line.0 + term, line.1 + error);
            }
        }
        line
    }
}

/// Buffers: w or dz, factors or dw, logits, experts_chosen, kept.
fn problem(shape: Shape, backward: bool) -> Problem {
    let inputs = Inputs::new(shape);
    let (tokens, experts, stages, _) = shape;
    let second = match backward {
        true => Buffer::input("dw", &inputs.dw),
        false => Buffer::input("factors", &inputs.factors),
    };
    Problem {
        label: format!("T, E, stages, spread {shape:?}"),
        buffers: vec![
            Buffer::output("gates or gradients", 4 * tokens * experts),
            second,
            Buffer::input("logits", &inputs.logits),
            Buffer::input("experts_chosen", &inputs.chosen),
            Buffer::input("kept", &inputs.kept),
        ],
        launch: match backward {
            true => launch_of!(SampledGatesBackward {
                dz = "gates or gradients", dw, logits, experts_chosen, kept;
                tokens, experts, stages, estimator: ESTIMATOR,
            }),
            false => launch_of!(SampledGates {
                w = "gates or gradients", factors, logits, experts_chosen, kept;
                tokens, experts, stages,
            }),
        },
        judge: Box::new(move |out| {
            let got: Vec<f32> = values(&out[0]);
            let mut errors = Errors::default();
            for (token, got) in got.chunks(experts).enumerate() {
                let want = inputs.row(token, shape, backward);
                let name = format!("token {token}, expert");
                errors.merge(Errors::within(&name, got, |expert| want[expert])?);
            }
            Ok(errors)
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let small: &[Shape] = &[
        (1, 1, 1, 1.0),
        (67, 7, 2, 1.0),
        (40, 33, 2, 300.0),
        (9, 8, 1, 4.0),
    ];
    let covering: &[Shape] = &[
        (2039, 8, 2, 1.0),
        (509, 32, 1, 3.0),
        (130, 256, 2, 1.0),
        (61, 100, 2, 1e4),
    ];
    let mut all = Vec::new();
    for (launcher, backward) in [("sampled_gates", false), ("sampled_gates_backward", true)] {
        let problems =
            |shapes: &[Shape]| each(shapes.to_vec(), move |shape| problem(shape, backward));
        all.extend(Case::both(launcher, "gates", [small, covering], problems));
    }
    all
}
