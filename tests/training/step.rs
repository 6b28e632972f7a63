//! The optimizer step: recomputation and micro-batches change nothing, a refused step leaves no trace.

use routegrad::config::{Config, Layers};
use routegrad::model::batch::Batch;
use routegrad::model::{Model, Weights};
use routegrad::routers::{self, Pass, Phase, ROUTERS};
use routegrad::tape::Tape;
use routegrad::train::step::{StepExecutor, StepReport};

const LENGTH: usize = 12;
const SEQUENCES: usize = 4;
/// Default vectors from tokens that did not choose an expert.
const SAMPLED: &str = "router.source=sampled";

fn config(router: &str, set: &[&str]) -> Config {
    let mut layers = Layers::preset("tiny");
    let small = [
        "model.hidden=16",
        "model.heads=2",
        "model.layers=3",
        "model.expert_ffn_width=24",
        "model.dense_ffn_width=24",
        "model.sequence_length=12",
        "train.dtype=\"f64\"",
    ];
    layers.set = small.iter().chain(set).map(|s| s.to_string()).collect();
    layers.set.push(format!("router.name=\"{router}\""));
    Config::load(&layers, &routers::resolve).unwrap()
}

fn batch() -> Batch {
    let tokens = (0..SEQUENCES * (LENGTH + 1)).map(|i| (i * i * 7 + 3 * i) as i32 % 256);
    Batch {
        tokens: tokens.collect(),
        sequences: SEQUENCES,
        first_key: None,
    }
}

/// One step in `micro_batches` parts: the report, all weights and all state behind it.
fn step(config: &Config, micro_batches: usize) -> (StepReport, Vec<f64>, Vec<f64>) {
    let mut model = Model::new(config).unwrap();
    let mut trainer = StepExecutor::new(&config.train, &model);
    let batch = batch();
    let parts: Vec<_> = batch.chunks(SEQUENCES / micro_batches).collect();
    let report = trainer.step(&mut model, &parts, 1e-3).unwrap();
    (report, weights(&model), state(&model))
}

fn weights(model: &Model) -> Vec<f64> {
    model
        .parameters
        .iter()
        .flat_map(|p| p.value.to_f64().unwrap())
        .collect()
}

fn state(model: &Model) -> Vec<f64> {
    let states = model.layer_states();
    states
        .iter()
        .flat_map(|s| {
            s.tensors()
                .flat_map(|(_, t)| t.to_f64().unwrap())
                .collect::<Vec<_>>()
        })
        .collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()))
}

#[test]
fn recomputed_layers_give_the_same_bytes() {
    let all = ROUTERS.iter().map(|router| (router.name, vec![]));
    for (router, set) in all.chain([("default", vec![SAMPLED])]) {
        let plain = step(&config(router, &set), 2);
        for recompute in ["train.recompute=true", "train.recompute=[1]"] {
            let again = step(&config(router, &[&set[..], &[recompute]].concat()), 2);
            let case = format!("{router} {set:?} with {recompute}");
            assert!(plain.1 == again.1, "weights of {case}");
            assert!(plain.2 == again.2, "state of {case}");
            assert_eq!(plain.0.layers, again.0.layers, "counted twice by {case}");
        }
    }
}

#[test]
fn sampled_vectors_are_others_and_follow_seed_step_and_layer() {
    let state_of = |set: &[&str]| step(&config("default", set), 1).2;
    let sampled = state_of(&[SAMPLED]);
    assert!(sampled == state_of(&[SAMPLED]));
    assert!(sampled != state_of(&[]));
    assert!(sampled != state_of(&[SAMPLED, "router.samples=17"]));
    assert!(sampled.iter().all(|v| v.is_finite()) && sampled.iter().any(|v| *v != 0.0));
}

#[test]
fn micro_batches_give_the_gradient_of_the_whole_batch() {
    // Without the auxiliary loss, whose fractions depend on the micro-batch by design.
    // Draws belong to a token's place in the global batch, however it is cut.
    for router in ["topk", "dense", "densemixer", "sparsemixer", "lossfree"] {
        let config = config(router, &["balance.aux_coefficient=0"]);
        let whole = step(&config, 1);
        for n in [2, 4] {
            let parts = step(&config, n);
            assert!(
                distance(&whole.1, &parts.1) <= 1e-9,
                "{router} in {n} parts"
            );
            assert!(whole.2 == parts.2, "state of {router} in {n} parts");
            assert!((whole.0.cross_entropy - parts.0.cross_entropy).abs() <= 1e-12);
            assert!((whole.0.gradient_norm / parts.0.gradient_norm - 1.0).abs() <= 1e-12);
        }
    }
}

#[test]
fn the_decay_of_default_vectors_is_per_step_and_not_per_micro_batch() {
    // From a start of ones and with experts that answer nothing, ê decays by β a step for every
    // expert that all micro-batches chose: dense routing by K = E chooses all.
    let set = [
        "model.num_experts=2",
        "model.top_k=2",
        "router.beta=0.25",
        "router.init_std=1",
    ];
    let config = config("default", &set);
    for n in [1, 2, 4] {
        let mut model = Model::new(&config).unwrap();
        for p in model
            .parameters
            .iter_mut()
            .filter(|p| p.name.ends_with("down_proj"))
        {
            p.value.change(|w| w.slice_mut::<f64>().fill(0.0));
        }
        let before = state(&model);
        let mut trainer = StepExecutor::new(&config.train, &model);
        let batch = batch();
        let parts: Vec<_> = batch.chunks(SEQUENCES / n).collect();
        trainer.step(&mut model, &parts, 0.0).unwrap();
        let expected: Vec<f64> = before.iter().map(|x| 0.25 * x).collect();
        assert!(
            distance(&state(&model), &expected) <= 1e-15,
            "{n} micro-batches"
        );
    }
}

#[test]
fn a_step_that_is_not_finite_names_the_place_and_leaves_no_trace() {
    for router in ROUTERS {
        refuses_and_leaves_no_trace(router.name, &[]);
    }
    refuses_and_leaves_no_trace("default", &[SAMPLED]);
}

fn refuses_and_leaves_no_trace(router: &str, set: &[&str]) {
    let config = config(router, set);
    let mut model = Model::new(&config).unwrap();
    let mut trainer = StepExecutor::new(&config.train, &model);
    let batch = batch();
    let tokens = &batch.tokens;
    trainer.step(&mut model, &[batch.all()], 1e-3).unwrap();
    let (weights_before, state_before) = (weights(&model), state(&model));

    // A byte of the last sequence alone is poisoned: NaN reaches the router there first.
    let last = (SEQUENCES - 1) * (LENGTH + 1);
    let poisoned = tokens[last..last + LENGTH]
        .iter()
        .find(|t| !tokens[..last].contains(t));
    let poisoned = *poisoned.unwrap() as usize;
    let kept = model.parameters[0].value.clone();
    let embedding = &mut model.parameters[0].value;
    embedding.change(|w| w.slice_mut::<f64>()[poisoned * 16] = f64::NAN);
    let report = trainer.step(&mut model, &[batch.all()], 1e-3).unwrap();
    let refused = report.skipped.unwrap();
    let token = refused
        .strip_prefix("router logits of MoE layer 0, token ")
        .unwrap();
    let sequence = token.parse::<usize>().unwrap() / LENGTH;
    assert_eq!(sequence, SEQUENCES - 1, "{router}: {refused}");
    assert_eq!(trainer.optimizer.steps(), 1);
    model.parameters[0].value = kept;
    assert!(weights(&model) == weights_before, "{router}");
    assert!(state(&model) == state_before, "{router}");

    let report = trainer.step(&mut model, &[batch.all()], 1e-3).unwrap();
    assert!(report.skipped.is_none() && trainer.optimizer.steps() == 2);
    // What has state changes it in an accepted step.
    assert!(
        state_before.is_empty() || state(&model) != state_before,
        "{router}"
    );
}

#[test]
fn weights_of_another_model_and_choices_of_another_batch_are_refused() {
    let model = Model::new(&config("topk", &[])).unwrap();
    let batch = batch();
    let loss = |weights: &Weights| {
        let sequences = batch.all();
        let losses = model.loss(&Tape::new(), weights, sequences, Pass::single(Phase::Train));
        losses.map(drop).map_err(|e| e.to_string())
    };
    loss(&model.weights()).unwrap();
    for set in ["model.layers=2", "model.expert_ffn_width=32"] {
        let other = Model::new(&config("topk", &[set])).unwrap();
        let error = loss(&other.weights()).unwrap_err();
        assert!(error.contains("weights of this model"), "{set}: {error}");
    }
    for state in model.layer_states_mut().iter_mut() {
        state.record();
    }
    loss(&model.weights()).unwrap();
    let choices = model.layer_states_mut()[0].take_record();
    model.layer_states_mut()[0].replay(&choices);
    let half = batch.chunks(SEQUENCES / 2).next().unwrap();
    let losses = model.loss(
        &Tape::new(),
        &model.weights(),
        half,
        Pass::single(Phase::Train),
    );
    let error = losses.map(drop).unwrap_err().to_string();
    assert!(error.contains("choices to replay"), "{error}");
}
