//! The default vectors, outputs and gradients of `default`, worked by hand, and what sampled vectors average.

use super::*;
use crate::config::{Config, Layers};
use crate::dist::SingleRank;
use crate::model::Model;
use crate::ops::combine::combine;
use crate::routers::{LayerState, Pass};
use crate::tape::Gradients;
use crate::tape::check::normal_numbers;
use std::rc::Rc;

/// What one training pass gave: y, ê after it, dz, de.
struct Outcome {
    y: Vec<f64>,
    vectors: Vec<f64>,
    dz: Vec<f64>,
    de: Vec<f64>,
}

/// Three tokens, three experts, K = 1, D = 2, β = 1/2.
///
/// z = ln (2, 1, 1), ln (1, 3, 4), ln (6, 1, 1), so p = (1/2, 1/4, 1/4), (1/8, 3/8, 1/2),
/// (3/4, 1/8, 1/8): tokens 0 and 2 choose expert 0, token 1 expert 2, none expert 1.
/// Outputs e_0(x_0) = (4, 0), e_0(x_2) = (0, 8), e_2(x_1) = (0, 8).
/// At the start ê_0 = (2, 0), ê_1 = (1, 1), ê_2 = (0, 4).
/// Incoming gradients g_0 = (1, 2), g_1 = (−1, 1), g_2 = (2, 0).
fn worked(router: DefaultMoe) -> Outcome {
    let ln = |row: [f64; 3]| row.map(f64::ln);
    let z = [
        ln([2.0, 1.0, 1.0]),
        ln([1.0, 3.0, 4.0]),
        ln([6.0, 1.0, 1.0]),
    ]
    .concat();
    let z = Var::leaf(Tensor::from_slice([3, 3], &z), 0);
    // Rows sorted by expert: (expert 0, token 0), (expert 0, token 2), (expert 2, token 1).
    let e = Var::leaf(
        Tensor::from_slice([3, 2], &[4.0, 0.0, 0.0, 8.0, 0.0, 8.0]),
        1,
    );
    let start = Tensor::from_slice([3, 2], &[2.0, 0.0, 1.0, 1.0, 0.0, 4.0]);
    let mut state = LayerState::new(vec![StateTensor {
        name: VECTORS,
        start,
    }]);

    let (tape, mut store) = (Tape::new(), Gradients::new(2));
    let pass = Pass::single(Phase::Train);
    let mut layer = LayerPass::new(pass, &SingleRank, 0, 1, 0, &mut state, false);
    // With the identity as the router's weight the logits are the layer's input.
    let identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let weight = Var::constant(Tensor::from_slice([3, 3], &identity));
    let routing = router.route(&tape, &z, &weight, &mut layer).unwrap();
    let weights = routing.sum_weights.as_ref().unwrap_or(&routing.gates);
    let (weights, weighting) = (weights.tensor(), router.weighting().unwrap());
    let sums = ExpertSums::of_rows(e.tensor(), weights, weighting, &routing.dispatch).unwrap();
    let defaults = router.defaults(Some(sums), &mut layer).unwrap();
    let y = combine(
        &tape,
        &routing.gates,
        &e,
        defaults,
        &Rc::clone(&routing.dispatch),
    )
    .unwrap();
    let g = Tensor::from_slice([3, 2], &[1.0, 2.0, -1.0, 1.0, 2.0, 0.0]);
    tape.backward_from(&[(&y, g)], &mut store).unwrap();
    state.commit();
    let vectors = state.tensors().next().map(|(_, t)| t.to_f64().unwrap());
    Outcome {
        y: y.tensor().to_f64().unwrap(),
        vectors: vectors.unwrap(),
        dz: store.get(0).unwrap().to_f64().unwrap(),
        de: store.get(1).unwrap().to_f64().unwrap(),
    }
}

fn half() -> DefaultMoe {
    DefaultMoe {
        beta: 0.5,
        ..Default::default()
    }
}

fn assert_close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= 1e-14, "{found:?}, expected {expected:?}");
    }
}

#[test]
fn the_moving_average_worked_by_hand_in_every_weighting() {
    // Weighted: m_0 = (1/2 (4, 0) + 3/4 (0, 8)) / (1/2 + 3/4) = (2, 6) / 1.25 = (1.6, 4.8),
    // ê_0 = ((2, 0) + (1.6, 4.8)) / 2 = (1.8, 2.4); ê_1 stays; ê_2 = ((0, 4) + (0, 8)) / 2.
    assert_close(&worked(half()).vectors, &[1.8, 2.4, 1.0, 1.0, 0.0, 6.0]);
    // Plain: m_0 = ((4, 0) + (0, 8)) / 2 = (2, 4), ê_0 = (2, 2).
    let plain = DefaultMoe {
        weighted: false,
        ..half()
    };
    assert_close(&worked(plain).vectors, &[2.0, 2.0, 1.0, 1.0, 0.0, 6.0]);
    // By count: m_0 = (2, 6) / 2 = (1, 3), ê_0 = (1.5, 1.5); m_2 = 1/2 (0, 8), ê_2 = (0, 4).
    let count = DefaultMoe {
        weight_norm: WeightNorm::Count,
        ..half()
    };
    assert_close(&worked(count).vectors, &[1.5, 1.5, 1.0, 1.0, 0.0, 4.0]);
}

#[test]
fn the_output_worked_by_hand_uses_the_updated_average() {
    // y_0 = 1/2 (4, 0) + 1/4 (1, 1) + 1/4 (0, 6),
    // y_1 = 1/8 (1.8, 2.4) + 3/8 (1, 1) + 1/2 (0, 8),
    // y_2 = 3/4 (0, 8) + 1/8 (1, 1) + 1/8 (0, 6).
    assert_close(&worked(half()).y, &[2.25, 1.75, 0.6, 4.675, 0.125, 6.875]);
}

#[test]
fn the_gradients_worked_by_hand() {
    // Token 0: s = (⟨g, e_0⟩, ⟨g, ê_1⟩, ⟨g, ê_2⟩) = (4, 3, 12), Σ p s = 5.75,
    //   dz = (1/2 (4 − 5.75), 1/4 (3 − 5.75), 1/4 (12 − 5.75)).
    // Token 1: s = (0.6, 0, 8), Σ p s = 4.075,
    //   dz = (1/8 (0.6 − 4.075), 3/8 (0 − 4.075), 1/2 (8 − 4.075)).
    // Token 2: s = (0, 2, 0), Σ p s = 0.25, dz = (3/4 (−0.25), 1/8 (1.75), 1/8 (−0.25)).
    let found = worked(half());
    assert_close(
        &found.dz,
        &[
            -0.875, -0.6875, 1.5625, -0.434375, -1.528125, 1.9625, -0.1875, 0.21875, -0.03125,
        ],
    );
    // de = p g of the expert that ran: 1/2 (1, 2), 3/4 (2, 0), 1/2 (−1, 1).
    assert_close(&found.de, &[0.5, 1.0, 1.5, 0.0, -0.5, 0.5]);
}

#[test]
fn without_pass_forward_the_output_is_that_of_topk_and_the_gradient_stays_dense() {
    let found = worked(DefaultMoe {
        pass_forward: false,
        ..half()
    });
    // y_t = p e of the chosen expert.
    assert_close(&found.y, &[2.0, 0.0, 0.0, 4.0, 0.0, 6.0]);
    assert_close(&found.dz, &worked(half()).dz);
}

const TOKENS: usize = 40;
const EXPERTS: usize = 4;
const HIDDEN: usize = 8;

/// A model in f64 whose default vectors are sampled anew in every step: β = 0.
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

/// ê `[E, D]` as a training pass of the layer leaves it pending.
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

/// Mean of each expert's outputs over the tokens that did not choose it (K = 1), weighted by p or all alike, in plain loops.
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
fn sampled_vectors_average_over_draws_to_the_mean_over_tokens_that_did_not_choose() {
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
fn a_sample_of_every_token_is_the_mean_itself() {
    // Each token is drawn by its share, to within one in 60,000 of each of its two ends.
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
        // With β = 0 the same draws give the mean alone.
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
fn passes_that_may_not_change_state_draw_nothing() {
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
fn what_cannot_be_sampled_is_refused_with_what_can() {
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
fn a_constant_factor_scales_the_vectors_where_they_are_used_alone() {
    let found = worked(DefaultMoe {
        shrink: Shrink::Constant(0.5),
        ..half()
    });
    // ê itself is as without; y_0 = 1/2 (4, 0) + 1/2 (1/4 (1, 1) + 1/4 (0, 6)), and so on.
    let plain = worked(half());
    assert_close(&found.vectors, &plain.vectors);
    assert_close(&found.y, &[2.125, 0.875, 0.3, 4.3375, 0.0625, 6.4375]);
    // Token 0: s = (4, 3/2, 6), Σ p s = 3.875. Token 1: s = (0.3, 0, 8), Σ = 4.0375. Token 2: s = (0, 1, 0), Σ = 0.125.
    let dz = [
        0.0625, -0.59375, 0.53125, -0.4671875, -1.5140625, 1.98125, -0.09375, 0.109375, -0.015625,
    ];
    assert_close(&found.dz, &dz);
    assert_close(&found.de, &plain.de);
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
            // The same draws with β = 0 are the means alone.
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
fn renormalised_gates_worked_by_hand() {
    let found = worked(DefaultMoe {
        renormalize: true,
        ..half()
    });
    // q = p over its chosen: (1, 1/2, 1/2), (1/4, 3/4, 1), (1, 1/6, 1/6); ê is weighted by p, as without.
    assert_close(&found.vectors, &worked(half()).vectors);
    // y_0 = (4, 0) + 1/2 (1, 1) + 1/2 (0, 6), y_1 = 1/4 (1.8, 2.4) + 3/4 (1, 1) + (0, 8), y_2 = (0, 8) + 1/6 (1, 1) + 1/6 (0, 6).
    assert_close(&found.y, &[4.5, 3.5, 1.2, 9.35, 1.0 / 6.0, 8.0 + 7.0 / 6.0]);
    // s as without: (4, 3, 12), (0.6, 0, 8), (0, 2, 0); Σ q s = 11.5, 8.15, 1/3; dz_j = q_j (s_j − 1[j∈A] Σ q s).
    let dz = [-7.5, 1.5, 6.0, 0.15, 0.0, -0.15, -1.0 / 3.0, 1.0 / 3.0, 0.0];
    assert_close(&found.dz, &dz);
    assert_close(&found.de, &[1.0, 2.0, 2.0, 0.0, -1.0, 1.0]);
}

#[test]
fn renormalisation_on_a_device_with_kernels_is_refused_with_what_runs() {
    let mut layers = Layers::preset("tiny");
    layers.set = vec!["router.renormalize=true".into(), "train.device=sim".into()];
    let config = Config::load(&layers, &crate::routers::resolve).unwrap();
    let error = Model::new(&config).err().unwrap().to_string();
    assert!(
        error.contains("router.renormalize") && error.contains("\"cpu\""),
        "{error}"
    );
}
