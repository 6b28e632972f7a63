use super::*;
use crate::config::Layers;
use crate::device::machine::{CHIPS, Chip};
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::routers;
use crate::routers::Pass;
use crate::tape::Tape;
use crate::tensor::Tensor;
use std::collections::HashMap;
use std::sync::Arc;

/// Returns the configuration of a preset with these keys, separated by spaces.
fn config(preset: &str, sets: &str) -> Config {
    let mut layers = Layers::preset(preset);
    layers.set = sets.split_whitespace().map(String::from).collect();
    Config::load(&layers, &routers::resolve).unwrap()
}

fn h200() -> Target {
    Target::Gpu(Chip::named("h200").unwrap())
}

/// Returns the bytes of activations that the tape keeps in one pass; a shared tensor counts once, and parameters are left
/// out.
fn kept_on_the_tape(config: &Config) -> u64 {
    let model = Model::new(config).unwrap();
    let tokens = config.model.sequence_length * config.train.micro_batch;
    let ids: Vec<i32> = (0..tokens + config.train.micro_batch)
        .map(|i| (i * i % 251) as i32)
        .collect();
    let (tape, weights) = (Tape::new(), model.weights());
    let pass = Pass::single(crate::routers::Phase::Train);
    let sequences = Sequences::new(&ids, config.train.micro_batch);
    let _losses = model.loss(&tape, &weights, sequences, pass).unwrap();
    let parameters = weights.iter().map(|w| w.tensor().bytes().as_ptr());
    let parameters: Vec<*const u8> = parameters.collect();
    let kept = tape
        .kept()
        .into_iter()
        .map(|(_, t)| (t.bytes().as_ptr(), t));
    let unique: HashMap<*const u8, _> = kept.filter(|(p, _)| !parameters.contains(p)).collect();
    unique.values().map(|t| t.bytes().len() as u64).sum()
}

#[test]
fn the_planned_activations_of_a_layer_are_those_on_the_tape() {
    let micro = "model.hidden=64 model.layers=3 model.heads=4 model.kv_heads=2 model.num_experts=4 \
                 model.top_k=2 model.sequence_length=32 train.micro_batch=2 train.sequences_per_step=2 \
                 train.dtype=\"f64\"";
    let cases = [
        "router.name=topk",
        "router.name=topk router.renormalize=true",
        "router.name=topk balance.z_coefficient=0.001",
        "router.name=topk model.qk_norm=\"head\" model.norm=\"layernorm\"",
        "router.name=topk model.shared_expert_width=24 model.dense_layers=[]",
        "router.name=default",
        "router.name=dense",
        "router.name=densemixer",
        "router.name=lossfree",
    ];
    for case in cases {
        let config = config("tiny", &format!("{micro} {case}"));
        let (m, router) = (&config.model, routers::build(&config.router).unwrap());
        let tokens = (m.sequence_length * config.train.micro_batch) as u64;
        let layers: u64 = (0..m.layers)
            .flat_map(|l| kept(&config, &*router, l, Target::Cpu))
            .sum();
        let ends = 2 * m.hidden as u64;
        let head = (m.vocab_size * m.hidden) as u64;
        let planned = 8 * (tokens * (layers + ends) + head);
        assert_eq!(planned, kept_on_the_tape(&config), "{case:?}");
    }
}

#[test]
fn planned_parameters_are_those_of_the_model() {
    for router in [
        "router.name=topk",
        "router.name=sparsemixer router.version=v1",
    ] {
        let config = config("tiny", router);
        let model = Model::new(&config).unwrap();
        let elements = model.parameters.iter().map(|p| p.value.shape().elements());
        let parameters = elements.sum::<usize>() as u64;
        let found = plan(&config, Target::Cpu, 1).unwrap();
        assert_eq!(found.total_parameters, parameters, "{router:?}");
        let inactive = 3 * 7 * 3 * config.model.hidden * config.model.expert_ffn_width;
        assert_eq!(found.active_parameters, parameters - inactive as u64);
        assert_eq!(found.memory.weights, 4 * parameters);
    }
}

#[test]
fn recomputed_layers_keep_only_their_input() {
    let kept = config("tiny", "router.name=topk");
    let again = config("tiny", "router.name=topk train.recompute=true");
    let [kept, again] = [kept, again].map(|c| Memory::of(&c, Target::Cpu, 1).unwrap());
    assert!(again.activations < kept.activations / 5);
    assert!(again.workspace > kept.workspace);
    assert_eq!(again.weights, kept.weights);
}

#[test]
fn the_plan_has_the_numbers_of_the_method_and_reports_what_fits() {
    let set = "router.name=topk train.micro_batch=8 train.sequences_per_step=64";
    let big = config("7.33b", set);
    let found = plan(&big, Target::gpu(), 1).unwrap();
    let text = found.table();
    assert!(
        text.contains("7.330 G") && text.contains("9.581 G"),
        "{text}"
    );
    // METHOD: 51,610 tokens/s at half of the peak.
    assert!((found.tokens_per_second - 51_610.0).abs() < 10.0);
    // 16 bytes per parameter; the router has no state.
    let m = found.memory;
    assert_eq!(
        m.weights + m.gradients + m.optimizer,
        16 * found.total_parameters
    );
    let mut wide = big.clone();
    wide.train.micro_batch = 64;
    let found = plan(&wide, Target::gpu(), 1).unwrap();
    assert!(!found.fits());
    let text = found.table();
    assert!(
        text.contains("possible settings: train.micro_batch="),
        "{text}"
    );
    // A router that runs every expert has a higher cost.
    let dense = config("tiny", "router.name=dense");
    let topk = config("tiny", "router.name=topk");
    let [dense, topk] = [dense, topk].map(|c| plan(&c, Target::Cpu, 2).unwrap());
    assert!(dense.flops_per_token > 2 * topk.flops_per_token);
    assert!(dense.memory.activations > 3 * topk.memory.activations);
}

#[test]
fn sampled_default_vectors_add_only_the_cost_of_their_rows_in_forward() {
    let chosen = config("1.96b", "router.name=default");
    let set = "router.name=default router.source=sampled router.samples=32";
    let sampled = config("1.96b", set);
    let [a, b] = [&chosen, &sampled].map(|c| plan(c, h200(), 1).unwrap());
    // 23 layers of 8 experts, 32 rows each, through three matrices of 1024 · 2816, over 2^21 tokens.
    let rows = 23.0 * 8.0 * 32.0 * 2.0 * 3.0 * 1024.0 * 2816.0 / 2f64.powi(21);
    let more = (b.flops_per_token - a.flops_per_token) as f64;
    assert!((more - rows).abs() <= 1.0, "{more} instead of {rows}");
    // In each of 128 micro-batches, at most one row per expert, and a number for each token and expert.
    let bytes = 2 * 8 * (2 * 1024 + 3 * 2816) + 4 * 8 * 2048 * 8;
    assert_eq!(b.memory.workspace - a.memory.workspace, bytes);
    assert_eq!(b.memory.router_state, a.memory.router_state);
    let same = |f: fn(&Memory) -> u64| f(&a.memory) == f(&b.memory);
    assert!(same(|m| m.activations) && same(|m| m.weights));
}

#[test]
fn tiny_and_small_fit_8_gib_and_557m_a_gpu_of_24_with_bf16_moments_and_recompute() {
    // 1 GiB is reserved for the driver and the desktop.
    for preset in ["tiny", "small"] {
        let needed = Memory::of(&config(preset, ""), Target::gpu(), 1).unwrap();
        assert!(needed.total() <= 7 << 30, "{preset}: {needed:?}");
    }
    let lean = config("557m", "train.bf16_moments=true train.recompute=true");
    for key in ["rtx3090", "rtx4090"] {
        let chip = Chip::named(key).unwrap();
        let found = plan(&lean, Target::Gpu(chip), 1).unwrap();
        assert!(found.fits(), "{key}: {}", found.table());
    }
}

#[test]
fn memory_and_time_are_those_of_the_gpu() {
    let config = config("557m", "");
    for chip in &CHIPS {
        let found = plan(&config, Target::Gpu(chip), 1).unwrap();
        assert_eq!(found.available, Some(chip.memory_gib << 30));
        assert_eq!(found.memory, Memory::of(&config, Target::gpu(), 1).unwrap());
        let rate = found.tokens_per_second * found.flops_per_token as f64;
        assert!(
            (rate / (0.5 * chip.peak) - 1.0).abs() < 1e-12,
            "{}",
            chip.key
        );
        assert_eq!(serde_json::json!(found)["target"], chip.key);
    }
}

fn on_one_node(ranks: usize) -> Cluster {
    Cluster { ranks, nodes: 1 }
}

#[test]
fn on_several_nodes_a_share_leaves_a_node_once() {
    let big = config("7.33b", "train.micro_batch=64");
    let plan = |ranks, nodes| plan_on(&big, h200(), 1, Cluster { ranks, nodes }).unwrap();
    let two = plan(16, 2);
    // Within a node, seven eighths of six bytes per parameter; to the other node, one share of 16.
    let bytes = 6 * two.total_parameters;
    assert_eq!(two.sent_between_nodes_bytes, bytes / 16);
    assert_eq!(two.sent_bytes, 14 * bytes / 16 + bytes / 16);
    let seconds = 14.0 / 16.0 * bytes as f64 / 370e9 + bytes as f64 / 16.0 / 45e9;
    assert!((two.sending_seconds - seconds).abs() < 1e-6);
    let table = two.table();
    assert!(table.contains("16 on 2 nodes, each sends"), "{table}");
    // Each rank of its own node sends to all others.
    let apart = plan(16, 16);
    assert_eq!(apart.sent_bytes, apart.sent_between_nodes_bytes);
    assert_eq!(apart.sent_bytes, 15 * bytes / 16);
    let (ranks, nodes) = (16, 3);
    let error = plan_on(&big, h200(), 1, Cluster { ranks, nodes });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("divides 16 ranks"), "{error}");
}

#[test]
fn ranks_share_batch_and_moments_and_send_gradients_and_weights() {
    let set =
        "router.name=topk train.micro_batch=64 train.sequences_per_step=64 train.bf16_moments=true";
    let big = config("7.33b", set);
    let [one, eight] = [1, 8].map(|ranks| plan_on(&big, h200(), 1, on_one_node(ranks)).unwrap());
    assert_eq!(eight.memory.optimizer, one.memory.optimizer.div_ceil(8));
    // bf16 of all weights, and the lower half of one eighth of them.
    assert_eq!(
        eight.memory.weights,
        (2 * 8 + 2) * eight.total_parameters / 8
    );
    let m = &eight.memory;
    assert!(
        m.weights + m.gradients + m.optimizer <= 54_000_000_000,
        "{m:?}"
    );
    assert_eq!(eight.checkpoint_bytes, one.checkpoint_bytes);
    assert!(eight.memory.activations < one.memory.activations / 4);
    // Seven eighths of six bytes per parameter, at 370 GB/s.
    assert_eq!(eight.sent_bytes, 7 * 6 * eight.total_parameters / 8);
    assert_eq!(one.sent_bytes, 0);
    let seconds = eight.sent_bytes as f64 / 370e9;
    assert!((eight.sending_seconds - seconds).abs() < 1e-9);
    let computing = one.seconds() / 8.0;
    let sending = seconds * one.steps as f64;
    assert!((eight.seconds() - computing - sending).abs() < 1e-6 * computing);
    let text = eight.table();
    assert!(text.contains("memory of a rank"), "{text}");
    assert!(eight.largest_micro_batch.is_none_or(|n| n % 8 == 0));
    let error = plan_on(&big, h200(), 1, on_one_node(3))
        .unwrap_err()
        .to_string();
    assert!(error.contains("divide train.micro_batch = 64"), "{error}");
}

#[test]
fn a_rank_evaluates_no_more_tokens_at_a_time_than_its_plan_has() {
    let set = "train.recompute=true train.micro_batch=1024 train.sequences_per_step=1024";
    let big = config("7.33b", set);
    assert_eq!(big.evaluation_batch() * big.model.sequence_length, 16_384);
    let memory = Memory::of(&big, h200(), 128).unwrap();
    // Of each token an expert's gate and up, and 6 D of attention, in bf16.
    let m = &big.model;
    let evaluated = 16_384 * 2 * (2 * m.expert_ffn_width + 6 * m.hidden) as u64;
    assert!(
        memory.activations + memory.workspace > evaluated,
        "{memory:?}"
    );
    assert_eq!(config("tiny", "").evaluation_batch(), 16);
    let long = config("tiny", "model.sequence_length=65536");
    assert_eq!(long.evaluation_batch(), 1);
}

#[test]
fn a_run_that_the_plan_fits_is_not_refused_before_it_begins() {
    let set = "train.micro_batch=3392 train.sequences_per_step=3392";
    for ranks in [1, 8] {
        let config = config("tiny", set);
        let planned = Memory::of(&config, Target::Cpu, ranks).unwrap();
        let least = crate::train::least_memory(&config, ranks);
        assert!(
            least <= planned.total(),
            "{ranks} ranks: {least}, {planned:?}"
        );
    }
}

/// The model has parameters of many blocks, so that the shares of the ranks differ little.
#[test]
fn planned_weights_and_moments_of_a_rank_are_those_that_a_rank_on_the_simulator_holds() {
    use crate::dist::ThreadRank;
    use crate::model::{Model, Places};
    use crate::train::step::StepExecutor;
    let set = "router.name=topk model.hidden=128 model.vocab_size=8192 model.expert_ffn_width=1024 \
               model.num_experts=8 train.micro_batch=4 train.sequences_per_step=4 \
               train.device=\"sim\"";
    for moments in ["train.bf16_moments=true", "train.bf16_moments=false"] {
        let config = config("tiny", &format!("{set} {moments}"));
        let planned = Memory::of(&config, h200(), 4).unwrap();
        let held = ThreadRank::run(4, |rank| {
            let router = routers::build(&config.router).unwrap();
            let mut model = Model::with_router(&config, router, Arc::new(rank)).unwrap();
            let executor = StepExecutor::new(&config.train, &model);
            executor.share_out_weights(&mut model).unwrap();
            let bytes = |t: &Tensor| (t.elements() * t.dtype().size()) as u64;
            let own = executor.optimizer.moments().iter();
            let own: u64 = own.map(|m| bytes(&m.first) + bytes(&m.second)).sum();
            let places = model.parameters.iter_mut().map(|p| match p.value.places() {
                Places::Whole(value) => bytes(value),
                Places::Split([upper, lower]) => bytes(upper) + bytes(lower),
            });
            (places.sum::<u64>(), own)
        });
        let most = held.iter().map(|(weights, own)| weights + own).max();
        let ratio = (planned.weights + planned.optimizer) as f64 / most.unwrap() as f64;
        assert!((ratio - 1.0).abs() <= 0.03, "{moments}: {ratio:.4}");
    }
}

#[test]
fn the_rate_of_a_large_model_does_not_depend_on_the_batch() {
    // A step of the larger batch has more operations than a u64 holds.
    let of = |sequences: usize| {
        let sets = format!(
            "model.hidden=16384 model.heads=256 model.layers=126 model.sequence_length=8192 \
             train.micro_batch=1 train.sequences_per_step={sequences}"
        );
        plan(&config("7.33b", &sets), h200(), 1).unwrap()
    };
    let (small, large) = (of(1), of(1 << 20));
    let change = large.tokens_per_second / small.tokens_per_second - 1.0;
    assert!(change.abs() <= 1e-9, "{change}");
    let operations = large.tokens_per_step.checked_mul(large.flops_per_token);
    assert!(operations.is_none());
}
