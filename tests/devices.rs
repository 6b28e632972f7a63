//! The mixture-of-experts layer on the simulator, through the tape, against the CPU device.

use routegrad::check::Fault;
use routegrad::config::{Config, Layers};
use routegrad::device::Device;
use routegrad::device_check::{
    DIRECTIONAL_TOLERANCE, Load, TOLERANCE, compare_layer, compare_step, directional,
};
use routegrad::model::Model;
use routegrad::routers::{self, Pass, Phase};
use routegrad::tape::{Tape, Var, take_ran};
use routegrad::tensor::Tensor;

/// One MoE layer of width 128, its experts of the paper's proportion, 22 D / E.
fn layer(router: &str, experts: usize, top_k: usize, set: &[&str]) -> Config {
    let width = 22 * 128 / experts;
    let own = [
        "model.hidden=128".to_string(),
        "model.layers=1".into(),
        "model.dense_layers=[]".into(),
        format!("model.num_experts={experts}"),
        format!("model.top_k={top_k}"),
        format!("model.expert_ffn_width={width}"),
        format!("model.dense_ffn_width={width}"),
        format!("router.name={router}"),
        "balance.aux_coefficient=0.5".into(),
        "balance.z_coefficient=0.25".into(),
    ];
    let mut layers = Layers::preset("tiny");
    layers.set = own
        .into_iter()
        .chain(set.iter().map(|s| s.to_string()))
        .collect();
    Config::load(&layers, &routers::resolve).unwrap()
}

const SHAPES: [(usize, usize); 5] = [(8, 1), (8, 2), (32, 1), (32, 2), (32, 4)];
const LOADS: [Load; 4] = [Load::Balanced, Load::Zipf, Load::OneHot, Load::OddEmpty];

/// The share of ‖x‖ ‖w_a − w_b‖ that a logit may be off by before the CPU and the kernels choose apart:
/// the inputs are the same bf16 numbers, so it is the rounding of f32 sums.
const MARGIN: f64 = 1e-5;

fn agrees(router: &str, experts: usize, top_k: usize, tokens: usize, load: Load) {
    let config = layer(router, experts, top_k, &[]);
    let found = compare_layer(&config, tokens, load, None).unwrap();
    let (what, difference) = found.worst();
    let case = format!("{router} {experts}c{top_k} T {tokens} {load:?}");
    println!(
        "{case}: worst {difference:.1e} ({what}), flips {}",
        found.flips
    );
    assert!(
        difference <= TOLERANCE,
        "{case}: {what} differs by {difference:.1e}"
    );
    assert!(
        found.largest_margin <= MARGIN,
        "{case}: margin {:.1e}",
        found.largest_margin
    );
    if load == Load::OddEmpty && router != "dense" && tokens > 1 {
        assert!(
            found.counts.iter().skip(1).step_by(2).all(|c| *c == 0),
            "{case}"
        );
    }
    if load == Load::OneHot && router != "dense" {
        assert_eq!(found.counts[experts / 2], tokens, "{case}");
    }
}

fn agrees_everywhere(router: &str) {
    for (experts, top_k) in SHAPES {
        for load in LOADS {
            agrees(router, experts, top_k, 211, load);
        }
        agrees(router, experts, top_k, 1, Load::Balanced);
    }
}

#[test]
fn topk_agrees_with_the_cpu_for_every_shape_and_load() {
    agrees_everywhere("topk");
}

#[test]
fn default_agrees_with_the_cpu_for_every_shape_and_load() {
    agrees_everywhere("default");
}

#[test]
fn dense_agrees_with_the_cpu_for_every_shape() {
    for (experts, top_k) in [(8, 1), (32, 4)] {
        agrees("dense", experts, top_k, 211, Load::Balanced);
        agrees("dense", experts, top_k, 1, Load::Balanced);
    }
}

#[test]
fn every_other_router_agrees_with_the_cpu() {
    for router in routers::ROUTERS {
        if !["topk", "default", "dense"].contains(&router.name) {
            agrees(router.name, 8, 2, 211, Load::Balanced);
        }
    }
}

#[test]
fn every_option_of_default_agrees_with_the_cpu() {
    for set in [
        "router.weighted=false",
        "router.weight_norm=\"count\"",
        "router.pass_forward=false",
        "router.init_std=0.5",
    ] {
        let found = compare_layer(&layer("default", 8, 2, &[set]), 211, Load::Zipf, None).unwrap();
        let (what, difference) = found.worst();
        assert!(
            difference <= TOLERANCE,
            "{set}: {what} differs by {difference:.1e}"
        );
    }
}

#[test]
fn every_missing_term_shows_in_the_layer() {
    for (fault, name) in Fault::ALL {
        let config = layer(router_of(fault), 8, 2, &[]);
        let found = compare_layer(&config, 211, Load::Balanced, Some(fault)).unwrap();
        assert!(!(found.worst().1 <= TOLERANCE), "{name} did not show");
    }
}

/// A router whose backward has the term.
fn router_of(fault: Fault) -> &'static str {
    match fault {
        Fault::SampledOwnTerm => "sparsemixer",
        _ => "default",
    }
}

#[test]
fn directional_derivatives_of_the_layer_agree_with_its_gradients() {
    for router in ["topk", "default", "dense"] {
        for (experts, top_k) in [(8, 1), (32, 4)] {
            for d in directional(&layer(router, experts, top_k, &[]), 61, Load::Balanced).unwrap() {
                let error = d.relative_error();
                println!("{router} {experts}c{top_k} {}: {error:.1e}", d.input);
                assert!(
                    error <= 0.02,
                    "{router} {experts}c{top_k} {}: {error:.1e}",
                    d.input
                );
            }
        }
    }
}

#[test]
fn the_layer_keeps_its_input_the_hidden_rows_and_the_scores_alone() {
    let (tokens, d, f, e, k) = (211, 128, 352, 8, 2);
    for router in ["topk", "default"] {
        let mut config = layer(router, e, k, &[]);
        config.train.device = Device::Sim;
        let model = Model::new(&config).unwrap();
        let (tape, weights) = (Tape::new(), model.weights());
        let x = Tensor::from_slice([tokens, d], &vec![0.5f32; tokens * d]);
        let x = Var::leaf(x.narrowed().on(Device::Sim), model.parameters.len());
        take_ran();
        model
            .moe_layer(0, &tape, &weights, &x, Pass::single(Phase::Train))
            .unwrap();
        let mut kept: Vec<(usize, usize)> = tape
            .kept()
            .iter()
            .filter(|(_, t)| {
                !weights
                    .iter()
                    .any(|w| w.tensor().bytes().as_ptr() == t.bytes().as_ptr())
            })
            .map(|(_, t)| (t.bytes().as_ptr() as usize, t.bytes().len()))
            .collect();
        kept.sort_unstable();
        kept.dedup();
        let bytes: usize = kept.iter().map(|(_, bytes)| bytes).sum();
        // And of the router one logsumexp a token, of the balance losses E means.
        let bound = 2 * tokens * d + 4 * tokens * k * f + 4 * tokens * e;
        assert!(
            bytes <= bound + 4 * tokens + 4 * e,
            "{router} keeps {bytes} bytes, {bound} allowed"
        );
        let ran = take_ran();
        for op in ["router", "experts"] {
            assert_eq!((ran[op].kernels, ran[op].fallback), (1, 0), "{op}");
        }
    }
}

/// Two sequences of made-up text for the tiny model.
fn tokens(length: usize, sequences: usize) -> Vec<i32> {
    (0..(length + 1) * sequences)
        .map(|i| ((i * i + i / 7) % 97) as i32 + 32)
        .collect()
}

/// Two sequences a step of the tiny model.
fn tiny(router: &str) -> Config {
    let mut layers = Layers::preset("tiny");
    layers.set = [
        "train.sequences_per_step=2",
        "train.micro_batch=2",
        "balance.z_coefficient=0.01",
    ]
    .map(String::from)
    .to_vec();
    layers.set.push(format!("router.name={router}"));
    Config::load(&layers, &routers::resolve).unwrap()
}

#[test]
fn a_first_step_of_tiny_gives_the_gradients_of_the_cpu() {
    for router in ["topk", "default"] {
        let config = tiny(router);
        let tokens = tokens(config.model.sequence_length, 2);
        let found = compare_step(&config, &tokens, 2, None).unwrap();
        for (what, difference) in &found.differences {
            println!("{router} {difference:.1e} {what}");
        }
        let (what, difference) = found.worst();
        assert!(
            difference <= TOLERANCE,
            "{router}: {what} differs by {difference:.1e}"
        );
    }
}

#[test]
fn every_missing_term_shows_in_a_first_step_of_tiny() {
    for (fault, name) in Fault::ALL {
        let config = tiny(router_of(fault));
        let tokens = tokens(config.model.sequence_length, 2);
        let found = compare_step(&config, &tokens, 2, Some(fault)).unwrap();
        assert!(!(found.worst().1 <= TOLERANCE), "{name} did not show");
    }
}
