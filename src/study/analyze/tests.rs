//! Compares the analyses with plain loops over the formulas, and tests the report where an analysis does not apply.

#[path = "estimators_tests.rs"]
mod estimators;

use super::gradients::{Method, MicroBatches, cosine, gradient_error, router_gradients};
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

/// The method's dz `[T, E]` and that of densemixer, by the formulas in plain loops: for token t, `s_i = ⟨g, v_i⟩`, topk
/// `dz_j = p_j (1[j∈A] s_j − Σ_A p_i s_i)`, default `dz_j = p_j (s_j − Σ_all p_i s_i)` with `v_i = ê_i` off A,
/// densemixer with `v_i = e_i` everywhere.
fn logit_gradients(
    model: &Model,
    x: &[f64],
    g: &[f64],
    vectors: &[f64],
    method: Option<Method>,
    top_k: usize,
) -> [Vec<f64>; 2] {
    let router = parameter(model, "gate.weight");
    let gate_up = parameter(model, "experts.gate_up_proj");
    let down = parameter(model, "experts.down_proj");
    let [mut own, mut full] = [Vec::new(), Vec::new()];
    for (x, g) in x.chunks(HIDDEN).zip(g.chunks(HIDDEN)) {
        let z = times(&router, x);
        let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = z.iter().map(|z| (z - most).exp()).sum();
        let p: Vec<f64> = z.iter().map(|z| (z - most).exp() / total).collect();
        let chosen = |j: usize| (0..EXPERTS).filter(|&i| z[i] > z[j]).count() < top_k;
        let outputs: Vec<Vec<f64>> = (0..EXPERTS)
            .map(|e| {
                let part =
                    |m: &[f64]| m[e * m.len() / EXPERTS..(e + 1) * m.len() / EXPERTS].to_vec();
                let h = times(&part(&gate_up), x);
                let (gate, up) = h.split_at(h.len() / 2);
                let a: Vec<f64> = gate
                    .iter()
                    .zip(up)
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                times(&part(&down), &a)
            })
            .collect();
        let dot = |v: &[f64]| v.iter().zip(g).map(|(v, g)| v * g).sum::<f64>();
        let s: Vec<f64> = (0..EXPERTS)
            .map(|i| match method {
                Some(Method::TopK) if !chosen(i) => 0.0,
                Some(Method::Default) if !chosen(i) => dot(&vectors[i * HIDDEN..(i + 1) * HIDDEN]),
                _ => dot(&outputs[i]),
            })
            .collect();
        let all: Vec<f64> = outputs.iter().map(|e| dot(e)).collect();
        for (dz, s) in [(&mut own, s), (&mut full, all)] {
            let mean: f64 = p.iter().zip(&s).map(|(p, s)| p * s).sum();
            dz.extend(p.iter().zip(&s).map(|(p, s)| p * (s - mean)));
        }
    }
    [own, full]
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    let of = norm(&mut expected.iter().copied());
    assert!(of > 0.0 && error <= 1e-10 * of, "{error} of {of}");
}

#[test]
fn router_gradients_and_their_errors_are_those_of_the_formulas_in_plain_loops() {
    let config = micro("default", &["train.dtype=\"f64\"", "model.top_k=2"]);
    let model = Model::new(&config).unwrap();
    let vectors = normal_numbers(EXPERTS * HIDDEN, 3);
    let vectors: Vec<f64> = vectors.into_iter().map(|x| 0.01 * x).collect();
    let tensors = [Tensor::from_slice([EXPERTS, HIDDEN], &vectors)];
    assert_eq!(model.dtype(), DType::F64);
    let tokens: Vec<i32> = (0..SEQUENCES as i32 * 17)
        .map(|i| (i * i + 5 * i) % 256)
        .collect();
    let batch = MicroBatches {
        all: Batch {
            tokens: tokens.clone(),
            sequences: SEQUENCES,
            first_key: None,
        },
        micro_batch: SEQUENCES,
    };
    let errors = gradient_error(&SingleRank, &config, &model, &tensors, &batch).unwrap();
    let cases: [(Option<Method>, Box<dyn Router>); 3] = [
        (
            Some(Method::TopK),
            routers::build(&micro("topk", &[]).router).unwrap(),
        ),
        (
            Some(Method::Default),
            routers::build(&config.router).unwrap(),
        ),
        (None, Box::new(Dense {})),
    ];
    for (i, (method, router)) in cases.into_iter().enumerate() {
        // x and g of a pass of the method, from a separate model.
        let watched = Watched::new(&config, router, &model).unwrap();
        for state in watched.model.layer_states_mut().iter_mut() {
            state
                .restore("default_vectors", tensors[0].clone())
                .unwrap();
        }
        let (tape, weights) = (Tape::new(), watched.model.weights());
        let pass = Pass::single(Phase::Frozen);
        let losses = watched
            .model
            .loss(&tape, &weights, Sequences::new(&tokens, SEQUENCES), pass)
            .unwrap();
        let mut store = Gradients::new(watched.slots());
        tape.backward(&losses.total, 1.0, &mut store).unwrap();
        let x = watched.take()[0].x.to_f64().unwrap();
        let g = store.get(watched.slot(0)).unwrap().to_f64().unwrap();
        let [own, full] = logit_gradients(&model, &x, &g, &vectors, method, 2);

        let mut expected = vec![0.0; EXPERTS * HIDDEN];
        for (dz, x) in own.chunks(EXPERTS).zip(x.chunks(HIDDEN)) {
            for (row, dz) in expected.chunks_mut(HIDDEN).zip(dz) {
                row.iter_mut().zip(x).for_each(|(w, x)| *w += dz * x);
            }
        }
        let router: Box<dyn Router> = match method {
            Some(Method::TopK) => routers::build(&micro("topk", &[]).router).unwrap(),
            Some(Method::Default) => routers::build(&config.router).unwrap(),
            None => Box::new(Dense {}),
        };
        let found = router_gradients(&config, &model, &tensors, router, 2, &batch).unwrap();
        close(&found[0], &expected);
        if method.is_some() {
            let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
            let missed = square(&mut full.iter().zip(&own).map(|(f, o)| f - o));
            let expected = (missed / square(&mut full.iter().copied())).sqrt();
            assert!(expected > 0.01);
            close(&[errors[i][0].unwrap()], &[expected]);
        }
    }
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
        json["analyses"][i]["table"]["rows"]
            .as_array()
            .unwrap()
            .clone()
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
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let config = micro("default", &["model.top_k=2", "router.init_std=0.1"]);
            let report = report(&config, &Model::new(&config).unwrap());
            assert!(
                report
                    .analyses
                    .iter()
                    .all(|a| !a.table.rows.is_empty() && a.figure.is_some())
            );
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
