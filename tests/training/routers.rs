//! What the routers promise over many steps, and at their edges.

use routegrad::config::{Config, Layers};
use routegrad::device::Device;
use routegrad::model::Model;
use routegrad::model::batch::Sequences;
use routegrad::routers::{self, Pass, Phase};
use routegrad::tape::{Gradients, Tape, Var};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::Element;
use routegrad::tensor::random::{Purpose, Stream};
use routegrad::train::step::StepExecutor;

fn config(router: &str, set: &[&str]) -> Config {
    let mut layers = Layers::preset("tiny");
    let small = [
        "model.hidden=16",
        "model.heads=2",
        "model.head_dim=8",
        "model.expert_ffn_width=8",
        "model.dense_ffn_width=8",
        "model.layers=2",
        "model.sequence_length=32",
    ];
    layers.set = small.iter().chain(set).map(|s| s.to_string()).collect();
    layers.set.push(format!("router.name=\"{router}\""));
    Config::load(&layers, &routers::resolve).unwrap()
}

/// Changes the numbers of the first parameter whose name ends so.
fn change<T: Element>(model: &mut Model, end: &str, f: impl FnOnce(&mut [T])) {
    let mut all = model.parameters.iter_mut();
    let value = &mut all.find(|p| p.name.ends_with(end)).unwrap().value;
    value.change(|w| f(w.slice_mut()));
}

fn variation(counts: &[f64]) -> f64 {
    let mean = counts.iter().sum::<f64>() / counts.len() as f64;
    let squares: f64 = counts.iter().map(|c| (c - mean).powi(2)).sum();
    (squares / counts.len() as f64).sqrt() / mean
}

/// Steps at learning rate 0 on new tokens each: only the bias moves. The variation of the load
/// among the eight experts at every step.
fn variations(set: &[&str], steps: u64) -> Vec<f64> {
    const SEQUENCES: usize = 64;
    let set: Vec<&str> = ["model.norm=\"layernorm\""]
        .iter()
        .chain(set)
        .copied()
        .collect();
    let config = config("lossfree", &set);
    let mut model = Model::new(&config).unwrap();
    // Every token has the same large first coordinate, by which the router prefers some experts.
    let bias = "layers.1.post_attention_layernorm.bias";
    change(&mut model, bias, |bias: &mut [f32]| bias[0] = 4.0);
    change(&mut model, "gate.weight", |router: &mut [f32]| {
        for (expert, row) in router.chunks_mut(16).enumerate() {
            row[0] = 0.08 * expert as f32;
        }
    });
    let mut trainer = StepExecutor::new(&config.train, &model);
    let width = config.model.sequence_length + 1;
    (0..steps)
        .map(|step| {
            let stream = Stream::new(5, Purpose::Check, step, 0);
            let tokens: Vec<i32> = (0..(SEQUENCES * width) as u64)
                .map(|i| (stream.uniform(i) * 256.0) as i32)
                .collect();
            let report = trainer
                .step(&mut model, &[Sequences::new(&tokens, SEQUENCES)], 0.0)
                .unwrap();
            variation(&report.layers[0].counts)
        })
        .collect()
}

#[test]
#[ignore = "slow"]
fn loss_free_balancing_evens_a_skewed_load_within_500_steps() {
    for set in [&[][..], &["router.score=\"softmax\""], &["model.top_k=2"]] {
        let found = variations(set, 500);
        assert!(found[0] >= 1.0, "{set:?} begins at {}", found[0]);
        let steps = found.iter().position(|v| *v < 0.1);
        println!(
            "{set:?}: variation {:.2} at first, below 0.1 after {steps:?} steps, {:.3} on average \
             over the last 100",
            found[0],
            found[400..].iter().sum::<f64>() / 100.0
        );
        assert!(steps.is_some(), "{set:?} ends at {}", found[499]);
    }
}

/// Loss gradients of all parameters with the given bias of the first layer.
fn gradients_with_bias(bias: [f64; 8]) -> (Vec<Vec<f64>>, Vec<i32>) {
    let config = config("lossfree", &["train.dtype=\"f64\""]);
    let model = Model::new(&config).unwrap();
    let name = "gate.e_score_correction_bias";
    let tensor = Tensor::from_slice([8], &bias);
    assert!(model.layer_states_mut()[0].restore(name, tensor).unwrap());
    let tokens: Vec<i32> = (0..66).map(|i| i * i % 251).collect();
    let (tape, weights) = (Tape::new(), model.weights());
    let pass = Pass::single(Phase::Train);
    model.layer_states_mut()[0].record();
    let losses = model
        .loss(&tape, &weights, Sequences::new(&tokens, 2), pass)
        .unwrap();
    let mut store = Gradients::new(weights.len());
    tape.backward(&losses.total, 1.0, &mut store).unwrap();
    let gradients = (0..weights.len()).map(|i| store.get(i).unwrap().to_f64().unwrap());
    let selection = &model.layer_states_mut()[0].take_record()[0];
    let chosen = (0..64).flat_map(|t| selection.experts(t).to_vec());
    (gradients.collect(), chosen.collect())
}

#[test]
fn the_bias_of_loss_free_balancing_changes_the_choice_and_nothing_else() {
    let plain = gradients_with_bias([0.0; 8]);
    // A bias that all experts share changes no choice, and then not a byte of any gradient.
    assert!(plain == gradients_with_bias([0.25; 8]));
    let mut skewed = [0.0; 8];
    skewed[3] = 1.0;
    let (gradients, chosen) = gradients_with_bias(skewed);
    assert!(chosen.iter().all(|e| *e == 3));
    assert!(gradients != plain.0);
}

#[test]
fn a_layer_of_remoe_without_any_expert_gives_zeros_and_trains_on() {
    let config = config("remoe", &["train.dtype=\"f64\""]);
    let mut model = Model::new(&config).unwrap();
    change(&mut model, "gate.weight", |w: &mut [f64]| w.fill(0.0));
    let weights = model.weights();
    let numbers: Vec<f64> = (0..5 * 16).map(|i| (i as f64).sin()).collect();
    let x = Var::leaf(Tensor::from_slice([5, 16], &numbers), weights.len());
    for phase in [Phase::Train, Phase::Frozen, Phase::Evaluate] {
        let tape = Tape::new();
        let pass = Pass::single(phase);
        let (y, losses) = model.moe_layer(0, &tape, &weights, &x, pass).unwrap();
        assert!(y.tensor().slice::<f64>().iter().all(|y| *y == 0.0));
        assert_eq!(losses[0].tensor().item().unwrap(), 0.0);
        let mut store = Gradients::new(weights.len() + 1);
        let g = Tensor::from_slice([5, 16], &numbers);
        tape.backward_from(&[(&y, g)], &mut store).unwrap();
        let dx = store.get(weights.len()).unwrap();
        assert!(dx.slice::<f64>().iter().all(|d| *d == 0.0));
    }
    drop(weights);
    let mut trainer = StepExecutor::new(&config.train, &model);
    let tokens: Vec<i32> = (0..66).map(|i| i * i % 251).collect();
    let report = trainer
        .step(&mut model, &[Sequences::new(&tokens, 2)], 1e-3)
        .unwrap();
    assert!(report.skipped.is_none(), "{report:?}");
    assert_eq!(report.layers[0].counts, [0.0; 8]);
}

#[test]
fn sparsemixer_refuses_more_experts_than_its_version_has() {
    for (set, allowed) in [
        (&["model.top_k=2"][..], true),
        (&["model.top_k=3"], false),
        (&["model.top_k=1", "router.version=\"v1\""], true),
        (&["model.top_k=2", "router.version=\"v1\""], false),
    ] {
        let built = Model::new(&config("sparsemixer", set));
        assert_eq!(built.is_ok(), allowed, "{set:?}");
        if let Err(e) = built {
            assert!(e.to_string().contains("model.top_k"), "{e}");
        }
    }
}

#[test]
fn more_experts_per_token_than_the_kernel_chooses_are_refused_by_the_routers_that_choose_with_it() {
    let experts = ["model.num_experts=32", "model.top_k=17"];
    for (router, allowed) in [
        ("topk", false),
        ("default", false),
        ("densemixer", false),
        ("lossfree", false),
        ("remoe", true),
        ("dense", true),
    ] {
        let config = config(router, &experts);
        let built = routers::build(&config.router).unwrap();
        assert!(built.validate_device(&config.model, Device::Cpu).is_ok());
        let found = built.validate_device(&config.model, Device::Sim);
        assert_eq!(found.is_ok(), allowed, "{router}");
        if let Err(e) = found {
            let expected = "model.top_k: expected at most 16 with this router";
            assert!(e.to_string().contains(expected), "{e}");
        }
    }
}

#[test]
fn weights_that_are_renormalized_are_no_softmax() {
    for router in ["topk", "densemixer", "default"] {
        for renormalize in [false, true] {
            let set = format!("router.renormalize={renormalize}");
            let config = config(router, &["model.top_k=2", &set]);
            let built = routers::build(&config.router).unwrap();
            assert_eq!(built.weighs_by_softmax(), !renormalize, "{router}");
        }
    }
}

#[test]
fn default_vectors_begin_at_zero_or_as_gaussians_of_the_given_spread() {
    for (std, set) in [(0.0, "router.init_std=0"), (0.5, "router.init_std=0.5")] {
        let sets = [set, "model.hidden=512", "train.dtype=\"f64\""];
        let model = Model::new(&config("default", &sets)).unwrap();
        let states = model.layer_states();
        let (name, vectors) = states[0].tensors().next().unwrap();
        assert_eq!(
            (name, &*vectors.shape()),
            ("default_vectors", &[8, 512][..])
        );
        let numbers = vectors.to_f64().unwrap();
        let n = numbers.len() as f64;
        let mean = numbers.iter().sum::<f64>() / n;
        let square = numbers.iter().map(|x| x * x).sum::<f64>() / n;
        // Five standard errors of the mean and of the mean square.
        assert!(mean.abs() <= 5.0 * std / n.sqrt(), "mean {mean}");
        let variance = std * std;
        let tolerance = 5.0 * variance * (2.0 / n).sqrt();
        assert!(
            (square - variance).abs() <= tolerance,
            "mean square {square}"
        );
    }
}

#[test]
fn draws_differ_between_steps_layers_and_seeds_and_not_between_ways_to_cut_a_batch() {
    let tokens: Vec<i32> = (0..4 * 33).map(|i| i * i % 251).collect();
    // The experts of both layers for the whole batch, from passes over parts of it.
    let chosen = |seed: &str, step: u64, parts: usize| -> Vec<Vec<i32>> {
        let sets = ["model.layers=3", "router.epsilon=10", seed];
        let model = Model::new(&config("sparsemixer", &sets)).unwrap();
        // Equal logits everywhere: the draws alone decide.
        let mut weights: Vec<Var> = model.weights().to_vec();
        for (w, p) in weights.iter_mut().zip(&model.parameters) {
            if p.name.ends_with("gate.weight") {
                let zeros = vec![0f32; p.value.elements()];
                *w = Var::constant(Tensor::from_slice(p.value.shape(), &zeros));
            }
        }
        let weights = weights.into();
        let mut layers = vec![Vec::new(); 2];
        for (m, own) in tokens.chunks(tokens.len() / parts).enumerate() {
            let pass = Pass {
                step,
                first_token: (m * 4 / parts * 32) as u64,
                ..Pass::single(Phase::Train)
            };
            let tape = Tape::without_gradients();
            model.layer_states_mut().iter_mut().for_each(|s| s.record());
            model
                .loss(&tape, &weights, Sequences::new(own, 4 / parts), pass)
                .unwrap();
            for (layer, state) in layers.iter_mut().zip(model.layer_states_mut().iter_mut()) {
                let selection = &state.take_record()[0];
                (0..selection.num_tokens()).for_each(|t| layer.extend(selection.experts(t)));
            }
        }
        layers
    };
    let base = chosen("train.seed=0", 0, 1);
    assert!(base == chosen("train.seed=0", 0, 2));
    assert!(base == chosen("train.seed=0", 0, 4));
    assert!(base[0] != base[1]);
    assert!(base != chosen("train.seed=0", 1, 1));
    assert!(base != chosen("train.seed=1", 0, 1));
}
