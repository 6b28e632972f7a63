//! Hooks: when they are called, and which weights they see.

use routegrad::dist::{Collective, ThreadRank};
use routegrad::prelude::*;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

const SMALL: [&str; 9] = [
    "router.name=topk",
    "model.layers=2",
    "model.hidden=32",
    "model.heads=2",
    "model.head_dim=64",
    "model.sequence_length=16",
    "train.sequences_per_step=2",
    "train.micro_batch=2",
    "train.steps=6",
];

fn config(set: &[&str]) -> Config {
    routegrad::preset("tiny", &[&SMALL, set].concat()).unwrap()
}

type Calls = Rc<RefCell<Vec<String>>>;

/// Notes its calls; fails after step `fails`, if there is one.
struct Noting {
    name: &'static str,
    calls: Calls,
    fails: Option<u64>,
}

impl Noting {
    fn note(&self, call: &str, step: u64) {
        let text = format!("{} {call} {step}", self.name);
        self.calls.borrow_mut().push(text);
    }
}

impl Hook for Noting {
    fn start(&mut self, trainer: &Trainer) -> Result<()> {
        self.note("start", trainer.steps_done());
        Ok(())
    }

    fn before_step(&mut self, _trainer: &Trainer, step: u64) -> Result<()> {
        self.note("before", step);
        Ok(())
    }

    fn measure(&mut self, _trainer: &Trainer, record: &mut Record) -> Result<()> {
        self.note("measure", record.step);
        Ok(())
    }

    fn log(&mut self, _trainer: &Trainer, record: &Record) -> Result<()> {
        self.note("log", record.step);
        Ok(())
    }

    fn after_step(&mut self, _: &Trainer, _: &StepReport, record: &Record) -> Result<()> {
        self.note("after", record.step);
        match self.fails == Some(record.step) {
            true => Err(Error::invalid("hook", "no failure", "one", "none")),
            false => Ok(()),
        }
    }

    fn end(&mut self, trainer: &Trainer, outcome: Outcome) -> Result<()> {
        self.note(&format!("{outcome:?}"), trainer.steps_done());
        Ok(())
    }
}

fn trainer_of_two(set: &[&str], fails: Option<u64>) -> (Trainer, Calls) {
    let calls = Calls::default();
    let hook = |name, fails| Noting {
        name,
        calls: calls.clone(),
        fails,
    };
    let builder = Trainer::builder(config(set));
    let builder = builder.hook(hook("a", fails)).hook(hook("b", None));
    (builder.build().unwrap(), calls)
}

#[test]
fn each_call_reaches_all_hooks_in_their_order_before_the_next() {
    let (mut trainer, calls) = trainer_of_two(&["train.steps=2"], None);
    trainer.run(&AtomicBool::new(false)).unwrap();
    let mut expected = vec!["start 0".to_string()];
    for step in 1..=2 {
        expected.extend(["before", "measure", "log", "after"].map(|call| format!("{call} {step}")));
    }
    expected.push("Finished 2".into());
    let both = |call: &String| [format!("a {call}"), format!("b {call}")];
    let expected: Vec<String> = expected.iter().flat_map(both).collect();
    assert_eq!(*calls.borrow(), expected);
}

#[test]
fn a_hook_that_fails_after_a_step_ends_the_run_when_the_others_were_called() {
    let (mut trainer, calls) = trainer_of_two(&[], Some(3));
    let error = trainer.run(&AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("no failure"), "{error}");
    assert_eq!(calls.borrow().last().unwrap(), "b after 3");
}

/// A hook that runs on every rank and makes a collective call; on one rank it may fail before the call.
struct Meeting {
    fails: bool,
    meet: fn(&dyn Collective) -> Result<()>,
}

impl Hook for Meeting {
    fn on_every_rank(&self) -> bool {
        true
    }

    fn after_step(&mut self, trainer: &Trainer, _: &StepReport, _: &Record) -> Result<()> {
        if self.fails {
            return Err(Error::invalid("a", "b", "what is planted", "d"));
        }
        (self.meet)(trainer.model.dist())
    }
}

#[test]
fn the_error_of_a_hook_of_every_rank_is_not_replaced_by_that_of_a_later_hook() {
    let errors = ThreadRank::run(2, |rank| {
        let first = Meeting {
            fails: rank.rank() == 1,
            meet: |dist| dist.barrier(),
        };
        let second = Meeting {
            fails: false,
            meet: |dist| dist.sum(&mut [1.0]),
        };
        let builder = Trainer::builder(config(&[])).ranks(Arc::new(rank));
        let mut trainer = builder.hook(first).hook(second).build().unwrap();
        let error = trainer.run(&AtomicBool::new(false)).unwrap_err();
        error.to_string()
    });
    assert!(errors[1].contains("what is planted"), "{errors:?}");
}

/// Asks to stop after step 4.
struct StopAfterFour;

impl Hook for StopAfterFour {
    fn after_step(&mut self, trainer: &Trainer, _: &StepReport, record: &Record) -> Result<()> {
        if record.step == 4 {
            trainer.request_stop();
        }
        Ok(())
    }
}

#[test]
fn a_hook_ends_a_run_early_and_the_run_goes_on_when_it_is_asked_to() {
    let builder = Trainer::builder(config(&[])).hook(StopAfterFour);
    let mut trainer = builder.build().unwrap();
    let summary = trainer.run(&AtomicBool::new(false)).unwrap();
    assert_eq!((summary.outcome, summary.step), (Outcome::Stopped, 4));
    let summary = trainer.run(&AtomicBool::new(false)).unwrap();
    assert_eq!((summary.outcome, summary.step), (Outcome::Finished, 6));
}

/// Digests what training changes, after every second step.
struct Watching(Rc<RefCell<Vec<(u64, blake3::Hash)>>>);

fn digest(trainer: &Trainer) -> blake3::Hash {
    let mut all = blake3::Hasher::new();
    for (_, hash) in trainer.digests().unwrap() {
        all.update(hash.as_bytes());
    }
    all.finalize()
}

impl Hook for Watching {
    fn needs_model(&self, _config: &Config, step: u64) -> bool {
        step % 2 == 0
    }

    fn after_step(&mut self, trainer: &Trainer, _: &StepReport, record: &Record) -> Result<()> {
        if record.step % 2 == 0 {
            self.0.borrow_mut().push((record.step, digest(trainer)));
        }
        Ok(())
    }
}

/// On a device with kernels other steps are launched before the results of the one before are read.
#[test]
fn a_hook_that_needs_the_model_sees_the_weights_of_its_step() {
    for device in ["cpu", "sim"] {
        let device = format!("train.device={device}");
        let seen = Rc::default();
        let builder = Trainer::builder(config(&[&device])).hook(Watching(Rc::clone(&seen)));
        let mut trainer = builder.build().unwrap();
        trainer.run(&AtomicBool::new(false)).unwrap();
        let mut alone = Trainer::new(config(&[&device])).unwrap();
        let mut expected = Vec::new();
        for step in 1..=6 {
            alone.step().unwrap();
            if step % 2 == 0 {
                expected.push((step, digest(&alone)));
            }
        }
        assert_eq!(*seen.borrow(), expected, "{device}");
    }
}

/// On the CPU a step has one store of gradients.
#[test]
fn steps_are_finished_in_order_and_on_the_cpu_before_the_next_is_launched() {
    let mut trainer = Trainer::new(config(&[])).unwrap();
    let first = trainer.launch().unwrap();
    let error = trainer.launch().map(drop).unwrap_err().to_string();
    assert!(error.contains("call of finish with step 1"), "{error}");
    trainer.finish(first).unwrap();
    assert_eq!(trainer.steps_done(), 1);
    let mut trainer = Trainer::new(config(&["train.device=sim"])).unwrap();
    let (first, second) = (trainer.launch().unwrap(), trainer.launch().unwrap());
    let error = trainer.finish(second).map(drop).unwrap_err().to_string();
    assert!(error.contains("call of finish with step 1"), "{error}");
    trainer.finish(first).unwrap();
}

#[test]
fn values_that_were_set_by_hand_are_checked_when_a_trainer_is_built() {
    let mut config = config(&[]);
    config.train.micro_batch = 0;
    let error = Trainer::new(config).map(drop).unwrap_err().to_string();
    assert!(error.contains("train.micro_batch"), "{error}");
}
