//! A worked example, and tests of the bias of the estimators: the means over all draws, weighted by probability, are
//! compared with derivatives of the expectation.

use super::*;
use crate::ops::combine::combine;
use crate::ops::dispatch::Dispatch;
use crate::tape::Gradients;
use std::rc::Rc;

fn router(version: Version, epsilon: f64) -> SparseMixer {
    SparseMixer {
        version,
        epsilon,
        surrogate: false,
    }
}

/// One token: logits [E], expert outputs [E][D], incoming gradient [D], and ω [D].
struct Token<'a> {
    z: &'a [f64],
    outputs: &'a [Vec<f64>],
    g: &'a [f64],
    omega: Option<&'a [f64]>,
}

/// The results of one draw.
#[derive(Clone, Debug)]
struct Outcome {
    experts: Vec<usize>,
    factors: Vec<f64>,
    kept: Vec<Vec<bool>>,
    y: Vec<f64>,
    dz: Vec<f64>,
    /// Rows of the chosen experts, ascending by expert.
    de: Vec<f64>,
    domega: Vec<f64>,
}

impl Token<'_> {
    /// The layer's forward and backward with the given ξ [stage][E] and u [stage].
    fn run(&self, router: &SparseMixer, xi: &[Vec<f64>], u: &[f64]) -> Outcome {
        let (experts, width) = (self.z.len(), self.g.len());
        let z = Var::leaf(Tensor::from_slice([1, experts], self.z), 0);
        let draws = Draws {
            exponential: &|_, stage, i| xi[stage][i],
            uniform: &|_, stage| u[stage],
        };
        let choices = router.choices(z.tensor(), u.len(), Some(draws)).unwrap();
        let tape = Tape::new();
        let gates = router.gates(&tape, &z, &choices).unwrap();
        let dispatch = Rc::new(Dispatch::new(selection(z.tensor(), &choices).unwrap()));
        let rows: Vec<f64> = dispatch
            .selection()
            .experts(0)
            .iter()
            .flat_map(|&e| self.outputs[e as usize].clone())
            .collect();
        let e = Var::leaf(Tensor::from_slice([u.len(), width], &rows), 1);
        let y = combine(&tape, &gates, &e, None, &dispatch).unwrap();
        let omega = self
            .omega
            .map(|w| Var::leaf(Tensor::from_slice([width], w), 2));
        let own: Vec<Var> = omega.into_iter().collect();
        let y = router.output(&tape, y, &own).unwrap();
        let mut store = Gradients::new(3);
        let g = Tensor::from_slice([1, width], self.g);
        tape.backward_from(&[(&y, g)], &mut store).unwrap();
        let gradient = |i| {
            store
                .get(i)
                .map_or(vec![], |t: &Tensor| t.to_f64().unwrap())
        };
        Outcome {
            experts: choices
                .iter()
                .map(|c| c.expert.slice::<i32>()[0] as usize)
                .collect(),
            factors: choices.iter().map(|c| c.factor.slice::<f64>()[0]).collect(),
            kept: choices
                .iter()
                .map(|c| c.kept.slice::<i32>().iter().map(|k| *k != 0).collect())
                .collect(),
            y: y.tensor().to_f64().unwrap(),
            dz: gradient(0),
            de: gradient(1),
            domega: gradient(2),
        }
    }

    /// Returns every outcome with its probability, for every kept expert in every stage, trusted or not.
    fn enumerate(&self, router: &SparseMixer, stages: usize) -> Vec<(f64, Outcome)> {
        let experts = self.z.len();
        let (_, threshold, _) = router.constants();
        let mut found: Vec<(f64, Outcome)> = Vec::new();
        for code in 0..experts.pow(stages as u32) {
            let wanted: Vec<usize> = (0..stages)
                .map(|s| code / experts.pow(s as u32) % experts)
                .collect();
            for trust in 0..1 << stages {
                let xi: Vec<Vec<f64>> = wanted.iter().map(|&a| favour(a, experts)).collect();
                let high = |s: usize| trust >> s & 1 == 1;
                let u: Vec<f64> = (0..stages)
                    .map(|s| if high(s) { 0.99 } else { 0.0 })
                    .collect();
                let outcome = self.run(router, &xi, &u);
                if outcome.experts != wanted {
                    // This expert is masked or was chosen before: its probability is 0.
                    continue;
                }
                let probability: f64 = (0..stages)
                    .map(|s| {
                        let p = masked_softmax(self.z, &outcome.kept[s])[wanted[s]];
                        p * if high(s) { 1.0 - threshold } else { threshold }
                    })
                    .product();
                found.push((probability, outcome));
            }
        }
        let total: f64 = found.iter().map(|(p, _)| p).sum();
        assert!((total - 1.0).abs() <= 1e-12, "probabilities sum to {total}");
        found
    }

    /// `⟨g, ω⊙e_i⟩` of every expert.
    fn slopes(&self) -> Vec<f64> {
        let weight = |d: usize| self.g[d] * self.omega.map_or(1.0, |w| w[d]);
        let dot = |e: &Vec<f64>| (0..e.len()).map(|d| weight(d) * e[d]).sum();
        self.outputs.iter().map(dot).collect()
    }
}

/// Returns ξ with which expert `a` is drawn unless it is masked.
fn favour(a: usize, experts: usize) -> Vec<f64> {
    (0..experts)
        .map(|i| if i == a { 1e-30 } else { 1.0 })
        .collect()
}

fn masked_softmax(z: &[f64], kept: &[bool]) -> Vec<f64> {
    let terms: Vec<f64> = z
        .iter()
        .zip(kept)
        .map(|(z, kept)| if *kept { z.exp() } else { 0.0 })
        .collect();
    let sum: f64 = terms.iter().sum();
    terms.iter().map(|t| t / sum).collect()
}

fn mean_dz(outcomes: &[(f64, Outcome)]) -> Vec<f64> {
    let mut mean = vec![0.0; outcomes[0].1.dz.len()];
    for (p, outcome) in outcomes {
        mean.iter_mut()
            .zip(&outcome.dz)
            .for_each(|(m, d)| *m += p * d);
    }
    mean
}

/// Returns the five-point central differences of `f` with respect to every logit.
fn differences(z: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const H: f64 = 1e-3;
    let moved = |j: usize, by: f64| {
        let mut z = z.to_vec();
        z[j] += by;
        f(&z)
    };
    (0..z.len())
        .map(|j| {
            let near = moved(j, H) - moved(j, -H);
            let far = moved(j, 2.0 * H) - moved(j, -2.0 * H);
            (8.0 * near - far) / (12.0 * H)
        })
        .collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = |m: f64, x: f64| if x.is_nan() || x > m { x } else { m };
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, largest)
}

fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert!(
        distance(found, expected) <= tolerance,
        "{found:?}, expected {expected:?}"
    );
}

const Z: [f64; 4] = [2.0, 1.7, 1.5, -0.2];
const G: [f64; 2] = [1.0, -2.0];
const OMEGA: [f64; 2] = [1.5, 0.5];

fn outputs() -> Vec<Vec<f64>> {
    vec![
        vec![1.0, 1.0],
        vec![2.0, 0.5],
        vec![-1.0, 3.0],
        vec![0.0, 1.0],
    ]
}

#[test]
fn the_worked_example_of_the_first_version() {
    let outputs = outputs();
    let token = Token {
        z: &Z,
        outputs: &outputs,
        g: &G,
        omega: Some(&OMEGA),
    };
    let v1 = router(Version::V1, 0.1);
    let xi = [vec![1.0, 0.5, 1.0, 1.0]];
    let low = token.run(&v1, &xi, &[0.3]);
    assert_eq!(low.kept, [[true, true, false, false]]);
    assert_eq!((&low.experts[..], &low.factors[..]), (&[1][..], &[0.5][..]));
    assert_close(&low.y, &[0.6383362248, 0.0531946854], 1e-10);
    let dz = [-1.2222915585, 1.2222915585, 0.0, 0.0];
    assert_close(&low.dz, &dz, 1e-10);
    assert_close(&low.domega, &[0.4255574832, -0.2127787416], 1e-10);
    // de = h p_a g⊙ω.
    let p = 0.4255574832;
    assert_close(&low.de, &[0.5 * p * 1.5, -0.5 * p], 1e-10);
    // With u above 1/2 everything but dz doubles.
    let high = token.run(&v1, &xi, &[0.6]);
    let doubled = |v: &[f64]| v.iter().map(|x| 2.0 * x).collect::<Vec<f64>>();
    assert_eq!(high.factors, [1.0]);
    assert_eq!(high.y, doubled(&low.y));
    assert_eq!(high.de, doubled(&low.de));
    assert_eq!(high.domega, doubled(&low.domega));
    assert_eq!(high.dz, low.dz);
}

#[test]
fn the_likeliest_expert_is_always_trusted_and_others_by_the_threshold_of_their_version() {
    let outputs = outputs();
    let token = Token {
        z: &Z,
        outputs: &outputs,
        g: &G,
        omega: None,
    };
    for (version, below, above, untrusted) in [
        (Version::V1, 0.5, 0.51, 0.5),
        (Version::V2, 0.75, 0.76, 1.0 / 3.0),
    ] {
        let factor = |a, u| {
            token
                .run(&router(version, 0.1), &[favour(a, 4)], &[u])
                .factors[0]
        };
        assert_eq!(factor(0, 0.0), 1.0);
        assert_eq!(factor(1, below), untrusted);
        assert_eq!(factor(1, above), 1.0);
    }
}

#[test]
fn the_second_stage_excludes_the_first_expert_and_may_choose_experts_masked_before() {
    let outputs = outputs();
    let token = Token {
        z: &Z,
        outputs: &outputs,
        g: &G,
        omega: None,
    };
    // Stage 1 keeps {0, 1} and chooses 0; stage 2 keeps {1, 2}, which includes 2 again, and chooses 2.
    let xi = [favour(0, 4), favour(2, 4)];
    let found = token.run(&router(Version::V2, 0.1), &xi, &[0.0, 0.0]);
    assert_eq!(found.experts, [0, 2]);
    assert_eq!(found.kept[1], [false, true, true, false]);
    assert_eq!(found.factors, [1.0, 1.0 / 3.0]);
    let (p, q) = (
        masked_softmax(&Z, &found.kept[0]),
        masked_softmax(&Z, &found.kept[1]),
    );
    // y = p_0 e_0 + q_2 / 3 e_2; s_0 = −1, s_2 = −7.
    assert_close(&found.y, &[p[0] - q[2] / 3.0, p[0] + q[2]], 1e-15);
    let dz = [
        -p[0] * (1.0 - p[0]),
        p[0] * p[1] + 7.0 * q[2] * q[1],
        -7.0 * q[2] * (1.0 - q[2]),
        0.0,
    ];
    assert_close(&found.dz, &dz, 1e-14);
}

/// Five experts that are all kept with ε = 1; logits and outputs have no symmetry.
fn five() -> (Vec<f64>, Vec<Vec<f64>>, Vec<f64>) {
    let numbers = crate::tape::check::normal_numbers(18, 41);
    let z = vec![1.3, 1.0, 0.9, 1.2, 0.7];
    let outputs = numbers[..15].chunks(3).map(<[f64]>::to_vec).collect();
    (z, outputs, numbers[15..].to_vec())
}

#[test]
fn the_mean_of_the_first_version_is_the_total_derivative_for_affine_losses() {
    let (z, outputs, g) = five();
    let omega = [0.5, -1.5, 2.0];
    for epsilon in [0.1, 1.0] {
        let token = Token {
            z: &z,
            outputs: &outputs,
            g: &g,
            omega: Some(&omega),
        };
        let outcomes = token.enumerate(&router(Version::V1, epsilon), 1);
        let (kept, s) = (outcomes[0].1.kept[0].clone(), token.slopes());
        // E f(p_a ω⊙e_a) with f(y) = 0.7 + ⟨g, y⟩.
        let expected = differences(&z, |z| {
            let p = masked_softmax(z, &kept);
            (0..5).map(|a| p[a] * (0.7 + p[a] * s[a])).sum()
        });
        assert_close(&mean_dz(&outcomes), &expected, 1e-11);
    }
}

#[test]
fn the_mean_of_the_second_version_is_the_sampling_part_of_the_derivative_for_affine_losses_and_one_expert()
 {
    let (z, outputs, g) = five();
    for epsilon in [0.1, 1.0] {
        let token = Token {
            z: &z,
            outputs: &outputs,
            g: &g,
            omega: None,
        };
        let outcomes = token.enumerate(&router(Version::V2, epsilon), 1);
        let (kept, s) = (outcomes[0].1.kept[0].clone(), token.slopes());
        let gate = masked_softmax(&z, &kept);
        let expected = differences(&z, |z| {
            let p = masked_softmax(z, &kept);
            (0..5).map(|a| p[a] * (0.7 + gate[a] * s[a])).sum()
        });
        let mean = mean_dz(&outcomes);
        assert_close(&mean, &expected, 1e-11);
        // It is not the total derivative, which also includes the dependence of the gate.
        let total = differences(&z, |z| {
            let p = masked_softmax(z, &kept);
            (0..5).map(|a| p[a] * (0.7 + p[a] * s[a])).sum()
        });
        assert!(distance(&mean, &total) > 1e-2);
    }
}

#[test]
fn with_two_experts_the_second_version_is_biased_by_the_effect_of_the_first_choice_on_the_second() {
    let (z, outputs, g) = five();
    let token = Token {
        z: &z,
        outputs: &outputs,
        g: &g,
        omega: None,
    };
    let outcomes = token.enumerate(&router(Version::V2, 1.0), 2);
    let s = token.slopes();
    let without = |first: usize| -> Vec<bool> { (0..5).map(|i| i != first).collect() };
    let all = [true; 5];
    let gate = masked_softmax(&z, &all);
    let second_gate: Vec<Vec<f64>> = (0..5).map(|a| masked_softmax(&z, &without(a))).collect();
    // The sampling part of E (⟨g, y⟩), y = p_a e_a + q_b e_b, the gates constant.
    let expectation = |z: &[f64], value: &dyn Fn(usize, usize) -> f64| -> f64 {
        let p = masked_softmax(z, &all);
        let mut sum = 0.0;
        for (a, pa) in p.iter().enumerate() {
            let q = masked_softmax(z, &without(a));
            sum += (0..5).map(|b| pa * q[b] * value(a, b)).sum::<f64>();
        }
        sum
    };
    let both = |a: usize, b: usize| gate[a] * s[a] + second_gate[a][b] * s[b];
    let expected = differences(&z, |z| expectation(z, &both));
    let mean = mean_dz(&outcomes);
    let bias = distance(&mean, &expected);
    assert!(bias > 1e-2, "only {bias}");
    // The bias is exactly the term that the estimator leaves out: the second expert's value by the
    // probability of the first.
    let left_out = differences(&z, |moved| {
        let p = masked_softmax(moved, &all);
        let value = |a: usize| -> f64 {
            (0..5)
                .map(|b| second_gate[a][b] * second_gate[a][b] * s[b])
                .sum()
        };
        (0..5).map(|a| p[a] * value(a)).sum()
    });
    let completed: Vec<f64> = mean.iter().zip(&left_out).map(|(m, l)| m + l).collect();
    assert_close(&completed, &expected, 1e-11);
}
