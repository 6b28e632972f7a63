//! Compares every kernel with cuBLAS, PyTorch, the best open-source MoE kernels, and the lower bound for the machine.
//!
//! [`run`] measures on one machine in one run: [`case`] defines the cases; [`timed`] times them together with the
//! libraries of this process; `benches/peers/run.py` times the other peers on the same inputs ([`inputs`]) and writes the
//! same kind of records ([`record`]). [`page`] writes a report from recorded files, and [`baseline`] finds cases that became
//! slower.

pub mod baseline;
pub mod case;
pub mod ceilings;
#[cfg(feature = "cuda")]
pub mod cublas;
mod dump;
pub mod figures;
pub mod groups;
mod hardware_records;
pub mod inputs;
mod kernels;
mod layer;
mod layer_launches;
pub mod measure;
pub(crate) mod mma_limits;
mod operations;
mod options;
pub mod page;
mod predict;
mod problem;
pub mod record;
pub mod roofline;
mod session;
mod step_costs;
pub(crate) mod step_predictions;
pub mod steps;
pub mod timed;

pub use dump::dump;
pub use hardware_records::read_all;
pub use options::Options;

use crate::device::Device;
use crate::error::{Error, Result};
use options::{estimate, groups};
use record::Records;
use session::Session;
use std::path::Path;

/// Checks whether this process has a GPU; returns a sentence with the reason if it has none.
fn gpu() -> Result<(), String> {
    #[cfg(feature = "cuda")]
    let found = crate::device::cuda::gpu()
        .map(drop)
        .map_err(|e| e.to_string());
    #[cfg(not(feature = "cuda"))]
    let found = Err("this build has no cuda device: build with --features cuda".into());
    found
}

/// Returns the devices to measure on, and a sentence with the reason if there is no GPU.
fn devices(wanted: Option<Device>) -> Result<(Vec<Device>, Option<String>)> {
    match (wanted, gpu()) {
        (Some(Device::Cuda), Err(why)) => {
            let help = "leave --device out, or run it on a machine with one: scripts/bundle makes a folder to carry there";
            Err(Error::invalid(
                "bench --device cuda",
                "an NVIDIA GPU from Ampere on",
                why,
                help,
            ))
        }
        (Some(device), _) => Ok((vec![device], None)),
        (None, Ok(())) => Ok((vec![Device::Cuda], None)),
        (None, Err(why)) => Ok((
            vec![Device::Cpu, Device::Sim],
            Some(format!(
                "no GPU was found ({why}): the CPU's operations, then the kernels on the simulator"
            )),
        )),
    }
}

/// Returns the cost model of products, fitted to the timings of `hardware-check` in a folder of records.
///
/// # Errors
/// When a file cannot be read, or there are too few timings.
pub fn predict(folder: &Path) -> Result<predict::Model> {
    predict::Model::new(&hardware_records::timed(folder)?)
}

/// Returns a list of the cases that would be measured, in order.
///
/// # Errors
/// When the requested device is not available.
pub fn list(options: &Options) -> Result<String> {
    let (devices, no_gpu) = match options.device {
        Some(device) => (vec![device], None),
        None => devices(None)?,
    };
    let mut text = no_gpu.map_or(String::new(), |why| why + "\n");
    let mut total = 0.0;
    for device in devices {
        for group in groups(options, device)? {
            let seconds = estimate(&group, device)?;
            total += seconds;
            for (i, case) in group
                .cases()?
                .iter()
                .filter(|c| options.wants(c))
                .enumerate()
            {
                let seconds = if i == 0 {
                    format!("{seconds:5.1} s")
                } else {
                    " ".repeat(7)
                };
                text += &format!("{:4}  {seconds}  {}\n", device.to_string(), case.name);
            }
        }
    }
    Ok(text + &format!("about {total:.0} s"))
}

/// Returns the cases as JSON lines, for implementations in other languages. The first line holds the values that all
/// records of the run share.
///
/// # Errors
/// As [`list`].
pub fn list_json(options: &Options) -> Result<String> {
    let mut lines = Vec::new();
    for device in devices(options.device)?.0 {
        let mut head = session::head(device);
        head["head"] = true.into();
        lines.push(head);
        for group in groups(options, device)? {
            let cases = group.cases()?;
            let cases = cases.iter().filter(|c| options.wants(c)).map(|c| {
                serde_json::json!({"case": c.name, "family": c.family, "flops": c.flops, "bytes": c.bytes()})
            });
            let cases: Vec<_> = cases.collect();
            let sizes = group.sizes()?;
            lines.push(serde_json::json!({"group": group.name, "device": device, "sizes": sizes, "cases": cases}));
        }
    }
    let lines: Vec<String> = lines.iter().map(|line| line.to_string()).collect();
    Ok(lines.join("\n"))
}

/// Measures and records all cases, and prints a line per case; then compares them with the baseline.
///
/// # Errors
/// When a device is not available, a group fails, a record cannot be written, or a case is slower than allowed.
pub fn run(options: &Options) -> Result<()> {
    let before = options.baseline.as_ref().map(|file| {
        let mut records = Records::open(Path::new(""))?;
        records.read(file)?;
        Ok::<_, Error>(records)
    });
    let before = before.transpose()?;
    let (devices, no_gpu) = devices(options.device)?;
    if let Some(why) = no_gpu {
        say!("{why}");
    }
    let mut session = Session::new(options)?;
    for device in devices {
        session.measure(device)?;
    }
    session.end()?;
    match before {
        Some(before) => judged(&before, &session, options),
        None => Ok(()),
    }
}

/// Minimum slowdown of a case that is listed, unless the user set another.
const NAMED: f64 = 0.05;

fn judged(before: &Records, session: &Session, options: &Options) -> Result<()> {
    let tolerance = options.fail_slower.unwrap_or(NAMED);
    let found = baseline::compare(before, session.measured.iter(), tolerance);
    say!(
        "{} cases are in the baseline too; {} of them are slower",
        found.compared,
        found.slower.len()
    );
    for slower in &found.slower {
        let doubt = if slower.doubtful {
            "  (its passes differ by more)"
        } else {
            ""
        };
        say!(
            "  {:.3} x the time of the baseline  {}{doubt}",
            slower.factor,
            slower.case
        );
    }
    if options.fail_slower.is_some() && found.compared == 0 {
        return Err(Error::invalid(
            "bench --fail-slower",
            "at least one case that is in the baseline too",
            "none",
            "choose a baseline of this machine and device, or other cases with --set and --only",
        ));
    }
    match (options.fail_slower, found.slower.first()) {
        (Some(allowed), Some(worst)) => Err(Error::invalid(
            "bench --fail-slower",
            format!(
                "no case more than {:.1}% slower than the baseline",
                100.0 * allowed
            ),
            format!(
                "{} that are, {} by {:.1}%",
                found.slower.len(),
                worst.case,
                100.0 * (worst.factor - 1.0)
            ),
            "measure again if the spread or the repeat ratio is large",
        )),
        _ => Ok(()),
    }
}
