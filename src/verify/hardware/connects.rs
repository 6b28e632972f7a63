//! Checks NCCL calls in the graph of a step on a single GPU: one rank that gathers as several ranks do must compute the same
//! bytes as a step without the calls, and must not be slower by more than a limit. It sends nothing, because a rank sends
//! nothing to itself.

use super::outcome::Outcome;
use super::record::Ending;
use super::steps::{WARM, first_difference, uncaptured};
use crate::config::Config;
use crate::device::{Device, counters};
use crate::dist::nccl;
use crate::error::Result;
use crate::train::Trainer;
use crate::verify::bench::measure::median;
use serde_json::json;
use std::time::Instant;

/// Largest relative slowdown by the calls for steps of at least `LONG` seconds; in shorter steps the calls are most of the
/// work.
const SLOWER: f64 = 0.005;
const LONG: f64 = 0.05;

/// A run of [`WARM`] steps and some more.
struct Run {
    /// Of the losses of each step, then of everything that is trained.
    digests: Vec<(String, blake3::Hash)>,
    seconds: Vec<f64>,
    replays: u64,
    uncaptured: Option<String>,
}

/// Trains twice without NCCL and twice with it, in turn, and compares the runs. `planted`: the runs with NCCL use another
/// seed.
///
/// # Errors
/// When NCCL returns an error, or a step fails.
pub fn check(config: &Config, steps: u64, planted: bool) -> Result<Outcome> {
    let device = config.train.device;
    if let Err(why) = nccl::available(device) {
        return Ok(Outcome::new(Ending::Unavailable, why.to_string()));
    }
    let mut other = config.clone();
    other.train.seed += u64::from(planted);
    let (mut plain, mut connected) = (Vec::new(), Vec::new());
    let mut library = None;
    for _ in 0..2 {
        plain.push(run(config, false, steps)?.0);
        let (with, named) = run(&other, true, steps)?;
        connected.push(with);
        library = named;
    }
    let library = library.unwrap_or_default();
    let all = plain.iter().chain(&connected);
    let differ = |with: &Run| {
        let what = first_difference(&plain[0].digests, &with.digests)?;
        Some(format!(
            "a run with NCCL's calls differs from one without, first in {what}"
        ))
    };
    let differ = connected.iter().find_map(differ);
    let uncaptured = all.clone().find_map(|run| run.uncaptured.clone());
    let unreplayed = all.clone().any(|run| run.replays != steps);
    let unreplayed = unreplayed.then(|| "not every step replayed its graph".to_string());
    // Uses the faster half of the steps of each kind, so that other work on the machine has less effect.
    let best = |runs: &[Run]| {
        let medians = runs.iter().map(|run| median(&run.seconds).0);
        medians.fold(f64::INFINITY, f64::min)
    };
    let (without, with) = (best(&plain), best(&connected));
    let slower = with / without - 1.0;
    // Times on the simulator say nothing about a GPU.
    let judged = device == Device::Cuda && without >= LONG;
    let slow = (judged && !(slower <= SLOWER)).then(|| {
        format!(
            "a step is {:.2}% slower with NCCL's calls, more than {:.1}%",
            100.0 * slower,
            100.0 * SLOWER
        )
    });
    let right = format!(
        "{} steps with {library} in the graph give the bytes of steps without; a step takes {with:.5} s, without {without:.5} ({:+.2}%)",
        WARM + steps,
        100.0 * slower,
    );
    let measured = json!({
        "library": library, "steps": WARM + steps, "slower": slower,
        "seconds_with": connected.iter().map(|run| &run.seconds).collect::<Vec<_>>(),
        "seconds_without": plain.iter().map(|run| &run.seconds).collect::<Vec<_>>(),
    });
    let wrong = [differ, uncaptured, unreplayed, slow].into_iter().flatten();
    Ok(Outcome::judged(wrong, right, measured))
}

fn run(config: &Config, connected: bool, steps: u64) -> Result<(Run, Option<String>)> {
    let mut config = config.clone();
    config.train.max_skipped_steps = 1;
    let mut builder = Trainer::builder(config.clone());
    let mut library = None;
    if connected {
        let alone = nccl::alone(config.train.device)?;
        library = alone.device_library();
        builder = builder.ranks(alone);
    }
    let mut training = builder.build()?;
    let (mut digests, mut seconds) = (Vec::new(), Vec::new());
    for step in 1..=WARM + steps {
        if step == WARM + 1 {
            counters::take();
        }
        let begun = Instant::now();
        let report = training.step()?;
        let numbers = [report.cross_entropy, report.auxiliary, report.gradient_norm];
        seconds.push(begun.elapsed().as_secs_f64());
        let hash = blake3::hash(&numbers.map(f64::to_le_bytes).concat());
        digests.push((format!("losses and norm of step {step}"), hash));
    }
    let replays = counters::take().replays;
    digests.extend(training.digests()?);
    let found = Run {
        replays,
        digests,
        seconds: seconds.split_off(WARM as usize),
        uncaptured: uncaptured(&training),
    };
    Ok((found, library))
}
