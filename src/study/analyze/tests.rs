//! Compares the analyses with plain loops over the formulas, and tests the report where an analysis does not apply.

#[path = "estimators_tests.rs"]
mod estimators;

use super::gradients::{MicroBatches, cosine, gradient_error, router_gradients};
use super::probe::Watched;
use super::{Report, analyze};
use crate::config::{Config, Layers};
use crate::data::Corpus;
use crate::dist::SingleRank;
use crate::model::Model;
use crate::model::batch::{Batch, Sequences};
use crate::routers::dense::Dense;
use crate::routers::{self, Pass, Phase, Router};
use crate::tape::check::normal_numbers;
use crate::tape::{Gradients, Tape};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;

const EXPERTS: usize = 4;
const HIDDEN: usize = 16;
const SEQUENCES: usize = 2;
const LENGTH: usize = 16;

/// Two layers, one of them MoE.
fn micro(router: &str, set: &[&str]) -> Config {
    let mut layers = Layers::preset("tiny");
    layers.set = vec![
        format!("router.name=\"{router}\""),
        format!("model.hidden={HIDDEN}"),
        format!("model.num_experts={EXPERTS}"),
        "model.layers=2".into(),
        "model.heads=2".into(),
        "model.sequence_length=16".into(),
        "train.sequences_per_step=2".into(),
        "train.micro_batch=2".into(),
    ];
    layers.set.extend(set.iter().map(|s| s.to_string()));
    Config::load(&layers, &routers::resolve).unwrap()
}

fn parameter(model: &Model, suffix: &str) -> Vec<f64> {
    let found = model.parameters.iter().find(|p| p.name.ends_with(suffix));
    found.unwrap().value.to_f64().unwrap()
}

/// A row-major matrix times a vector.
fn times(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    let row = |r: &[f64]| r.iter().zip(x).map(|(a, b)| a * b).sum();
    matrix.chunks(x.len()).map(row).collect()
}

fn tokens(step: i32) -> Vec<i32> {
    let count = (SEQUENCES * (LENGTH + 1)) as i32;
    (0..count).map(|i| (i * i + step * i) % 256).collect()
}

fn batch(step: i32) -> MicroBatches {
    MicroBatches {
        all: Batch {
            tokens: tokens(step),
            sequences: SEQUENCES,
            first_key: None,
        },
        // Two micro-batches, so that sums over them are checked.
        micro_batch: 1,
    }
}

/// Input and incoming gradient of one MoE layer, `[T, D]` each.
struct At {
    x: Vec<f64>,
    g: Vec<f64>,
}

/// Returns x and g of a pass of `router` over these tokens.
fn at(
    config: &Config,
    model: &Model,
    vectors: &Tensor,
    tokens: &[i32],
    router: Box<dyn Router>,
) -> At {
    let watched = Watched::new(config, router, model).unwrap();
    for state in watched.model.layer_states_mut().iter_mut() {
        state.restore("default_vectors", vectors.clone()).unwrap();
    }
    let (tape, model) = (Tape::new(), &watched.model);
    let sequences = Sequences::new(tokens, SEQUENCES);
    let losses = model.loss(
        &tape,
        &model.weights(),
        sequences,
        Pass::single(Phase::Frozen),
    );
    let losses = losses.unwrap();
    let mut store = Gradients::new(watched.slots());
    tape.backward(&losses.total, 1.0, &mut store).unwrap();
    At {
        x: watched.take()[0].x.to_f64().unwrap(),
        g: store.get(watched.slot(0)).unwrap().to_f64().unwrap(),
    }
}

/// Returns p `[E]`, which experts are chosen, and the outputs e `[E][D]`, of one token.
fn token(model: &Model, x: &[f64], top_k: usize) -> (Vec<f64>, Vec<bool>, Vec<Vec<f64>>) {
    let z = times(&parameter(model, "gate.weight"), x);
    let total: f64 = z.iter().map(|z| z.exp()).sum();
    let rank = |j: usize| z.iter().filter(|other| **other > z[j]).count();
    let outputs = (0..EXPERTS).map(|e| {
        let part = |m: Vec<f64>| m[e * m.len() / EXPERTS..(e + 1) * m.len() / EXPERTS].to_vec();
        let h = times(&part(parameter(model, "experts.gate_up_proj")), x);
        let (gate, up) = h.split_at(h.len() / 2);
        let pairs = gate.iter().zip(up);
        let a: Vec<f64> = pairs.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        times(&part(parameter(model, "experts.down_proj")), &a)
    });
    (
        z.iter().map(|z| z.exp() / total).collect(),
        (0..EXPERTS).map(|j| rank(j) < top_k).collect(),
        outputs.collect(),
    )
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Returns s of an expert outside A, given a token, the incoming gradient, the expert and its output.
type Off<'a> = dyn Fn(&[f64], &[f64], usize, &[f64]) -> f64 + 'a;

/// Returns dz `[T, E]` and dW `[E, D]`, with s outside A given by `off`.
fn gradients(model: &Model, at: &At, top_k: usize, off: &Off) -> [Vec<f64>; 2] {
    let (mut dz, mut dw) = (Vec::new(), vec![0.0; EXPERTS * HIDDEN]);
    for (x, g) in at.x.chunks(HIDDEN).zip(at.g.chunks(HIDDEN)) {
        let (p, chosen, outputs) = token(model, x, top_k);
        let s: Vec<f64> = (0..EXPERTS)
            .map(|i| match chosen[i] {
                true => dot(g, &outputs[i]),
                false => off(x, g, i, &outputs[i]),
            })
            .collect();
        let mean = dot(&p, &s);
        for (i, (p, s)) in p.iter().zip(&s).enumerate() {
            let d = p * (s - mean);
            dz.push(d);
            (0..HIDDEN).for_each(|c| dw[i * HIDDEN + c] += d * x[c]);
        }
    }
    [dz, dw]
}

/// Returns the cosine with the exact gradient and the relative error.
fn quality(found: &[f64], exact: &[f64]) -> [f64; 2] {
    let norm = dot(exact, exact).sqrt();
    let missed: f64 = found.iter().zip(exact).map(|(f, e)| (f - e).powi(2)).sum();
    [
        dot(found, exact) / (dot(found, found).sqrt() * norm),
        missed.sqrt() / norm,
    ]
}

fn small_vectors() -> Tensor {
    let vectors = normal_numbers(EXPERTS * HIDDEN, 3);
    let vectors: Vec<f64> = vectors.into_iter().map(|x| 0.01 * x).collect();
    Tensor::from_slice([EXPERTS, HIDDEN], &vectors)
}

#[test]
fn router_gradients_and_their_errors_are_those_of_the_formulas_in_plain_loops() {
    let config = micro("default", &["train.dtype=\"f64\"", "model.top_k=2"]);
    let model = Model::new(&config).unwrap();
    assert_eq!(model.dtype(), DType::F64);
    let vectors = small_vectors();
    let (tensors, flat) = ([vectors.clone()], vectors.to_f64().unwrap());
    let errors = gradient_error(&SingleRank, &config, &model, &tensors, &batch(5)).unwrap();
    let topk = || routers::build(&micro("topk", &[]).router).unwrap();
    let default = || routers::build(&config.router).unwrap();
    let dense = || -> Box<dyn Router> { Box::new(Dense {}) };
    let exact: &Off = &|_, g, _, e| dot(g, e);
    let routers: [&dyn Fn() -> Box<dyn Router>; 3] = [&topk, &default, &dense];
    let vector = |i: usize| &flat[i * HIDDEN..(i + 1) * HIDDEN];
    let offs: [&Off; 3] = [&|_, _, _, _| 0.0, &|_, g, i, _| dot(g, vector(i)), exact];
    for (i, (router, off)) in routers.into_iter().zip(offs).enumerate() {
        let here = at(&config, &model, &vectors, &tokens(5), router());
        let [dz, dw] = gradients(&model, &here, 2, off);
        let found = router_gradients(&config, &model, &tensors, router(), 2, &batch(5)).unwrap();
        assert!(quality(&found[0], &dw)[1] <= 1e-10);
        if let Some(error) = errors.get(i) {
            let [full, _] = gradients(&model, &here, 2, exact);
            let expected = quality(&dz, &full)[1];
            assert!(expected > 0.01);
            assert!((error[0].unwrap() / expected - 1.0).abs() <= 1e-10);
        }
    }
    assert_eq!(errors.len(), 2);
}

#[test]
fn cosines_worked_by_hand() {
    assert_eq!(cosine(&[3.0, 4.0], &[4.0, 3.0]), Some(0.96));
    assert_eq!(cosine(&[1.0, 0.0], &[0.0, 0.0]), None);
}

fn report(config: &Config, model: &Model) -> Report {
    let corpus = Corpus::load(&config.data, &config.model, config.train.seed).unwrap();
    analyze(config, model, &corpus, 3, 2).unwrap()
}

#[test]
fn a_router_with_zero_weights_has_the_entropy_ln_e_and_chooses_the_first_expert() {
    let config = micro("topk", &[]);
    let mut model = Model::new(&config).unwrap();
    for p in &mut model.parameters {
        if p.name.ends_with("gate.weight") {
            p.value.change(|w| w.slice_mut::<f32>().fill(0.0));
        }
    }
    let report = report(&config, &model);
    let json = serde_json::to_value(&report).unwrap();
    let rows = |i: usize| {
        let rows = &json["analyses"][i]["table"]["rows"];
        rows.as_array().unwrap()
    };
    let entropy = rows(0)[0][1].as_f64().unwrap();
    assert!((entropy - (EXPERTS as f64).ln()).abs() <= 1e-6, "{entropy}");
    let shares: Vec<f64> = rows(3).iter().map(|r| r[3].as_f64().unwrap()).collect();
    assert_eq!(shares, [1.0, 0.0, 0.0, 0.0]);
    // Two sequences of 16 tokens from each of 12 groups of documents.
    assert_eq!(rows(5).len(), 12 * EXPERTS);
    assert_eq!((&rows(5)[0][3], &rows(5)[0][4]), (&32.into(), &1.0.into()));
    for name in [
        "default-vector-similarity",
        "co-activation",
        "default-vector-distance",
    ] {
        let analysis = report.get(name).unwrap();
        assert!(analysis.notes[0].starts_with("Does not apply"), "{name}");
        assert!(analysis.table.rows.is_empty() && analysis.figure.is_none());
    }
    let filled = &report.get("gradient-error").unwrap().notes[0];
    assert!(filled.contains("computed from 64"), "{filled}");
    // K = 1, 2, 3 of both methods.
    assert_eq!(rows(2).len(), 6);
}

#[test]
fn the_same_report_for_any_number_of_threads() {
    let texts = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let config = micro("default", &["model.top_k=2", "router.init_std=0.1"]);
            let report = report(&config, &Model::new(&config).unwrap());
            let mut all = report.analyses.iter();
            assert!(all.all(|a| !a.table.rows.is_empty() && a.figure.is_some()));
            let figures: Vec<_> = report.analyses.iter().map(|a| a.figure.clone()).collect();
            (serde_json::to_string(&report).unwrap(), figures)
        })
    });
    assert!(texts[0] == texts[1]);
    assert!(!texts[0].1.iter().flatten().any(|svg| svg.contains("NaN")));
}

#[test]
fn zero_sequences_are_refused() {
    let config = micro("topk", &[]);
    let model = Model::new(&config).unwrap();
    let corpus = Corpus::load(&config.data, &config.model, 0).unwrap();
    let error = analyze(&config, &model, &corpus, 0, 0).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("1 sequence or more"), "{error}");
}
