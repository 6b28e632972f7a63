//! A training step on a device with kernels, seen from the host: after the first ones a step asks for no memory, waits for
//! nothing, and gives its kernels the addresses of the step before; a step that is not finite leaves no trace.
//!
//! The simulator's kernels have memory of their own, so that the counters are those of a GPU.

use routegrad::config::{Config, Layers};
use routegrad::device::{Device, counters, take_peak};
use routegrad::kernels::launchers::{self, Options};
use routegrad::routers;
use routegrad::study::plan::{Memory, Target};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::DType;
use routegrad::train::Trainer;
use routegrad::train::step::{StepExecutor, StepReport};
use std::sync::{Mutex, MutexGuard};

/// Addresses are those of the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Routers whose step the host need not follow, with what changes the launches; one has several MoE layers.
const STEADY: &[&[&str]] = &[
    &["router.name=topk"],
    &["router.name=default", "model.layers=3"],
    &[
        "router.name=default",
        "model.top_k=2",
        "train.recompute=true",
    ],
    &[
        "router.name=default",
        "data.document_boundaries=true",
        "train.bf16_moments=true",
    ],
    &["router.name=lossfree"],
    &["router.name=lossfree", "router.score=\"softmax\""],
    &["router.name=remoe"],
    &["router.name=dense"],
    &["router.name=densemixer", "train.recompute=true"],
];

fn training(set: &[&str]) -> Trainer {
    let mut layers = Layers::preset("tiny");
    let small = [
        "model.sequence_length=64",
        "model.layers=2",
        "model.expert_ffn_width=128",
        "model.dense_ffn_width=128",
        "train.micro_batch=1",
        "train.sequences_per_step=2",
        "model.num_experts=4",
        "train.device=\"sim\"",
    ];
    layers.set = small.iter().chain(set).map(|s| s.to_string()).collect();
    Trainer::new(Config::load(&layers, &routers::resolve).unwrap()).unwrap()
}

/// A step of two micro-batches: what it counted, its report included, and the report.
fn counted_step(run: &mut Trainer) -> (counters::Counters, StepReport) {
    counters::take();
    let launched = run.launch().unwrap();
    let report = run.finish(launched).unwrap();
    (counters::take(), report)
}

/// Weights, moments and router state, as the host reads them.
fn bits(run: &Trainer) -> Vec<u64> {
    let numbers = |t: &Tensor| t.to_f64().unwrap();
    let weights = run.model.parameters.iter();
    let weights = weights.map(|p| p.value.to_f64().unwrap());
    let moments = run.executor().optimizer.moments().iter();
    let moments = moments.flat_map(|m| [numbers(&m.first), numbers(&m.second)]);
    let states = run.model.layer_states();
    let states = states
        .iter()
        .flat_map(|s| s.tensors().map(|(_, t)| numbers(t)).collect::<Vec<_>>());
    let all = weights.chain(moments).chain(states);
    all.flatten().map(f64::to_bits).collect()
}

#[test]
fn a_step_waits_for_nothing_asks_for_no_memory_and_repeats_its_addresses() {
    let _alone = alone();
    for set in STEADY {
        let mut run = training(&[&["train.graph=false"], *set].concat());
        for _ in 0..2 {
            assert_eq!(counted_step(&mut run).1.skipped, None, "{set:?}");
        }
        let [third, fourth] = [counted_step(&mut run).0, counted_step(&mut run).0];
        println!("{set:?}: {fourth:?}");
        assert!(third.launches > 100, "{set:?}");
        assert_eq!((third.reads, third.allocations), (0, 0), "{set:?}");
        assert_eq!(third, fourth, "{set:?}");
        // Before the step: tokens, targets and first keys of each micro-batch, and the learning rate.
        assert!(third.uploads <= 2 * 3 + 1, "{set:?}: {}", third.uploads);
    }
}

/// The host sees of a step on a GPU without wgmma what it sees on Hopper, replayed too; nearly the same loss comes out.
#[test]
fn a_step_on_sm_80_counts_what_one_on_hopper_does() {
    let _alone = alone();
    let sim = launchers::sim().unwrap();
    let before = sim.options().unwrap();
    for set in [STEADY[1], STEADY[5], STEADY[6]] {
        let [hopper, ampere] = [90, 80].map(|arch| {
            sim.set_options(&Options { arch, ..before }).unwrap();
            let mut run = training(set);
            let steps: Vec<_> = (0..5).map(|_| counted_step(&mut run)).collect();
            sim.set_options(&before).unwrap();
            steps
        });
        for (step, (on_hopper, on_ampere)) in hopper.iter().zip(&ampere).enumerate() {
            let [a, b] = [on_hopper, on_ampere].map(|(_, report)| report.cross_entropy);
            assert!(
                (a - b).abs() <= 1e-3 * a,
                "{set:?} step {step}: {a} and {b}"
            );
            assert_eq!(on_ampere.1.skipped, None, "{set:?} step {step}");
            // The first steps take memory, as much as is not free yet; where it lies differs.
            let [a, b] =
                [on_hopper.0, on_ampere.0].map(|c| [c.launches, c.reads, c.waits, c.replays]);
            assert_eq!(a, b, "{set:?} step {step}");
        }
        let last = ampere[4].0;
        assert_eq!((last.reads, last.allocations), (0, 0), "{set:?}");
        assert_eq!(
            (last.replays, hopper[4].0.uploads),
            (1, last.uploads),
            "{set:?}"
        );
    }
}

/// A replay must not differ from the step itself in any bit, whatever happens between steps.
#[test]
#[ignore = "slow"]
fn a_replayed_step_does_what_the_step_itself_does() {
    let _alone = alone();
    for set in STEADY {
        let mut runs = ["true", "false"].map(|on| {
            let graph = format!("train.graph={on}");
            training(&[&[graph.as_str()], *set].concat())
        });
        let mut replays = 0;
        for step in 0..9 {
            let [replayed, itself] = runs.each_mut().map(|run| {
                match step {
                    // The host reads what kernels write, and takes memory of its own.
                    5 => {
                        let tokens = run.next_batch();
                        run.model.token_losses(tokens.all()).unwrap();
                        run.model.layer_states_mut().iter_mut().for_each(|s| {
                            s.take_stats();
                        });
                    }
                    // A weight is written by the host, then put back elsewhere.
                    6 => run.model.parameters[1].value.change(|w| {
                        w.slice_mut::<f32>()[0] += 0.5;
                    }),
                    7 => {
                        let weights = run.model.parameters[1].value.to_f64().unwrap();
                        let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
                        let shape = run.model.parameters[1].value.shape();
                        let tensor = Tensor::from_slice(shape, &weights);
                        run.model.parameters[1].value.set(&tensor);
                    }
                    _ => (),
                }
                let (counted, report) = counted_step(run);
                (counted, format!("{report:?}"), bits(run))
            });
            assert_eq!(replayed.1, itself.1, "{set:?}: report of step {step}");
            assert!(replayed.2 == itself.2, "{set:?}: state after step {step}");
            assert_eq!(itself.0.replays, 0);
            replays += replayed.0.replays;
            if replayed.0.replays == 1 && step != 2 {
                println!("{set:?} step {step}: {:?}", replayed.0);
            }
        }
        assert!(replays >= 5, "{set:?}: {replays} replays");
    }
}

/// A step of other micro-batches finds inputs that no step has had yet: it runs by itself, and the next of them is captured.
#[test]
#[ignore = "slow"]
fn steps_of_other_micro_batches_are_captured_too() {
    let _alone = alone();
    let mut run = training(&["train.sequences_per_step=4"]);
    let batch = run.next_batch();
    let parts: Vec<_> = batch.chunks(1).collect();
    let mut executor = StepExecutor::new(&run.config().train, &run.model);
    let replays = [1, 1, 1, 4, 4, 4, 4].map(|micro_batches| {
        counters::take();
        let report = executor.step(&mut run.model, &parts[..micro_batches], 1e-4);
        assert_eq!(report.unwrap().skipped, None);
        counters::take().replays
    });
    assert!(executor.graph_error().is_none());
    assert_eq!(
        (replays[2], replays[3], replays[6]),
        (1, 0, 1),
        "{replays:?}"
    );
}

/// The memory that a step takes for a while is part of its graph: where it had to grow, the next one may get another's.
#[test]
#[ignore = "slow"]
fn a_step_that_needs_new_memory_runs_by_itself_before_it_is_captured_again() {
    let _alone = alone();
    let [mut run, mut undisturbed] = [training(&[]), training(&[])];
    for step in 0..9 {
        // From the fourth step on others have what was free.
        let taken: Vec<Tensor> = match step {
            3 => take_free_memory(),
            _ => Vec::new(),
        };
        if step == 3 {
            run.model.parameters[0].value.change(|_| ());
        }
        let (counted, report) = counted_step(&mut run);
        if step == 3 {
            assert!(counted.allocations > 0, "nothing was taken: {counted:?}");
        }
        std::mem::forget(taken);
        let expected = format!("{:?}", counted_step(&mut undisturbed).1);
        assert_eq!(format!("{report:?}"), expected, "step {step}");
        let replayed = matches!(step, 2 | 6..);
        assert!(
            counted.replays == 1 || !replayed,
            "step {step}: {counted:?}"
        );
        assert!(run.executor().graph_error().is_none(), "step {step}");
    }
}

/// Tensors on the simulator in all of its free memory but pieces smaller than 64 KiB.
fn take_free_memory() -> Vec<Tensor> {
    let mut taken = Vec::new();
    let mut take = |bytes: usize| {
        let before = counters::now().allocations;
        let tensor = Tensor::zeros(Device::Sim, DType::F32, [bytes / 4]);
        tensor.pointer::<f32>();
        taken.push(tensor);
        counters::now().allocations == before
    };
    // Each size until the memory grows, by 64 MiB.
    let (chunk, least) = (64 << 20, 64 << 10);
    for bytes in [16 << 20, 1 << 20, least] {
        while take(bytes) {}
    }
    assert!(take(chunk - least), "the memory grew by less than 64 MiB");
    taken
}

#[test]
#[ignore = "slow"]
fn a_step_launched_before_the_last_one_is_reported_is_the_same_step() {
    let _alone = alone();
    for set in [STEADY[2], STEADY[4], STEADY[6]] {
        let [mut ahead, mut in_turn] = [training(set), training(set)];
        let mut launched_early = 0;
        for step in 0..9 {
            counters::take();
            let found = ahead.step_overlapped().unwrap();
            // The step's own, and the one behind it.
            launched_early += counters::take().replays;
            let expected = in_turn.step().unwrap();
            let [found, expected] = [found, expected].map(|report| format!("{report:?}"));
            assert_eq!(found, expected, "{set:?}: report of step {step}");
        }
        assert!(launched_early >= 6, "{set:?}: {launched_early} steps");
        // Reports what is under way, and launches no other.
        ahead.step().unwrap();
        in_turn.step().unwrap();
        assert!(bits(&ahead) == bits(&in_turn), "{set:?}: state");
    }
}

#[test]
#[ignore = "slow"]
fn a_router_that_draws_anew_each_step_waits_for_nothing_and_is_not_replayed() {
    let _alone = alone();
    let mut run = training(&["router.name=sparsemixer", "model.top_k=2"]);
    for step in 0..5 {
        let counted = counted_step(&mut run).0;
        assert_eq!((counted.replays, counted.reads), (0, 0), "step {step}");
        assert!(step < 2 || counted.allocations == 0, "step {step}");
    }
}

#[test]
#[ignore = "slow"]
fn a_step_that_is_not_finite_leaves_weights_moments_and_state_as_they_were() {
    let _alone = alone();
    for router in ["topk", "default", "lossfree", "remoe"] {
        let mut run = training(&["model.layers=3", &format!("router.name={router}")]);
        for _ in 0..2 {
            assert_eq!(counted_step(&mut run).1.skipped, None, "{router}");
        }
        // The embedding of a byte that the next step reads.
        let tokens = run.next_batch();
        let (width, byte) = (
            run.model.config().hidden,
            tokens.tokens[tokens.tokens.len() / 2 + 5] as usize,
        );
        let kept = run.model.parameters[0].value.clone();
        let embedding = &mut run.model.parameters[0].value;
        embedding.change(|w| w.slice_mut::<f32>()[byte * width] = f32::NAN);
        let before = bits(&run);
        let refused = counted_step(&mut run).1.skipped;
        let refused = refused.expect("a step with a NaN was accepted");
        assert!(
            refused.starts_with("router logits of MoE layer 0, token "),
            "{refused}"
        );
        assert_eq!(run.executor().optimizer.steps(), 2, "{router}");
        assert!(bits(&run) == before, "{router}: something changed");
        run.model.parameters[0].value = kept;
        assert_eq!(counted_step(&mut run).1.skipped, None, "{router}");
        assert!(bits(&run) != before, "{router}: nothing changed");
    }
}

#[test]
fn the_device_is_that_of_the_counters() {
    let _alone = alone();
    assert_eq!(training(&[]).model.device(), Device::Sim);
}

#[test]
fn the_planned_memory_is_what_a_step_takes() {
    let _alone = alone();
    for set in [
        &["router.name=topk"][..],
        &["router.name=default", "model.top_k=2"],
        &["router.name=default", "train.recompute=true"],
        &["router.name=dense"],
        &["router.name=remoe"],
        &["router.name=topk", "train.bf16_moments=true"],
        // Logits are the most of what a step takes for a while.
        &["router.name=topk", "model.vocab_size=32768"],
    ] {
        take_peak(Device::Sim);
        let begun = take_peak(Device::Sim);
        let mut run = training(&[&["model.layers=3"], set].concat());
        counted_step(&mut run);
        counted_step(&mut run);
        let found = take_peak(Device::Sim) - begun;
        let planned = Memory::of(run.config(), Target::gpu(), 1).unwrap();
        let ratio = planned.total() as f64 / found as f64;
        println!(
            "{set:?}: {found} bytes, planned {} ({ratio:.3}): {planned:?}",
            planned.total()
        );
        assert!((0.97..=1.03).contains(&ratio), "{set:?}: {ratio:.3}");
    }
}
