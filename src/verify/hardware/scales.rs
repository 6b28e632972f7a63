//! Checks training on several GPUs of one machine: two runs must compute the same bytes. Measures how the speed grows with
//! the number of GPUs.
//!
//! The task runs the command `train` as a user does, with one process per GPU; the processes connect by TCP, without MPI.

use super::outcome::Outcome;
use super::place::{Place, gpu_count};
use super::program::{self, Folder, Killed, last_lines, step_record};
use super::record::Ending;
use super::steps::{StepCase, WARM, first_difference};
use crate::device::Device;
use crate::dist::nccl;
use crate::error::{Error, Result};
use crate::train::{CHECKPOINTS, METRICS_FILE};
use crate::verify::bench::measure::median;
use serde_json::json;
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;

/// The results of a run.
struct Ran {
    /// The records without times, and digests of the checkpoint's arrays.
    end: Vec<(String, String)>,
    /// Median over the steps after the first ones, without the last, which no next step overlaps.
    tokens_per_second: f64,
    seconds: Vec<f64>,
}

/// Trains twice on several processes and once on one process; each process has the same share of a batch. `planted`: the
/// second run uses another seed.
///
/// # Errors
/// When a process cannot be started or ends with an error.
pub fn check(case: &StepCase, place: &Place) -> Result<Outcome> {
    if let Some(why) = missing(case, place) {
        return Ok(Outcome::new(Ending::Unavailable, why));
    }
    let folder = Folder::new("scales", &place.out)?;
    fs::create_dir_all(&folder.0).map_err(|e| Error::io("create", &folder.0, e))?;
    let ranks = case.ranks;
    let first = train(case, place, &folder.0, ranks, 0)?;
    let second = train(case, place, &folder.0, ranks, u64::from(place.planted))?;
    let one = train(case, place, &folder.0, 1, 0)?;
    let differ = first_difference(&first.end, &second.end);
    let differ = differ.map(|what| format!("two runs on {ranks} ranks differ, first in {what}"));
    let share = first.tokens_per_second / (ranks as f64 * one.tokens_per_second);
    let right = format!(
        "{ranks} ranks give the same bytes twice; {:.0} tokens/s, one {:.0}: {:.1}% of linear scaling",
        first.tokens_per_second,
        one.tokens_per_second,
        100.0 * share,
    );
    let measured = json!({
        "ranks": ranks, "tokens_per_second": first.tokens_per_second, "tokens_per_second_of_one": one.tokens_per_second,
        "share_of_linear": share, "seconds_of_each_step": first.seconds, "seconds_of_each_step_of_one": one.seconds,
    });
    Ok(Outcome::judged(differ, right, measured))
}

/// Returns what the machine lacks for this task.
fn missing(case: &StepCase, place: &Place) -> Option<String> {
    if place.device != Device::Cuda {
        return None;
    }
    match gpu_count() {
        Err(why) => return Some(why),
        Ok(n) if n < case.ranks => {
            return Some(format!("{} GPUs are needed, {n} are here", case.ranks));
        }
        Ok(_) => {}
    }
    nccl::available(place.device)
        .err()
        .map(|why| why.to_string())
}

/// Trains one run to its end.
fn train(case: &StepCase, place: &Place, folder: &Path, ranks: usize, seed: u64) -> Result<Ran> {
    let out = folder.join("run");
    let config = case.config(place.device)?.train;
    let (batch, micro) = (config.sequences_per_step, config.micro_batch);
    let steps = WARM + case.steps;
    let mut set = case.set.clone();
    set.extend([
        format!("train.sequences_per_step={}", batch * ranks),
        format!("train.micro_batch={}", micro * ranks),
        format!("train.seed={}", config.seed + seed),
        format!("train.checkpoint_interval={steps}"),
        "train.eval_interval=100000".into(),
        "train.eval_sequences=1".into(),
    ]);
    // The port is closed again before rank 0 listens on it.
    let free = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    let port = free
        .map_err(|e| Error::io("find", "a free port", e))?
        .port();
    let start = |rank: usize| -> Result<Killed> {
        let mut command = program::train(place, &out)?;
        command.args(["--preset", case.preset, "--steps", &steps.to_string()]);
        command.args(set.iter().flat_map(|set| ["--set", set]));
        command.args(["--ranks", if ranks == 1 { "none" } else { "tcp" }]);
        let [rank, size, port] = [rank, ranks, port.into()].map(|n| n.to_string());
        command.envs([
            ("RANK", &*rank),
            ("LOCAL_RANK", &*rank),
            ("WORLD_SIZE", &*size),
            ("LOCAL_WORLD_SIZE", &*size),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29500"),
            ("ROUTEGRAD_RANKS_PORT", &*port),
        ]);
        program::start(command.stderr(Stdio::piped())).map(Killed)
    };
    let mut children = (0..ranks).map(start).collect::<Result<Vec<_>>>()?;
    // Each process prints little, so the pipes cannot become full; if a rank is lost, the others end.
    for child in &mut children {
        ended_well(child)?;
    }
    let ran = read(&out, steps)?;
    fs::remove_dir_all(&out).map_err(|e| Error::io("remove", &out, e))?;
    Ok(ran)
}

fn ended_well(child: &mut Killed) -> Result<()> {
    let status = child.0.wait();
    let status = status.map_err(|e| Error::io("watch", "a rank", e))?;
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = &mut child.0.stderr {
        let _ = stderr.read_to_string(&mut said);
    }
    Err(Error::invalid(
        "train",
        "a run to its end on every rank",
        format!("{status}: {}", last_lines(&said, 3)),
        "its last lines of output give the reason",
    ))
}

fn read(out: &Path, steps: u64) -> Result<Ran> {
    let log = out.join(METRICS_FILE);
    let text = fs::read_to_string(&log).map_err(|e| Error::io("read", &log, e))?;
    let records = text.lines().map(|line| step_record(&log, line));
    let records = records.collect::<Result<Vec<_>>>()?;
    let late = &records[WARM as usize..records.len() - 1];
    let rates: Vec<f64> = late.iter().map(|r| r.tokens_per_second).collect();
    let seconds = late.iter().map(|r| r.seconds).collect();
    let mut end: Vec<(String, String)> = records
        .iter()
        .map(|r| {
            let numbers = [r.loss, r.gradient_norm].map(|x| format!("{x:?}"));
            (format!("losses of step {}", r.step), numbers.concat())
        })
        .collect();
    let saved = out.join(CHECKPOINTS).join(format!("step-{steps}"));
    let entries = fs::read_dir(&saved).map_err(|e| Error::io("read", &saved, e))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for path in files
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
    {
        let mut hasher = blake3::Hasher::new();
        let file = fs::File::open(path).and_then(|file| hasher.update_reader(file).map(drop));
        file.map_err(|e| Error::io("read", path, e))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        end.push((name.into_owned(), hasher.finalize().to_hex().to_string()));
    }
    Ok(Ran {
        end,
        tokens_per_second: median(&rates).0,
        seconds,
    })
}
