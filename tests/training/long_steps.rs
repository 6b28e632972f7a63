//! A run that is told to stop in a step that takes long leaves it undone after a micro-batch.

use crate::common::{Place, assert_same_end};
use routegrad::dist::{Collective, ThreadRank};
use routegrad::prelude::*;
use routegrad::routers::topk::TopK;
use signal_hook::consts::SIGUSR1;
use std::path::Path;
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const SEQUENCES: usize = 512;
const STEPS: u64 = 3;

/// `topk`, but slow where it is told to be.
#[derive(Default)]
struct Slow;

static SLOW: AtomicBool = AtomicBool::new(false);

impl Router for Slow {
    fn route(&self, tape: &Tape, x: &Var, w: &Var, layer: &mut LayerPass) -> Result<Routing> {
        if SLOW.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(50));
        }
        TopK::default().route(tape, x, w, layer)
    }
}

/// In the second step the router is slow, and after a moment `act` is called.
struct InSecondStep<F>(F);

impl<F: Fn() + Clone + Send + 'static> Hook for InSecondStep<F> {
    fn on_every_rank(&self) -> bool {
        true
    }

    fn before_step(&mut self, _: &Trainer, step: u64) -> Result<()> {
        if step == 2 {
            SLOW.store(true, Ordering::SeqCst);
            let act = self.0.clone();
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(200));
                act();
            });
        }
        Ok(())
    }
}

fn config() -> Config {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        routers::register(RouterInfo::new::<Slow>("slow", "topk that takes its time")).unwrap();
    });
    let batch = format!("train.sequences_per_step={SEQUENCES}");
    let steps = format!("train.steps={STEPS}");
    routegrad::preset(
        "tiny",
        &[
            "router.name=slow",
            "model.layers=2",
            "model.hidden=16",
            "model.heads=2",
            "model.expert_ffn_width=8",
            "model.dense_ffn_width=8",
            "model.sequence_length=8",
            "train.micro_batch=2",
            "train.eval_interval=100",
            &batch,
            &steps,
        ],
    )
    .unwrap()
}

/// Trains from where the run in `out` is, told to stop by `stop`, with `act` in its second step.
fn train(
    out: &Path,
    dist: Arc<dyn Collective>,
    stop: &AtomicBool,
    act: Option<impl Fn() + Clone + Send + 'static>,
) -> (Outcome, u64) {
    let mut builder = Trainer::builder(config()).ranks(dist);
    if let Some(act) = act {
        builder = builder.hook(InSecondStep(act));
    }
    let mut options = RunOptions::new(out).resumed();
    options.quiet = true;
    let mut trainer = builder.run_folder(options).build().unwrap();
    let summary = trainer.run(stop).unwrap();
    (summary.outcome, summary.step)
}

/// The rest of a run, undisturbed.
fn finish(out: &Path, dist: Arc<dyn Collective>) {
    let ended = train(out, dist, &AtomicBool::new(false), None::<fn()>);
    assert_eq!(ended, (Outcome::Finished, STEPS));
}

/// One test, as the router is slow in all runs of the process or in none.
#[test]
fn a_signal_in_a_long_step_stops_within_a_micro_batch_and_no_byte_is_another() {
    let place = Place::new();
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGUSR1, stop.clone()).unwrap();
    for ranks in [1, 2] {
        let (whole, cut) = (format!("whole-{ranks}"), format!("cut-{ranks}"));
        let [whole, cut] = [whole, cut].map(|name| place.path(&name));
        ThreadRank::run(ranks, |rank| finish(&whole, Arc::new(rank)));

        stop.store(false, Ordering::SeqCst);
        let begun = Instant::now();
        let ended = ThreadRank::run(ranks, |rank| {
            // One rank alone is told.
            let own = match rank.rank() {
                0 => Arc::new(AtomicBool::new(false)),
                _ => stop.clone(),
            };
            let own = if ranks == 1 { stop.clone() } else { own };
            let raise = || signal_hook::low_level::raise(SIGUSR1).unwrap();
            train(&cut, Arc::new(rank), &own, Some(raise))
        });
        let seconds = begun.elapsed().as_secs_f64();
        SLOW.store(false, Ordering::SeqCst);
        assert_eq!(ended, vec![(Outcome::Stopped, 1); ranks], "{seconds} s");
        let step = 0.05 * (SEQUENCES / 2) as f64;
        assert!(seconds < step, "{seconds} s of a step of {step} s");
        ThreadRank::run(ranks, |rank| finish(&cut, Arc::new(rank)));
        assert_same_end(&whole, &cut, STEPS);
    }
}
