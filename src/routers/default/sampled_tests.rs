//! Tests of sampled default vectors and of the running factor against a direct computation.

use super::tests::assert_close;
use super::*;
use crate::config::{Config, Layers};
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::routers::Pass;
use crate::tape::check::normal_numbers;
use crate::verify::device_check::{MODEL_TOLERANCE, compare_step};

const TOKENS: usize = 40;
const EXPERTS: usize = 4;
const HIDDEN: usize = 8;

/// A model in f64 whose default vectors are sampled again in every step: β = 0.
fn sampling_model(set: &[&str]) -> Model {
    let mut layers = Layers::preset("tiny");
    let own = [
        "router.name=default",
        "router.source=sampled",
        "router.beta=0",
        "router.init_std=1",
        "model.hidden=8",
        "model.num_experts=4",
        "model.heads=2",
        "model.layers=2",
        "model.expert_ffn_width=6",
        "train.dtype=f64",
    ];
    layers.set = own.iter().chain(set).map(|s| s.to_string()).collect();
    Model::new(&Config::load(&layers, &crate::routers::resolve).unwrap()).unwrap()
}

fn hidden_states() -> Vec<f64> {
    normal_numbers(TOKENS * HIDDEN, 5)
}

/// Returns the pending ê `[E, D]` after a training pass of the layer.
fn pending(model: &Model, pass: Pass, x: &[f64]) -> Vec<f64> {
    let x = Var::constant(Tensor::from_slice([x.len() / HIDDEN, HIDDEN], x));
    let tape = Tape::without_gradients();
    model
        .moe_layer(0, &tape, &model.weights(), &x, pass)
        .unwrap();
    model.layer_states_mut()[0]
        .pending_mut(VECTORS)
        .to_f64()
        .unwrap()
}

/// Computes directly the mean of each expert's outputs over the tokens that did not choose it (K = 1), weighted by p
/// or with equal weights.
fn oracle(model: &Model, weighted: bool) -> Vec<f64> {
    let parameter = |suffix: &str| {
        let mut all = model.parameters.iter();
        let found = all.find(|p| p.name.ends_with(suffix)).unwrap();
        found.value.to_f64().unwrap()
    };
    let times = |m: &[f64], x: &[f64]| -> Vec<f64> {
        let dot = |row: &[f64]| row.iter().zip(x).map(|(a, b)| a * b).sum();
        m.chunks(x.len()).map(dot).collect()
    };
    let (gate, up, down) = (
        parameter("gate.weight"),
        parameter("experts.gate_up_proj"),
        parameter("experts.down_proj"),
    );
    let (mut sums, mut masses) = (vec![0.0; EXPERTS * HIDDEN], [0.0; EXPERTS]);
    for x in hidden_states().chunks(HIDDEN) {
        let z = times(&gate, x);
        let total: f64 = z.iter().map(|z| z.exp()).sum();
        let best = z.iter().copied().fold(f64::MIN, f64::max);
        for e in (0..EXPERTS).filter(|e| z[*e] < best) {
            let part = |m: &[f64]| m[e * m.len() / EXPERTS..(e + 1) * m.len() / EXPERTS].to_vec();
            let h = times(&part(&up), x);
            let (g, u) = h.split_at(h.len() / 2);
            let a: Vec<f64> = g
                .iter()
                .zip(u)
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            let w = if weighted { z[e].exp() / total } else { 1.0 };
            masses[e] += w;
            for (sum, y) in sums[e * HIDDEN..].iter_mut().zip(times(&part(&down), &a)) {
                *sum += w * y;
            }
        }
    }
    let of = |(i, sum): (usize, f64)| sum / masses[i / HIDDEN];
    sums.into_iter().enumerate().map(of).collect()
}

#[test]
fn the_expected_sampled_vector_is_the_mean_over_tokens_that_did_not_choose_the_expert() {
    const STEPS: u64 = 600;
    for (weighted, set) in [
        (true, "router.weighted=true"),
        (false, "router.weighted=false"),
    ] {
        let model = sampling_model(&[set, "router.samples=3"]);
        let (mut sums, mut squares) = (vec![0.0; EXPERTS * HIDDEN], vec![0.0; EXPERTS * HIDDEN]);
        for step in 0..STEPS {
            let pass = Pass {
                step,
                ..Pass::single(Phase::Train)
            };
            for (i, v) in pending(&model, pass, &hidden_states())
                .into_iter()
                .enumerate()
            {
                sums[i] += v;
                squares[i] += v * v;
            }
            model.layer_states_mut()[0].discard();
        }
        let n = STEPS as f64;
        for (i, expected) in oracle(&model, weighted).into_iter().enumerate() {
            let mean = sums[i] / n;
            let error = ((squares[i] / n - mean * mean) / n).sqrt();
            assert!(error > 0.0, "the draws of {i} do not differ");
            assert!(
                (mean - expected).abs() <= 5.0 * error,
                "{i}: {mean}, {expected} ± {error}"
            );
        }
    }
}

#[test]
fn with_very_many_samples_the_vector_is_the_mean_itself() {
    // Each token is drawn in proportion to its weight, with an error of at most 1/60,000 at each end of its interval.
    let model = sampling_model(&["router.samples=60000"]);
    let found = pending(&model, Pass::single(Phase::Train), &hidden_states());
    let expected = oracle(&model, true);
    let largest = expected.iter().fold(0.0, |m: f64, e| m.max(e.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let missed = (found - expected).abs();
        assert!(missed <= 1e-3 * largest, "{found} {expected}");
    }
}

#[test]
fn micro_batches_move_sampled_vectors_by_their_shares_of_a_step() {
    // Seven samples over four micro-batches: shares of 1, 2, 2, 2; β per step is kept.
    let model = sampling_model(&["router.samples=7", "router.beta=0.5"]);
    let start = model.layer_states()[0]
        .tensors()
        .next()
        .unwrap()
        .1
        .to_f64()
        .unwrap();
    let part = TOKENS / 4;
    let all = hidden_states();
    let mut expected = start;
    let fresh = sampling_model(&["router.samples=7"]);
    for (m, x) in all.chunks(part * HIDDEN).enumerate() {
        let pass = Pass {
            micro_batches: 4,
            first_token: (m * part) as u64,
            ..Pass::single(Phase::Train)
        };
        // With β = 0 and the same draws, ê is the mean itself.
        let mean = pending(&fresh, pass, x);
        let share = [1.0, 2.0, 2.0, 2.0][m] / 7.0;
        let beta = 0.5f64.powf(share);
        expected
            .iter_mut()
            .zip(mean)
            .for_each(|(e, m)| *e = beta * *e + (1.0 - beta) * m);
        let found = pending(&model, pass, x);
        assert_close(&found, &expected);
    }
}

#[test]
fn passes_that_must_not_change_state_draw_nothing() {
    let model = sampling_model(&[]);
    let before = pending(&model, Pass::single(Phase::Train), &hidden_states());
    for phase in [Phase::Frozen, Phase::Evaluate] {
        assert_eq!(
            pending(&model, Pass::single(phase), &hidden_states()),
            before
        );
    }
}

#[test]
fn settings_that_sampling_does_not_support_are_refused_with_a_suggestion() {
    for (set, key) in [
        ("router.samples=0", "router.samples"),
        ("router.samples=65536", "65535"),
        ("router.weight_norm=count", "router.weight_norm"),
        ("router.shrink=-0.5", "router.shrink"),
    ] {
        let mut layers = Layers::preset("tiny");
        layers.set = vec!["router.source=sampled".into(), set.into()];
        let config = Config::load(&layers, &crate::routers::resolve).unwrap();
        let error = Model::new(&config).err().unwrap().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn the_running_factor_is_the_least_squares_one_of_sampled_means() {
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    for source in ["router.source=sampled", "router.source=chosen"] {
        let model = sampling_model(&[source, "router.shrink=running", "router.beta=0.75"]);
        let other = sampling_model(&[]);
        let sums = || {
            model.layer_states_mut()[0]
                .pending_mut(SHRINK)
                .to_f64()
                .unwrap()
        };
        let mut expected = [0.0; 2];
        let mut vectors = model.layer_states()[0]
            .tensors()
            .next()
            .unwrap()
            .1
            .to_f64()
            .unwrap();
        for step in 0..3 {
            let pass = Pass {
                step,
                ..Pass::single(Phase::Train)
            };
            // With β = 0 and the same draws, ê is the mean itself.
            let means = pending(&other, pass, &hidden_states());
            let mass = masses(&other);
            let total: f64 = mass.iter().sum();
            for (i, mass) in mass.iter().enumerate() {
                let row = i * HIDDEN..(i + 1) * HIDDEN;
                let (v, m) = (&vectors[row.clone()], &means[row]);
                let terms = [dot(v, m), dot(v, v)].map(|x| 0.25 * mass / total * x);
                expected.iter_mut().zip(terms).for_each(|(e, t)| *e += t);
            }
            vectors = pending(&model, pass, &hidden_states());
            // Masses are counted in units of 2^-32.
            for (found, expected) in sums().iter().zip(&expected) {
                assert!((found - expected).abs() <= 1e-8 * expected.abs().max(1.0));
            }
            expected.iter_mut().for_each(|e| *e *= 0.75);
        }
    }
}

/// `Σ p` over the tokens that did not choose an expert.
fn masses(model: &Model) -> Vec<f64> {
    let mut all = model.parameters.iter();
    let gate = all.find(|p| p.name.ends_with("gate.weight")).unwrap();
    let gate = gate.value.to_f64().unwrap();
    let mut masses = vec![0.0; EXPERTS];
    for x in hidden_states().chunks(HIDDEN) {
        let dot = |row: &[f64]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
        let z: Vec<f64> = gate.chunks(HIDDEN).map(dot).collect();
        let total: f64 = z.iter().map(|z| z.exp()).sum();
        let best = z.iter().copied().fold(f64::MIN, f64::max);
        for (mass, z) in masses.iter_mut().zip(&z).filter(|(_, z)| **z < best) {
            *mass += z.exp() / total;
        }
    }
    masses
}

#[test]
fn the_running_factor_scales_what_evaluation_uses_too() {
    let x = hidden_states();
    let output = |set: &[&str], sums: Option<[f64; 2]>, phase| {
        let model = sampling_model(set);
        if let Some(sums) = sums {
            let sums = Tensor::from_slice([2], &sums);
            model.layer_states_mut()[0].restore(SHRINK, sums).unwrap();
        }
        let x = Var::constant(Tensor::from_slice([TOKENS, HIDDEN], &x));
        let (tape, weights) = (Tape::without_gradients(), model.weights());
        let (y, _) = model
            .moe_layer(0, &tape, &weights, &x, Pass::single(phase))
            .unwrap();
        y.tensor().to_f64().unwrap()
    };
    for phase in [Phase::Frozen, Phase::Evaluate] {
        for (sums, factor) in [
            ([1.0, 4.0], "0.25"),
            ([0.0, 0.0], "1"),
            ([9.0, 3.0], "2"),
            ([-1.0, 3.0], "0"),
        ] {
            let running = output(&["router.shrink=running"], Some(sums), phase);
            let constant = format!("router.shrink={factor}");
            assert_eq!(running, output(&[&constant], None, phase), "{factor}");
        }
        let whole = output(&[], None, phase);
        assert!(whole != output(&["router.shrink=0.5"], None, phase));
    }
}

#[test]
fn renormalisation_on_a_device_with_kernels_is_refused_with_a_suggestion() {
    let mut layers = Layers::preset("tiny");
    layers.set = vec!["router.renormalize=true".into(), "train.device=sim".into()];
    let config = Config::load(&layers, &crate::routers::resolve).unwrap();
    let error = Model::new(&config).err().unwrap().to_string();
    assert!(
        error.contains("router.renormalize") && error.contains("\"cpu\""),
        "{error}"
    );
}

#[test]
fn a_step_with_sampled_or_scaled_vectors_on_the_simulator_matches_the_cpu() {
    for set in [
        &["router.source=sampled"][..],
        &["router.shrink=0.5", "router.init_std=0.5"],
        &["router.shrink=running", "router.init_std=0.5"],
    ] {
        let mut layers = Layers::preset("tiny");
        let small = [
            "model.hidden=64",
            "model.heads=1",
            "model.layers=2",
            "model.expert_ffn_width=32",
            "model.sequence_length=32",
            "router.name=default",
        ];
        layers.set = small.iter().chain(set).map(|s| s.to_string()).collect();
        let config = Config::load(&layers, &crate::routers::resolve).unwrap();
        let tokens: Vec<i32> = (0..2 * 33).map(|i| (i * i * 7 + i) % 256).collect();
        let found = compare_step(&config, Sequences::new(&tokens, 2), None).unwrap();
        let states = found
            .differences
            .iter()
            .filter(|(name, _)| name.contains("MoE layer"));
        assert_eq!(states.count(), 1 + usize::from(set[0].ends_with("running")));
        let (what, difference) = found.worst();
        assert!(
            difference <= MODEL_TOLERANCE,
            "{set:?}: {what} differs by {difference:.1e}"
        );
    }
}
