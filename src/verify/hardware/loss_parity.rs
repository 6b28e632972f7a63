//! Compares the loss of a run on a device with kernels with the same run on the CPU. The CPU's loss curve was recorded
//! earlier, since it takes the CPU minutes, for which a GPU should not wait.

use super::outcome::Outcome;
use super::place::Place;
use super::steps::{self, StepCase};
use crate::device::Device;
use crate::device::machine;
use crate::error::{Error, Result};
use crate::report::records::now;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Subfolder for the curves in the folder of the records.
const CURVES: &str = "curves";
/// The mean loss of this number of last steps is compared, with this relative tolerance.
const LAST: usize = 20;
const TOLERANCE: f64 = 0.01;

/// The losses of a run on the CPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Curve {
    /// Name of the case.
    pub case: String,
    /// Name of the preset.
    pub preset: String,
    /// Keys that differ from the preset's. The curve is valid only for these settings.
    pub set: Vec<String>,
    /// Loss of each step in nats per token.
    pub losses: Vec<f64>,
    /// Time of the recording, UTC.
    pub date: String,
    /// Commit of the program.
    pub commit: String,
    /// Model of the CPU.
    pub processor: String,
    /// Seconds the run took.
    pub seconds: f64,
}

/// Returns the losses of the first `steps` steps.
///
/// # Errors
/// When a step fails.
pub fn losses(case: &StepCase, device: Device, steps: u64, faster: f64) -> Result<Vec<f64>> {
    let mut config = case.config(device)?;
    config.train.learning_rate *= faster;
    let mut training = steps::strict_trainer(config)?;
    (0..steps)
        .map(|_| Ok(training.step()?.cross_entropy))
        .collect()
}

impl Curve {
    /// Trains on the CPU and returns the curve.
    ///
    /// # Errors
    /// When a step fails.
    pub fn record(case: &StepCase) -> Result<Self> {
        let start = Instant::now();
        let losses = losses(case, Device::Cpu, case.steps, 1.0)?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(Self::of(case, losses, seconds))
    }

    fn of(case: &StepCase, losses: Vec<f64>, seconds: f64) -> Self {
        Curve {
            case: case.name.clone(),
            preset: case.preset.into(),
            set: case.set.clone(),
            losses,
            date: now(),
            commit: machine::commit(),
            processor: machine::processor(),
            seconds,
        }
    }

    /// Reads the recorded curve of `case`.
    ///
    /// # Errors
    /// When there is no curve, or it belongs to other settings.
    pub fn read(folder: &Path, case: &StepCase) -> Result<Self> {
        let path = path(folder, case);
        let help = "record it: routegrad hardware-check --record-curves";
        let text = std::fs::read_to_string(&path)
            .map_err(|e| Error::file(&path, "a curve of the processor", e.to_string(), help))?;
        let found: Curve = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, "a curve", e.to_string(), help))?;
        if found.preset != case.preset
            || found.set != case.set
            || found.losses.len() as u64 != case.steps
        {
            let run = |preset: &str, set: &[String], steps| {
                format!("{steps} steps of {preset} with {}", set.join(" "))
            };
            let expected = run(case.preset, &case.set, case.steps as usize);
            let got = run(&found.preset, &found.set, found.losses.len());
            return Err(Error::file(&path, expected, got, help));
        }
        Ok(found)
    }
}

fn path(folder: &Path, case: &StepCase) -> PathBuf {
    let name = case.name.replace(' ', "-");
    folder.join(CURVES).join(name).with_extension("json")
}

/// Records the CPU's curve of every case whose name contains `only`.
///
/// # Errors
/// When a step fails, or a file cannot be written.
pub fn record(folder: &Path, only: Option<&str>) -> Result<()> {
    let wanted = |case: &StepCase| only.is_none_or(|only| case.name.contains(only));
    for case in steps::curves().iter().filter(|case| wanted(case)) {
        let curve = Curve::record(case)?;
        let path = path(folder, case);
        let to = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(to).map_err(|e| Error::io("create", to, e))?;
        crate::report::files::publish(&path, crate::report::files::json(&path, &curve)?)?;
        say!(
            "{}: {} steps, {:.0} s",
            path.display(),
            case.steps,
            curve.seconds
        );
    }
    Ok(())
}

/// Trains on the device and compares. `planted`: uses half the learning rate.
///
/// # Errors
/// When a step fails, or there is no curve.
pub fn check(case: &StepCase, place: &Place) -> Result<Outcome> {
    let curve = match place.device {
        // The run for the simulator is short enough to train on the CPU immediately.
        Device::Sim => Curve::record(case)?,
        _ => Curve::read(&place.out, case)?,
    };
    let faster = if place.planted { 0.5 } else { 1.0 };
    let losses = losses(case, place.device, case.steps, faster)?;
    Ok(compared(&curve, &losses))
}

fn compared(curve: &Curve, losses: &[f64]) -> Outcome {
    let (theirs, ours) = (last(&curve.losses), last(losses));
    let apart = ours / theirs - 1.0;
    let percent = 100.0 * apart;
    let text = format!(
        "mean loss of the last {} of {} steps {ours:.4}, on the processor {theirs:.4}: {percent:+.3}%",
        LAST.min(losses.len()),
        losses.len(),
    );
    let wrong = (!(apart.abs() <= TOLERANCE)).then(|| {
        let most = 100.0 * TOLERANCE;
        format!("not within {most:.0}%: {text}")
    });
    let largest = (losses.iter().zip(&curve.losses))
        .map(|(a, b)| (a / b - 1.0).abs())
        .fold(0.0, f64::max);
    let measured = json!({
        "losses": losses, "processor": curve.losses, "relative_difference": apart,
        "largest_relative_difference_of_a_step": largest, "curve_of_commit": curve.commit,
    });
    Outcome::judged(wrong, text, measured)
}

/// Returns the mean of the last steps.
fn last(losses: &[f64]) -> f64 {
    let tail = &losses[losses.len().saturating_sub(LAST)..];
    tail.iter().sum::<f64>() / tail.len() as f64
}

#[cfg(test)]
mod tests {
    use super::super::FOLDER;
    use super::super::record::Ending;
    use super::*;

    #[test]
    fn the_recorded_curves_match_the_present_configuration_and_cpu_results() {
        for case in steps::curves() {
            let curve = Curve::read(Path::new(FOLDER), &case).unwrap();
            let now = losses(&case, Device::Cpu, 2, 1.0).unwrap();
            for (now, then) in now.iter().zip(&curve.losses) {
                let apart = (now / then - 1.0).abs();
                assert!(
                    apart <= 1e-3,
                    "{}: {now} today, {then} in the curve",
                    case.name
                );
            }
        }
    }

    #[test]
    fn a_loss_that_ends_higher_or_in_nan_does_not_agree() {
        let case = &steps::curves()[0];
        let losses = (0..100).map(|i| 5.0 - 0.02 * f64::from(i)).collect();
        let curve = Curve::of(case, losses, 0.0);
        assert_eq!(compared(&curve, &curve.losses).ending, Ending::Passed);
        for change in [0.98, 1.02, f64::NAN] {
            let mut losses = curve.losses.clone();
            losses[80..].iter_mut().for_each(|l| *l *= change);
            let found = compared(&curve, &losses);
            assert_eq!(found.ending, Ending::Failed, "{}", found.detail);
        }
        // Early steps have no effect.
        let mut losses = curve.losses.clone();
        losses[0] = 7.0;
        assert_eq!(compared(&curve, &losses).ending, Ending::Passed);
    }
}
