//! A training step on a device with kernels, seen from the host: after the first ones a step asks for no memory, waits for
//! nothing, and gives its kernels the addresses of the step before; a step that is not finite leaves no trace.
//!
//! The simulator's kernels have memory of their own, so that the counters are those of a GPU.

use routegrad::batch::Batch;
use routegrad::config::{Config, Layers};
use routegrad::data::Corpus;
use routegrad::device::{Device, counters, take_peak};
use routegrad::model::Model;
use routegrad::plan::{Memory, Target};
use routegrad::routers;
use routegrad::step::Trainer;
use std::sync::{Mutex, MutexGuard};

const SEQUENCES: usize = 2;

/// Addresses are those of the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

struct Run {
    config: Config,
    model: Model,
    trainer: Trainer,
    corpus: Corpus,
    step: u64,
}

impl Run {
    fn new(set: &[&str]) -> Self {
        let mut layers = Layers::preset("tiny");
        let small = [
            "model.sequence_length=128",
            "model.layers=3",
            "train.micro_batch=2",
            "train.sequences_per_step=4",
            "train.device=\"sim\"",
        ];
        layers.set = small.iter().chain(set).map(|s| s.to_string()).collect();
        let config = Config::load(&layers, &routers::resolve).unwrap();
        let model = Model::new(&config).unwrap();
        Run {
            config: config.clone(),
            trainer: Trainer::new(&config.train, &model),
            corpus: Corpus::load(&config.data, &config.model, 0).unwrap(),
            model,
            step: 0,
        }
    }

    fn tokens(&self) -> Batch {
        let n = 2 * SEQUENCES as u64;
        self.corpus.sequences(self.step * n..(self.step + 1) * n)
    }

    /// A step of two micro-batches: what it counted up to its report, and what was refused.
    fn step(&mut self) -> (counters::Counters, Option<String>) {
        let tokens = self.tokens();
        let parts: Vec<_> = tokens.chunks(SEQUENCES).collect();
        counters::take();
        let launched = self.trainer.launch(&mut self.model, &parts, 1e-3).unwrap();
        let counted = counters::take();
        let report = self.trainer.report(&mut self.model, launched).unwrap();
        self.step += 1;
        (counted, report.refused)
    }

    /// Weights, moments and router state.
    fn state(&self) -> Vec<Vec<f64>> {
        let weights = self
            .model
            .parameters
            .iter()
            .map(|p| p.value.to_f64().unwrap());
        let moments = self.trainer.optimizer.moments().iter();
        let moments = moments.flat_map(|m| [m.first.to_f64().unwrap(), m.second.to_f64().unwrap()]);
        let states = self.model.layer_states();
        let states = states.iter().flat_map(|s| {
            s.tensors()
                .map(|(_, t)| t.to_f64().unwrap())
                .collect::<Vec<_>>()
        });
        weights.chain(moments).chain(states).collect()
    }
}

#[test]
fn a_step_waits_for_nothing_asks_for_no_memory_and_repeats_its_addresses() {
    let _alone = alone();
    for set in [
        &["router.name=topk"][..],
        &["router.name=default"],
        &[
            "router.name=default",
            "model.top_k=2",
            "train.recompute=true",
        ],
        &["router.name=default", "data.document_boundaries=true"],
        &["router.name=lossfree"],
        &["router.name=lossfree", "router.score=\"softmax\""],
    ] {
        let mut run = Run::new(set);
        for _ in 0..2 {
            assert_eq!(run.step().1, None, "{set:?}");
        }
        let [third, fourth] = [run.step().0, run.step().0];
        println!("{set:?}: {fourth:?}");
        assert!(third.launches > 100, "{set:?}");
        assert_eq!((third.reads, third.allocations), (0, 0), "{set:?}");
        assert_eq!(third, fourth, "{set:?}");
        // Of each micro-batch: tokens, targets, first keys, the loss's share, two lists of coefficients; of each MoE layer a flag, once
        // more where it is computed again, the decay of the default vectors, and a factor where gradients meet.
        assert!(
            third.uploads <= 2 * (6 + 2 * 4),
            "{set:?}: {} uploads",
            third.uploads
        );
    }
}

#[test]
fn a_step_that_is_not_finite_leaves_weights_moments_and_state_as_they_were() {
    let _alone = alone();
    for router in ["topk", "default", "lossfree"] {
        let mut run = Run::new(&[&format!("router.name={router}")]);
        for _ in 0..2 {
            assert_eq!(run.step().1, None, "{router}");
        }
        // The embedding of a byte that the next step reads.
        let tokens = run.tokens();
        let (width, byte) = (
            run.model.config().hidden,
            tokens.tokens[tokens.tokens.len() / 2 + 5] as usize,
        );
        let kept = run.model.parameters[0].value.clone();
        let embedding = &mut run.model.parameters[0].value;
        embedding.change(|w| w.slice_mut::<f32>()[byte * width] = f32::NAN);
        let before = bits(&run.state());
        let (_, refused) = run.step();
        let refused = refused.expect("a step with a NaN was accepted");
        assert!(
            refused.starts_with("router logits of MoE layer 0, token "),
            "{refused}"
        );
        assert_eq!(run.trainer.optimizer.steps(), 2, "{router}");
        assert!(bits(&run.state()) == before, "{router}: something changed");
        run.model.parameters[0].value = kept;
        assert_eq!(run.step().1, None, "{router}");
        assert!(bits(&run.state()) != before, "{router}: nothing changed");
    }
}

fn bits(numbers: &[Vec<f64>]) -> Vec<u64> {
    numbers.iter().flatten().map(|x| x.to_bits()).collect()
}

#[test]
fn the_device_is_that_of_the_counters() {
    let _alone = alone();
    assert_eq!(Run::new(&[]).model.device(), Device::Sim);
}

#[test]
fn the_planned_memory_is_what_a_step_takes() {
    let _alone = alone();
    for set in [
        &["router.name=topk"][..],
        &["router.name=default", "model.top_k=2"],
        &["router.name=default", "train.recompute=true"],
        &["router.name=dense"],
    ] {
        take_peak(Device::Sim);
        let begun = take_peak(Device::Sim);
        let mut run = Run::new(set);
        run.step();
        run.step();
        let found = take_peak(Device::Sim) - begun;
        let planned = Memory::of(&run.config, Target::H200);
        let ratio = planned.total() as f64 / found as f64;
        println!(
            "{set:?}: {found} bytes, planned {} ({ratio:.3}): {planned:?}",
            planned.total()
        );
        assert!((0.97..=1.03).contains(&ratio), "{set:?}: {ratio:.3}");
    }
}
