//! How fast whole steps are: tokens a second, the share of the GPU's peak, memory beside the plan, time by kernel.

use super::outcome::Outcome;
use super::steps::{WARM, memory_judged, planned, strict_trainer, uncaptured, unplanned};
use crate::config::{Config, count};
use crate::device::Device;
use crate::device::machine::{Chip, h200};
use crate::device::timeline::{self, Timeline};
use crate::device::{counters, take_peak};
use crate::error::Result;
use crate::train::Trainer;
use crate::verify::bench::measure::median;
use serde_json::{Value, json};
use std::time::Instant;

/// Times `steps` steps by the clock on the wall, from report to report as in a run, and one more kernel by kernel.
///
/// # Errors
/// When a step cannot be taken.
pub fn time(config: Config, steps: u64, planted: bool) -> Result<Outcome> {
    let planned = planned(&config)?;
    let device = config.train.device;
    let tokens = config.train.sequences_per_step * config.model.sequence_length;
    let flops = count::flops_per_token(&config.model) as f64 * tokens as f64;
    take_peak(device);
    let before = take_peak(device);
    let begun = Instant::now();
    let mut training = strict_trainer(config)?;
    let ready = begun.elapsed().as_secs_f64();
    let held = planted.then(|| unplanned(&training)).transpose()?;
    let mut first = Vec::new();
    for _ in 0..WARM {
        first.push(timed(&mut training)?.0);
    }
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    counters::take();
    for _ in 0..steps {
        let (step, loss) = timed(&mut training)?;
        seconds.push(step);
        losses.push(loss);
    }
    let replays = counters::take().replays;
    training.step()?; // the one under way
    timeline::start()?;
    training.step()?;
    let timeline = timeline::finish()?;
    let peak = (take_peak(device) - before) as u64;
    drop(held);

    let (memory, unfit) = memory_judged(peak, planned);
    let (step, spread) = median(&seconds);
    let rate = tokens as f64 / step;
    let chip = chip(device);
    let share = chip.map(|chip| flops / step / chip.peak);
    let of_peak = chip
        .zip(share)
        .map(|(chip, share)| format!("{:.1}% of {:.0} TFLOP/s, ", 100.0 * share, chip.peak / 1e12));
    let text = format!(
        "{rate:.0} tokens/s, {step:.3} s a step of {tokens} tokens, {}{memory}",
        of_peak.unwrap_or_default(),
    );
    let measured = json!({
        "tokens_per_step": tokens, "flops_per_step": flops, "seconds_to_begin": ready, "seconds_of_first_steps": first,
        "seconds_of_each_step": seconds, "spread": spread, "tokens_per_second": rate, "tflops": flops / step / 1e12,
        "share_of_peak": share, "peak_bytes": peak, "planned_bytes": planned, "losses": losses,
        "replays": replays, "timeline": timeline.as_ref().map(of),
    });
    let wrong = [uncaptured(&training), unfit].into_iter().flatten();
    Ok(Outcome::judged(wrong, text, measured))
}

/// Whose peak it is; none for a GPU that is not in the table.
fn chip(device: Device) -> Option<&'static Chip> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda, Some(gpu)) = (device, crate::device::cuda::opened()) {
        return Chip::of_driver(&gpu.name);
    }
    (device != Device::Cuda).then(h200)
}

fn timed(training: &mut Trainer) -> Result<(f64, f64)> {
    let begun = Instant::now();
    let loss = training.step_overlapped()?.cross_entropy;
    Ok((begun.elapsed().as_secs_f64(), loss))
}

/// The timeline as a record has it; events around each launch make its step slower than the others.
fn of(timeline: &Timeline) -> Value {
    let kernels = timeline.entries.iter().map(|e| {
        json!({"launcher": e.launcher, "launches": e.launches, "milliseconds": 1e3 * e.seconds})
    });
    json!({
        "kernels": kernels.collect::<Vec<_>>(), "milliseconds": 1e3 * timeline.wall,
        "milliseconds_without_kernel": 1e3 * (timeline.wall - timeline.busy()),
        "copies_to_gpu": timeline.to_gpu, "copies_to_host": timeline.to_host,
    })
}
