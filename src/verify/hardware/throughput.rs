//! Measures the speed of complete steps: tokens per second, the share of the GPU's peak, the memory compared with the
//! plan, and the time of each kernel.

use super::FOLDER;
use super::kind::Kind;
use super::outcome::Outcome;
use super::record::{Ending, Records};
use super::steps::{WARM, memory_judged, planned, strict_trainer, uncaptured, unplanned};
use crate::config::{Config, count};
use crate::device::Device;
use crate::device::machine::{Chip, h200};
use crate::device::timeline::{self, Timeline};
use crate::device::{counters, take_peak};
use crate::error::Result;
use crate::routers::LayerStats;
use crate::train::Trainer;
use crate::train::hooks::progress::busiest;
use crate::train::step::StepReport;
use crate::verify::bench::measure::median;
use serde_json::{Value, json};
use std::cmp::Reverse;
use std::path::Path;
use std::time::Instant;

/// Number of steps on two sequences before the timed steps, on a GPU and on the simulator. An untrained router sends
/// nearly all tokens of a layer to one expert; after 30 steps, in `tiny`, the most frequent of eight experts gets a
/// quarter of the tokens.
const PRACTICE: [usize; 2] = [40, 2];

/// Times `steps` steps with the wall clock, from report to report as in a run, and one more step kernel by kernel.
///
/// # Errors
/// When a step fails.
pub fn time(config: Config, steps: u64, planted: bool) -> Result<Outcome> {
    let planned = planned(&config)?;
    let device = config.train.device;
    let micro_batch = config.train.micro_batch;
    let tokens = config.train.sequences_per_step * config.model.sequence_length;
    let flops = count::flops_per_token(&config.model) as f64 * tokens as f64;
    take_peak(device);
    let before = take_peak(device);
    let begun = Instant::now();
    let mut training = strict_trainer(config)?;
    let ready = begun.elapsed().as_secs_f64();
    let held = planted.then(|| unplanned(&training)).transpose()?;
    for _ in 0..PRACTICE[usize::from(device == Device::Sim)] {
        training.practise(2)?;
    }
    let mut first = Vec::new();
    for _ in 0..WARM {
        first.push(timed(&mut training)?.0);
    }
    let (mut seconds, mut losses, mut loads) = (Vec::new(), Vec::new(), Vec::new());
    counters::take();
    for _ in 0..steps {
        let (step, report) = timed(&mut training)?;
        seconds.push(step);
        losses.push(report.cross_entropy);
        let counts = |layer: &LayerStats| layer.counts.iter().map(|n| *n as u64).collect();
        let load: Vec<Vec<u64>> = report.layers.iter().map(counts).collect();
        loads.push(busiest(&load));
    }
    let replays = counters::take().replays;
    training.step()?; // the step in progress
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
        "tokens_per_step": tokens, "micro_batch": micro_batch, "flops_per_step": flops,
        "seconds_to_begin": ready, "seconds_of_first_steps": first,
        "seconds_of_each_step": seconds, "spread": spread, "tokens_per_second": rate, "tflops": flops / step / 1e12,
        "share_of_peak": share, "peak_bytes": peak, "planned_bytes": planned, "losses": losses,
        "busiest_expert": loads, "replays": replays, "timeline": timeline.as_ref().map(of),
    });
    let wrong = [uncaptured(&training), unfit].into_iter().flatten();
    Ok(Outcome::judged(wrong, text, measured))
}

/// The project's own records, for when the program runs outside of its folder.
const OF_THE_PROJECT: &str = include_str!("../../../benches/results/hardware-nvidia-h200.jsonl");

/// Returns the FLOP/s that training steps reached on a GPU, and a description of the record.
///
/// The records of this GPU are read from `folder`; if there is no [`FOLDER`], the records embedded in the program are
/// used. Records of the same router are preferred to others; among them, the one whose FLOPs per token are nearest to
/// `flops_per_token`, then the one with the nearest micro-batch, then the newest. Returns `None` without a record.
///
/// # Errors
/// When a file cannot be read, or a line is not a record.
pub fn recorded(
    folder: &Path,
    gpu: &str,
    router: &str,
    flops_per_token: u64,
    micro_batch: usize,
) -> Result<Option<(f64, String)>> {
    let verb = format!("{}: ", Kind::Throughput.verb());
    let mut records = Records::open(folder)?;
    if folder == Path::new(FOLDER) && !folder.exists() {
        records.read_text(folder, OF_THE_PROJECT)?;
    }
    let candidates = records.iter().filter_map(|record| {
        let case = record.task.strip_prefix(&verb)?;
        let number = |key: &str| record.measured[key].as_f64();
        let rate = 1e12 * number("tflops")?;
        let own = number("flops_per_step")? / number("tokens_per_step")?;
        let passed = record.ending == Ending::Passed && record.gpu == gpu;
        let other = !case.split(' ').any(|word| word == router);
        let apart = |own: f64, wanted: f64| (own / wanted).ln().abs();
        let flops_apart = apart(own, flops_per_token as f64);
        let sequences = number("micro_batch").unwrap_or(f64::INFINITY);
        // Distances are not negative, so their bits have the same order as the numbers.
        let distances = [flops_apart, apart(sequences, micro_batch as f64)].map(f64::to_bits);
        let order = (other, distances, Reverse(&record.date));
        (passed && rate > 0.0 && flops_apart.is_finite()).then_some((order, record, case, rate))
    });
    let nearest = candidates.min_by(|a, b| a.0.cmp(&b.0));
    Ok(nearest.map(|(_, record, case, rate)| {
        let day = record.date.split('T').next().unwrap_or_default();
        (rate, format!("as {case} on one {gpu}, recorded on {day}"))
    }))
}

/// Returns the GPU's data for its peak rate; `None` for a GPU that is not in the table.
fn chip(device: Device) -> Option<&'static Chip> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda, Some(gpu)) = (device, crate::device::cuda::opened()) {
        return Chip::of_driver(&gpu.name);
    }
    (device != Device::Cuda).then(h200)
}

/// Returns the seconds and the report of a step.
fn timed(training: &mut Trainer) -> Result<(f64, StepReport)> {
    let begun = Instant::now();
    let report = training.step_overlapped()?;
    Ok((begun.elapsed().as_secs_f64(), report))
}

/// Returns the timeline in the format of a record. Events around each launch make its step slower than the others.
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

#[cfg(test)]
mod tests {
    use super::super::record::Record;
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn the_nearest_recorded_step_of_the_same_router_and_gpu_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(folder.path()).unwrap();
        let mut add = |gpu: &str, case: &str, code: &str, ending, day: u32, tflops: f64| {
            let tokens = if case.starts_with("557m") { 1e3 } else { 1e2 };
            let micro_batch = if case.ends_with("32") { 32 } else { 8 };
            let date = format!("2026-11-{day}T10:00:00Z");
            records.insert(Record {
                gpu: gpu.into(),
                ending,
                measured: json!({
                    "tflops": tflops, "flops_per_step": 1e12, "tokens_per_step": tokens, "micro_batch": micro_batch,
                }),
                ..record(&format!("trains: {case}"), code, &date)
            });
        };
        let (h200, passed) = ("NVIDIA H200", Ending::Passed);
        let in_32 = "557m default in micro-batches of 32";
        add(h200, "557m default", "a", passed, 20, 200.0);
        add(h200, "557m default", "b", passed, 21, 210.0);
        add(h200, "557m default", "c", Ending::Failed, 22, 900.0);
        add(h200, in_32, "b", passed, 22, 250.0);
        add(h200, "7.33b default", "a", passed, 20, 300.0);
        add(h200, "557m topk", "a", passed, 20, 220.0);
        add("NVIDIA B200", "557m default", "a", passed, 23, 500.0);
        records.save_all().unwrap();
        let of = |gpu: &str, router: &str, flops: f64, micro_batch| {
            recorded(folder.path(), gpu, router, flops as u64, micro_batch).unwrap()
        };
        let found = |gpu, router, flops| of(gpu, router, flops, 8);
        let (rate, from) = found(h200, "default", 2e9).unwrap();
        assert_eq!(rate, 210e12);
        assert_eq!(
            from,
            "as 557m default on one NVIDIA H200, recorded on 2026-11-21"
        );
        assert_eq!(of(h200, "default", 2e9, 64).unwrap().0, 250e12);
        assert_eq!(found(h200, "default", 9e9).unwrap().0, 300e12);
        assert_eq!(found(h200, "topk", 9e9).unwrap().0, 220e12);
        assert_eq!(found(h200, "dense", 9e9).unwrap().0, 300e12);
        assert_eq!(found("NVIDIA A100-SXM4-80GB", "topk", 1e9), None);
    }
}
