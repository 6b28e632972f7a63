//! Checks that a run that is killed and resumed continues exactly as if it had not been interrupted, and measures the cost
//! of saving.
//!
//! The task runs the command `train` as a user does, and observes the log that it writes.

use super::outcome::Outcome;
use super::place::Place;
use super::program::{self, Folder, Killed, last_lines, step_record};
use super::steps::StepCase;
use crate::error::{Error, Result};
use crate::report::metrics::{Record, Saved};
use crate::report::size;
use crate::train::{CHECKPOINTS, METRICS_FILE};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// The step after which a checkpoint is saved. The run is killed after `case.steps` steps, and again after the same step
/// once it was resumed.
const SAVED: usize = 3;

/// Runs, kills, resumes and compares. `planted`: a byte of the checkpoint is changed before resuming.
///
/// # Errors
/// When a run ends before it is killed, or a file cannot be read.
pub fn check(case: &StepCase, place: &Place) -> Result<Outcome> {
    let folder = Folder::new("resumes", &place.out)?;
    let mut first = ["--preset", case.preset, "--steps", "1000"]
        .map(String::from)
        .to_vec();
    let intervals = [
        format!("train.checkpoint_interval={SAVED}"),
        "train.eval_interval=100000".into(),
    ];
    for set in case.set.iter().chain(&intervals) {
        first.extend(["--set".to_string(), set.clone()]);
    }
    let saved = folder.0.join(CHECKPOINTS).join(format!("step-{SAVED}"));
    let steps = case.steps as usize;
    let before = Watched::run(&folder.0, place, &first, steps, true)?;
    if place.planted {
        damage(&saved.join("model.safetensors"))?;
    }
    let again = ["--resume", "--no-checkpoint"].map(String::from);
    let after = Watched::run(&folder.0, place, &again, steps, false)?;

    let records = before.records()?;
    let seconds = |step: usize| records[step - 1].seconds;
    let Some(saved) = before.saved()? else {
        unreachable!("the run was watched until it told of it")
    };
    // The same time as seen from outside: a line is written when its step is done, before the step is saved.
    let seen = before.until(SAVED + 1) - before.until(SAVED) - seconds(SAVED + 1);
    let interval = case.config(place.device)?.train.checkpoint_interval;
    let blocked = saved.blocked_seconds;
    let share = blocked / (blocked + interval as f64 * seconds(SAVED));
    let text = format!(
        "resumed at step {SAVED} in {:.1} s and equal to the run before; saving {} blocked {blocked:.2} s and took \
         {:.1} s, {:.2}% of the time at every {interval} of these steps",
        after.until(SAVED + 1),
        size(saved.bytes),
        saved.write_seconds,
        100.0 * share,
    );
    let measured = json!({
        "saved": saved, "blocked_seconds_seen": seen,
        "seconds_of_each_step": records.iter().map(|r| r.seconds).collect::<Vec<_>>(),
        "share_of_time_blocked": share, "steps_between_checkpoints": interval,
        "seconds_to_the_first_step": before.until(1), "seconds_to_the_first_step_resumed": after.until(SAVED + 1),
    });
    Ok(Outcome::judged(differs(&before, &after)?, text, measured))
}

/// Returns what is wrong with the log of the resumed run.
fn differs(before: &Watched, after: &Watched) -> Result<Option<String>> {
    // The lines must be equal byte for byte, including times, since these steps were not repeated.
    if before.lines[..SAVED] != after.lines[..SAVED] {
        let from = "it started from step 0 instead of its checkpoint";
        return Ok(Some(format!(
            "the resumed run did the first {SAVED} steps again: {from}"
        )));
    }
    let untimed = |records: Vec<Record>| -> Vec<Record> {
        let untimed = |r: Record| Record {
            seconds: 0.0,
            tokens_per_second: 0.0,
            saved: Vec::new(),
            ..r
        };
        records.into_iter().map(untimed).collect()
    };
    let (a, b) = (untimed(before.records()?), untimed(after.records()?));
    let first = a.iter().zip(&b).find(|(a, b)| a != b);
    Ok(first.map(|(a, b)| {
        let (step, before, after) = (a.step, a.loss, b.loss);
        format!("step {step} differs after resuming: loss {after:?}, before {before:?}")
    }))
}

/// A run up to the step at which it was killed.
struct Watched {
    begun: Instant,
    /// The lines of its log, and the time at which each appeared.
    lines: Vec<String>,
    times: Vec<Instant>,
}

impl Watched {
    /// Trains until the log has `steps` lines and, if `saves`, reports the checkpoint; then kills the process.
    fn run(
        out: &Path,
        place: &Place,
        arguments: &[String],
        steps: usize,
        saves: bool,
    ) -> Result<Self> {
        let errors = out.with_extension("stderr");
        let file = fs::File::create(&errors).map_err(|e| Error::io("create", &errors, e))?;
        let begun = Instant::now();
        let mut command = program::train(place, out)?;
        let mut child = Killed(program::start(command.args(arguments).stderr(file))?);
        let log = out.join(METRICS_FILE);
        let mut watched = Watched {
            begun,
            lines: Vec::new(),
            times: Vec::new(),
        };
        // Until the resumed run opens its log, the log may contain lines after the checkpoint.
        let stale = fs::read_to_string(&log).unwrap_or_default();
        loop {
            let ended = child.0.try_wait();
            let ended = ended.map_err(|e| Error::io("watch", command.get_program(), e))?;
            let text = fs::read_to_string(&log).unwrap_or_default();
            if text != stale {
                watched.look(&text);
            }
            let saved = !saves || watched.saved()?.is_some();
            if watched.lines.len() >= steps && saved {
                return Ok(watched);
            }
            if let Some(status) = ended {
                let said = fs::read_to_string(&errors).unwrap_or_default();
                let (steps_done, last) = (watched.lines.len(), last_lines(&said, 3));
                let got = format!("{status} after {steps_done} steps: {last}");
                let help = "its last lines of output give the reason";
                return Err(Error::invalid("train", format!("{steps} steps"), got, help));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn look(&mut self, text: &str) {
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.lines = text[..whole].lines().map(String::from).collect();
        self.times.truncate(self.lines.len());
        self.times.resize(self.lines.len(), Instant::now());
    }

    fn records(&self) -> Result<Vec<Record>> {
        let parse = |line: &String| step_record(METRICS_FILE.as_ref(), line);
        self.lines.iter().map(parse).collect()
    }

    /// Returns the seconds from the start until a step was done.
    fn until(&self, step: usize) -> f64 {
        self.times[step - 1]
            .duration_since(self.begun)
            .as_secs_f64()
    }

    /// Returns what the log reports about the checkpoint.
    fn saved(&self) -> Result<Option<Saved>> {
        let all = self.records()?.into_iter().flat_map(|r| r.saved);
        Ok(all.into_iter().find(|saved| saved.step == SAVED as u64))
    }
}

/// Changes a byte in the middle of a file.
fn damage(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).map_err(|e| Error::io("write", path, e))
}
