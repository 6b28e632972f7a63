//! The mixture-of-experts layer on the simulator, through the tape, against the CPU device.

use routegrad::config::{Config, Layers};
use routegrad::data::Corpus;
use routegrad::device::Device;
use routegrad::kernels::launchers::{self, Options};
use routegrad::model::Model;
use routegrad::ops::scores::sigmoid;
use routegrad::routers::{self, Pass, Phase};
use routegrad::tape::{Tape, Var, take_op_counts};
use routegrad::tensor::Tensor;
use routegrad::train::step::StepExecutor;
use routegrad::verify::device_check::{
    DIRECTIONAL_TOLERANCE, Directional, Load, MODEL_TOLERANCE, TOLERANCE, compare_layer,
    compare_step, directional, model_checks, router_directions,
};
use routegrad::verify::fault::Fault;

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
        found.largest_margin.is_some_and(|margin| margin <= MARGIN),
        "{case}: margin {:.1?}",
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
#[ignore = "slow"]
fn topk_agrees_with_the_cpu_for_every_shape_and_load() {
    agrees_everywhere("topk");
}

#[test]
#[ignore = "slow"]
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
fn a_layer_whose_experts_get_no_token_at_all_agrees_with_the_cpu() {
    let found = compare_layer(&layer("remoe", 8, 2, &[]), 67, Load::Nobody, None).unwrap();
    assert_eq!(found.counts, [0; 8]);
    assert_eq!(found.worst().1, 0.0, "{:?}", found.differences);
}

#[test]
fn every_option_of_default_agrees_with_the_cpu() {
    for set in [
        "router.weighted=false",
        "router.weight_norm=\"count\"",
        "router.pass_forward=false",
        "router.init_std=0.5",
        "router.source=sampled",
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
        Fault::UnchosenGate => "densemixer",
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
                    error <= DIRECTIONAL_TOLERANCE,
                    "{router} {experts}c{top_k} {}: {error:.1e}",
                    d.input
                );
            }
        }
    }
}

#[test]
fn directional_derivatives_pass_for_every_router_and_a_wrong_gradient_fails() {
    for router in routers::ROUTERS {
        let found = router_directions(router.name).unwrap();
        assert!(found.len() >= 2, "{}", router.name);
        for mut d in found {
            assert!(
                d.relative_error() <= DIRECTIONAL_TOLERANCE,
                "{} {}",
                router.name,
                d.input
            );
            d.predicted *= 1.05;
            assert!(
                !(d.relative_error() <= DIRECTIONAL_TOLERANCE),
                "5% off passes"
            );
        }
    }
}

#[test]
fn the_layer_keeps_its_input_the_hidden_rows_and_the_scores_alone() {
    let (tokens, d, f, e, k) = (211, 128, 352, 8, 2);
    for router in ["topk", "default"] {
        let mut config = layer(router, e, k, &["balance.z_coefficient=0.0"]);
        config.train.device = Device::Sim;
        let model = Model::new(&config).unwrap();
        let (tape, weights) = (Tape::new(), model.weights());
        let x = Tensor::from_slice([tokens, d], &vec![0.5f32; tokens * d]);
        let x = Var::leaf(x.narrowed().on(Device::Sim), model.parameters.len());
        take_op_counts();
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
        // And of the auxiliary loss E means.
        let bound = 2 * tokens * d + 4 * tokens * k * f + 4 * tokens * e;
        assert!(
            bytes <= bound + 4 * e,
            "{router} keeps {bytes} bytes, {bound} allowed"
        );
        let ran = take_op_counts();
        for op in ["router", "experts"] {
            assert_eq!(ran[op], 1, "{op}");
        }
    }
}

/// The tiny model, and the first sequences that it would train on.
fn tiny(router: &str, sequences: usize) -> (Config, Corpus) {
    let mut layers = Layers::preset("tiny");
    layers.set = vec![
        format!("train.sequences_per_step={sequences}"),
        format!("train.micro_batch={sequences}"),
        "balance.z_coefficient=0.01".into(),
        format!("router.name={router}"),
    ];
    let config = Config::load(&layers, &routers::resolve).unwrap();
    let corpus = Corpus::load(&config.data, &config.model, 0).unwrap();
    (config, corpus)
}

#[test]
#[ignore = "slow"]
fn a_first_step_of_tiny_gives_the_gradients_of_the_cpu() {
    for router in ["topk", "default"] {
        let (config, corpus) = tiny(router, 16);
        let batch = corpus.sequences(0..16);
        let found = compare_step(&config, batch.all(), None).unwrap();
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

/// What a model or a router may have beside the defaults of `tiny`.
const OPTIONS: &[&[&str]] = &[
    &["model.qkv_bias=true", "model.norm=\"layernorm\""],
    &["model.qk_norm=\"head\"", "model.kv_heads=1"],
    &["model.qk_norm=\"full\"", "model.tied_embeddings=true"],
    &["model.shared_expert_width=64", "train.recompute=true"],
    // A line is a document.
    &[
        "train.bf16_moments=true",
        "data.document_boundaries=true",
        "data.document_separator=\"\\n\"",
    ],
    &[
        "router.name=topk",
        "router.renormalize=true",
        "model.top_k=2",
    ],
    &["router.name=densemixer", "model.top_k=2"],
    &[
        "router.name=densemixer",
        "router.renormalize=true",
        "model.top_k=2",
    ],
    &["router.name=remoe", "router.initial_lambda=0.01"],
    &[
        "router.name=lossfree",
        "router.renormalize=true",
        "model.top_k=2",
    ],
    &["router.name=sparsemixer", "model.top_k=2"],
    &["router.name=sparsemixer", "router.version=\"v1\""],
];

/// Over 256 tokens roundings even out less than over thousands, least in the gradients of gates, which are small differences
/// of terms.
const OPTION_TOLERANCE: f64 = 4.0 * TOLERANCE;

/// `tiny` with two MoE layers, narrower, and an option; two sequences a step.
fn with_option(set: &[&str], sequence: usize) -> (Config, Corpus) {
    let mut layers = Layers::preset("tiny");
    let sizes = [
        "train.sequences_per_step=2".to_string(),
        "train.micro_batch=2".into(),
        format!("model.sequence_length={sequence}"),
        "model.layers=3".into(),
        "model.expert_ffn_width=128".into(),
        "model.dense_ffn_width=128".into(),
    ];
    let set = set.iter().map(|s| s.to_string());
    layers.set = sizes.into_iter().chain(set).collect();
    let config = Config::load(&layers, &routers::resolve).unwrap();
    let corpus = Corpus::load(&config.data, &config.model, 0).unwrap();
    (config, corpus)
}

/// Runs on a simulator that stands for a GPU without wgmma and TMA.
fn on_sm_80<R>(body: impl FnOnce() -> R) -> R {
    let sim = launchers::sim().unwrap();
    let before = sim.options().unwrap();
    sim.set_options(&Options { arch: 80, ..before }).unwrap();
    let result = body();
    sim.set_options(&before).unwrap();
    result
}

/// Within the bounds that hold of the kernels for Hopper.
#[test]
fn a_first_step_of_every_router_on_sm_80_gives_the_gradients_of_the_cpu() {
    for router in routers::ROUTERS {
        if router.name == "sparsemixer" {
            // Its sampled choices are not replayed.
            for d in on_sm_80(|| router_directions(router.name)).unwrap() {
                let error = d.relative_error();
                assert!(error <= DIRECTIONAL_TOLERANCE, "{}: {error:.1e}", d.input);
            }
            continue;
        }
        let name = format!("router.name={}", router.name);
        let (config, corpus) = with_option(&[&name, "model.top_k=2"], 128);
        let batch = corpus.sequences(0..2);
        let found = on_sm_80(|| compare_step(&config, batch.all(), None)).unwrap();
        let (what, difference) = found.worst();
        println!("{name} on sm_80: worst {difference:.1e} ({what})");
        assert!(
            difference <= OPTION_TOLERANCE,
            "{name} on sm_80: {what} differs by {difference:.1e}"
        );
    }
}

#[test]
#[ignore = "slow"]
fn a_first_step_with_every_option_gives_the_gradients_of_the_cpu() {
    // Sampled choices are not replayed: where activations differ by a rounding, others are drawn.
    let replayed = |set: &&&[&str]| !set[0].contains("sparsemixer");
    for set in OPTIONS.iter().filter(replayed) {
        let (config, corpus) = with_option(set, 128);
        let found = compare_step(&config, corpus.sequences(0..2).all(), None).unwrap();
        let (what, difference) = found.worst();
        println!("{set:?}: worst {difference:.1e} ({what})");
        assert!(
            difference <= OPTION_TOLERANCE,
            "{set:?}: {what} differs by {difference:.1e}"
        );
    }
}

#[test]
#[ignore = "slow"]
fn a_model_with_every_option_learns_on_the_simulator() {
    for set in OPTIONS {
        let (mut config, corpus) = with_option(set, 64);
        config.train.device = Device::Sim;
        let mut model = Model::new(&config).unwrap();
        let mut trainer = StepExecutor::new(&config.train, &model);
        let batch = corpus.sequences(0..2);
        let losses = (0..4).map(|_| {
            let report = trainer.step(&mut model, &[batch.all()], 3e-3).unwrap();
            assert_eq!(report.skipped, None, "{set:?}");
            report.cross_entropy
        });
        let losses: Vec<f64> = losses.collect();
        println!("{set:?}: {losses:.3?}");
        assert!(losses[3] < losses[0] - 0.5, "{set:?}: {losses:?}");
    }
}

#[test]
fn a_head_width_without_kernels_is_refused_before_a_run() {
    let mut layers = Layers::preset("tiny");
    layers.set = vec!["model.head_dim=32".into(), "train.device=\"sim\"".into()];
    let e = Config::load(&layers, &routers::resolve).unwrap_err();
    assert!(
        e.to_string().contains("model.head_dim: expected 64 or 128"),
        "{e}"
    );
}

#[test]
fn an_operation_without_kernels_is_an_error_that_names_it_and_the_device() {
    let scores = Tensor::from_slice([2, 3], &[0.5f32; 6]).on(Device::Sim);
    let e = sigmoid(&Tape::new(), &Var::constant(scores)).unwrap_err();
    let text = e.to_string();
    assert!(
        text.contains("sigmoid: ") && text.contains("inputs on sim"),
        "{text}"
    );
}

#[test]
#[ignore = "slow"]
fn directional_derivatives_of_every_model_agree_with_its_gradients() {
    for model in model_checks() {
        for d in model.run(None).unwrap() {
            let (name, error) = (model.name(), d.relative_error());
            println!("{error:.1e} {name}: along {}", d.input);
            assert!(
                error <= MODEL_TOLERANCE,
                "{name}: along {}: {error:.1e}",
                d.input
            );
        }
    }
}

#[test]
#[ignore = "slow"]
fn every_missing_term_shows_in_a_directional_derivative_of_a_model() {
    let checks = model_checks();
    for (fault, name) in Fault::ALL {
        // With every expert chosen DenseMixer has no gate that was not: the layer shows it.
        if fault == Fault::UnchosenGate {
            continue;
        }
        let model = checks.iter().find(|m| m.router == router_of(fault));
        let found = model.unwrap().run(Some(fault)).unwrap();
        let fails = |d: &&Directional| !(d.relative_error() <= MODEL_TOLERANCE);
        assert!(found.iter().any(|d| fails(&d)), "{name} did not show");
    }
}

#[test]
#[ignore = "slow"]
fn every_missing_term_shows_in_a_first_step() {
    for (fault, name) in Fault::ALL {
        let router = format!("router.name={}", router_of(fault));
        let (config, corpus) = with_option(&[&router, "balance.z_coefficient=0.01"], 128);
        let found = compare_step(&config, corpus.sequences(0..2).all(), Some(fault)).unwrap();
        let allowed = OPTION_TOLERANCE;
        assert!(!(found.worst().1 <= allowed), "{name} did not show");
    }
}

#[test]
#[ignore = "slow"]
fn the_loss_of_tiny_falls_as_on_the_cpu() {
    let losses = |device: Device| -> Vec<f64> {
        let (mut config, corpus) = tiny("default", 2);
        config.train.device = device;
        let mut model = Model::new(&config).unwrap();
        let mut trainer = StepExecutor::new(&config.train, &model);
        let step = |step: u64| {
            let batch = corpus.sequences(2 * step..2 * step + 2);
            let report = trainer.step(&mut model, &[batch.all()], 1e-3).unwrap();
            assert_eq!(report.skipped, None);
            report.cross_entropy
        };
        (0..20).map(step).collect()
    };
    let (device, cpu) = (losses(Device::Sim), losses(Device::Cpu));
    let mean = |losses: &[f64]| losses[10..].iter().sum::<f64>() / 10.0;
    assert!(mean(&cpu) < 0.9 * cpu[0], "the loss falls: {cpu:?}");
    let difference = (mean(&device) / mean(&cpu) - 1.0).abs();
    println!("mean loss of steps 11 to 20 differs by {difference:.1e}");
    assert!(difference <= 0.01, "{device:?} and {cpu:?}");
}

#[test]
fn a_run_that_launches_steps_before_the_last_is_reported_leaves_what_one_that_does_not_leaves() {
    let place = crate::common::Place::new();
    let runs = ["true", "false"].map(|graph| {
        let mut set = vec![
            "--device".into(),
            "sim".into(),
            "--steps".into(),
            "12".into(),
        ];
        for option in [
            "router.name=lossfree",
            "model.dense_ffn_width=48",
            "model.head_dim=64",
            "train.checkpoint_interval=8",
            "train.eval_interval=10",
            &format!("train.graph={graph}"),
        ] {
            set.extend(["--set".to_string(), option.to_string()]);
        }
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        crate::common::succeed(&mut place.train(graph, &set));
        let out = place.path(graph);
        let files = [8, 12].map(|step| {
            let file = |name| std::fs::read(out.join(format!("checkpoints/step-{step}/{name}")));
            ["model.safetensors", "trainer.safetensors"].map(|name| file(name).unwrap())
        });
        (crate::common::metrics(&out), files)
    });
    let [ahead, in_turn] = runs;
    assert_eq!(ahead.0.len(), 12);
    assert!(
        ahead.0[7]["router_state"]["gate.e_score_correction_bias"][0][0].is_f64(),
        "{}",
        ahead.0[7]
    );
    assert_eq!(ahead.0, in_turn.0);
    assert!(ahead.1 == in_turn.1, "other bytes");
}

#[test]
fn a_run_on_the_simulator_resumes_in_the_same_bytes_and_goes_on_on_the_cpu() {
    let place = crate::common::Place::new();
    let end = |mut command: std::process::Command| {
        let done = command.output().unwrap();
        assert!(
            done.status.success(),
            "{}",
            crate::common::text(&done.stderr)
        );
    };
    let weights = |out: &str, step: u64| {
        let file = format!("{out}/checkpoints/step-{step}/model.safetensors");
        std::fs::read(place.path(&file)).unwrap()
    };
    let on_sim = [
        "--device",
        "sim",
        "--set",
        "train.checkpoint_interval=3",
        "--set",
        "model.dense_ffn_width=48",
        "--set",
        "model.head_dim=64",
    ];
    let straight = [&on_sim[..], &["--steps", "6"]].concat();
    end(place.train("straight", &straight));
    let first = [
        &on_sim[..],
        &["--steps", "6", "--set", "train.keep_checkpoints=9"],
    ]
    .concat();
    end(place.train("stopped", &first));
    std::fs::remove_dir_all(place.path("stopped/checkpoints/step-6")).unwrap();
    end(place.resume("stopped"));
    assert!(
        weights("straight", 6) == weights("stopped", 6),
        "other bytes"
    );

    let mut on_cpu = place.resume("stopped");
    on_cpu.args(["--device", "cpu", "--steps", "9"]);
    end(on_cpu);
    assert_eq!(weights("stopped", 9).len(), weights("straight", 6).len());
}
