//! The benchmark's core set as the last task of the queue. It writes its own records, `bench-MACHINE.jsonl`, in the same
//! folder.

use super::outcome::Outcome;
use super::place::Place;
use super::program::this_program;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::report::records::now;
use crate::verify::bench::page::CEILINGS;
use crate::verify::bench::record::{OURS, Record, Records};
use serde_json::json;
use std::process::{Command, Stdio};

/// Time limit of the benchmark in seconds, including the peers in Python.
pub const SECONDS: f64 = 420.0;
/// Environment variable with a command that measures our kernels and the peers in one run; its arguments are seconds and
/// folder. In a bundle it is `run.sh bench`.
pub const VARIABLE: &str = "ROUTEGRAD_BENCH";
/// Environment variable that sets the identifier of the run.
const RUN: &str = "ROUTEGRAD_RUN";

/// Runs the benchmark and counts the records that it wrote. `planted`: selects a case name that does not exist.
///
/// # Errors
/// When the command cannot be started, or the records cannot be read.
pub fn check(place: &Place) -> Result<Outcome> {
    let run = std::env::var(RUN).unwrap_or_else(|_| now());
    let mut command = command(place)?;
    command.env(RUN, &run);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.status();
    let status = status.map_err(|e| Error::io("start", command.get_program(), e))?;
    let records = Records::open(&place.out)?;
    let of_run = |r: &&Record| r.run == run && r.family != CEILINGS;
    let (ours, peers): (Vec<&Record>, Vec<&Record>) =
        (records.iter().filter(of_run)).partition(|r| r.implementation == OURS);
    let failed: Vec<&str> = ours
        .iter()
        .filter(|r| r.timing.is_none())
        .map(|r| r.case.as_str())
        .collect();
    let compared = peers.iter().filter(|r| r.timing.is_some()).count();
    let wrong = if !status.success() {
        Some(format!("the bench ended with {status}"))
    } else if let Some(first) = failed.first() {
        Some(format!("{} cases did not run, {first} first", failed.len()))
    } else {
        ours.is_empty().then(|| "no case was measured".to_string())
    };
    let text = format!(
        "{} cases, {compared} timings of peers, run {run}",
        ours.len()
    );
    let measured =
        json!({"run": run, "cases": ours.len(), "timings_of_peers": compared, "failed": failed});
    Ok(Outcome::judged(wrong, text, measured))
}

fn command(place: &Place) -> Result<Command> {
    if let Some(script) = std::env::var_os(VARIABLE).filter(|_| place.device == Device::Cuda) {
        let mut command = Command::new(script);
        command.args(["bench", &format!("{SECONDS:.0}")]);
        command.arg(&place.out);
        return Ok(command);
    }
    let mut command = this_program()?;
    command.args(["bench", "--device", &place.device.to_string()]);
    command.args(["--budget", &format!("{SECONDS:.0}")]);
    command.arg("--out").arg(&place.out);
    match (place.device, place.planted) {
        (_, true) => command.args(["--only", "no such case"]),
        (Device::Sim, _) => command.args(["--only", "combine small 8c1"]),
        _ => &mut command,
    };
    Ok(command)
}
