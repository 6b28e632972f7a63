//! One MoE layer with every router against numbers from a PyTorch script that shares no code with
//! this project (tests/fixtures/routers.py): outputs, balance losses, all gradients, state, draws.

use routegrad::config::{Config, Layers};
use routegrad::model::Model;
use routegrad::routers::{self, Pass, Phase, ROUTERS};
use routegrad::tape::{Gradients, Tape, Var};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::DType;
use serde_json::Value;

/// Relative where numbers are above 1; the fixture has 12 digits.
const TOLERANCE: f64 = 1e-10;

fn numbers(v: &Value) -> Vec<f64> {
    let list = v.as_array().unwrap();
    list.iter().map(|x| x.as_f64().unwrap()).collect()
}

fn size(v: &Value) -> usize {
    v.as_u64().unwrap() as usize
}

/// A model of one MoE layer with the fixture's weights and state.
fn model(fixture: &Value, case: &Value) -> Model {
    let mut layers = Layers::preset("tiny");
    layers.set = [
        "model.vocab_size=11",
        "model.heads=2",
        "model.head_dim=2",
        "model.layers=1",
        "model.dense_layers=[]",
        "model.sequence_length=8",
        "train.dtype=\"f64\"",
        "balance.aux_coefficient=1",
        "balance.z_coefficient=0",
    ]
    .map(String::from)
    .to_vec();
    for (key, value) in [
        ("model.hidden", &fixture["hidden"]),
        ("model.num_experts", &fixture["experts"]),
        ("model.expert_ffn_width", &fixture["width"]),
        ("train.seed", &fixture["seed"]),
        ("model.top_k", &case["top_k"]),
        ("router.name", &case["router"]),
    ] {
        layers.set.push(format!("{key}={value}"));
    }
    for (key, value) in case["settings"].as_object().unwrap() {
        layers.set.push(format!("router.{key}={value}"));
    }
    let config = Config::load(&layers, &routers::resolve).unwrap();
    let mut model = Model::new(&config).unwrap();
    for p in &mut model.parameters {
        if let Some(field) = field(&p.name) {
            let values = numbers(&fixture["shared"][field]);
            p.value
                .change(|w| w.slice_mut::<f64>().copy_from_slice(&values));
        }
    }
    for (name, field) in [
        ("default_vectors", "default_vectors"),
        ("gate.e_score_correction_bias", "bias"),
    ] {
        let mut states = model.layer_states_mut();
        let shape = states[0].tensors().find(|(n, _)| *n == name);
        if let Some(shape) = shape.map(|(_, t)| t.shape()) {
            let values = numbers(&fixture["shared"][field]);
            let tensor = Tensor::from_slice(shape, &values);
            assert!(states[0].restore(name, tensor).unwrap());
        }
    }
    model
}

/// The fixture's name of a parameter.
fn field(parameter: &str) -> Option<&'static str> {
    match parameter.strip_prefix("model.layers.0.mlp.")? {
        "gate.weight" => Some("router"),
        "experts.gate_up_proj" => Some("gate_up"),
        "experts.down_proj" => Some("down"),
        "omega" => Some("omega"),
        other => panic!("unknown parameter {other}"),
    }
}

fn assert_close(case: &str, what: &str, found: &[f64], expected: &Value) {
    let expected = numbers(expected);
    assert_eq!(found.len(), expected.len(), "{case}: {what}");
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        assert!(
            (f - e).abs() <= TOLERANCE * e.abs().max(1.0),
            "{case}: {what}[{i}] is {f}, not {e}"
        );
    }
}

fn check(fixture: &Value, case: &Value) {
    let name = format!("{} {} {}", case["router"], case["top_k"], case["settings"]);
    let model = model(fixture, case);
    let shape = [size(&fixture["tokens"]), size(&fixture["hidden"])];
    let tensor = |field: &str| Tensor::from_slice(shape, &numbers(&fixture["shared"][field]));
    let weights = model.weights();
    let x = Var::leaf(tensor("x"), weights.len());
    assert_eq!(x.tensor().dtype(), DType::F64);

    let tape = Tape::without_gradients();
    let (y, _) = model
        .moe_layer(0, &tape, &weights, &x, Pass::EVALUATE)
        .unwrap();
    assert_close(
        &name,
        "evaluated",
        &y.tensor().to_f64().unwrap(),
        &case["evaluated"],
    );

    let pass = Pass {
        phase: Phase::Train,
        micro_batches: 1,
        step: fixture["step"].as_u64().unwrap(),
        first_token: fixture["first_token"].as_u64().unwrap(),
    };
    let tape = Tape::new();
    let (y, losses) = model.moe_layer(0, &tape, &weights, &x, pass).unwrap();
    assert_close(&name, "y", &y.tensor().to_f64().unwrap(), &case["y"]);
    let mut incoming = vec![(&y, tensor("dy"))];
    assert_eq!(
        losses.len(),
        usize::from(case.get("auxiliary").is_some()),
        "{name}"
    );
    for loss in &losses {
        let (found, expected) = (loss.tensor().item().unwrap(), &case["auxiliary"]);
        assert!(
            (found - expected.as_f64().unwrap()).abs() <= TOLERANCE,
            "{name}: {found}"
        );
        incoming.push((loss, Tensor::scalar(fixture["daux"].as_f64().unwrap())));
    }
    let mut store = Gradients::new(weights.len() + 1);
    tape.backward_from(&incoming, &mut store).unwrap();
    let gradient = |leaf| store.get(leaf).unwrap().to_f64().unwrap();
    assert_close(&name, "dx", &gradient(weights.len()), &case["dx"]);
    for (i, p) in model.parameters.iter().enumerate() {
        if let Some(field) = field(&p.name) {
            assert_close(&name, field, &gradient(i), &case[format!("d{field}")]);
        }
    }

    model.end_step().unwrap();
    let mut states = model.layer_states_mut();
    states[0].commit();
    for (name_of_state, tensor) in states[0].tensors() {
        let values = tensor.to_f64().unwrap();
        match name_of_state {
            "default_vectors" => assert_close(&name, "vectors", &values, &case["vectors"]),
            "gate.e_score_correction_bias" => {
                assert_close(&name, "bias", &values, &case["next_bias"]);
            }
            _ => {}
        }
    }
}

#[test]
fn every_router_agrees_with_an_independent_layer() {
    let fixture: Value = serde_json::from_str(include_str!("../fixtures/routers.json")).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    for router in ROUTERS {
        let own = cases.iter().filter(|c| c["router"] == router.name);
        assert!(own.count() > 0, "{} has no case", router.name);
    }
    // Samples of both kinds, and a token without experts, are among what is compared.
    let untrusted = |c: &&Value| c["router"] == "sparsemixer";
    for case in cases.iter().filter(untrusted) {
        assert!(size(&case["untrusted"]) > 0);
    }
    let remoe = cases.iter().find(|c| c["router"] == "remoe").unwrap();
    let width = size(&fixture["hidden"]);
    assert!(
        numbers(&remoe["y"])
            .chunks(width)
            .any(|y| y.iter().all(|y| *y == 0.0))
    );
    cases.iter().for_each(|case| check(&fixture, case));
}
