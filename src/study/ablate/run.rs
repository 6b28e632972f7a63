//! The runs of a grid on disk: finds the unfinished runs and trains them.
//!
//! The folder `runs/NAME` of a run is equal to that of `train`, and an interrupted run is continued as `train --resume`
//! does. A grid that was killed and continued therefore results in the same bytes as one that was not.

use super::grid::Run;
use super::names::difference;
use crate::config::Config;
use crate::dist::{Collective, SingleRank};
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::metrics;
use crate::report::{in_plain_words, stderr_line};
use crate::study::hooks;
use crate::train::checkpoint::Checkpoint;
use crate::train::{self, Outcome};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Folder that holds the runs.
pub const RUNS: &str = "runs";
/// Folder with the error messages of failed runs, one file per run.
const FAILURES: &str = "failures";

/// The progress of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    New,
    /// Unfinished after this number of steps.
    Unfinished(u64),
    Finished,
    /// Stopped because too many consecutive steps were not finite; with the error message.
    Diverged(String),
    /// Stopped for another reason; with the error message.
    Failed(String),
}

/// Returns the folder of a run.
pub fn folder(out: &Path, name: &str) -> PathBuf {
    out.join(RUNS).join(name)
}

fn failure(out: &Path, name: &str) -> PathBuf {
    out.join(FAILURES).join(format!("{name}.txt"))
}

/// Returns the state of a run. It is finished if its log has all steps and its last checkpoint exists; a run that keeps no
/// checkpoints has no folder for them.
///
/// # Errors
/// When its folder holds a run with another configuration.
pub fn state(out: &Path, run: &Run) -> Result<State> {
    let place = folder(out, &run.name);
    if !holds_this(&place, run)? {
        return Ok(State::New);
    }
    let log = place.join(train::METRICS_FILE);
    let step = match log.exists() {
        true => metrics::read(&log)?.last().map_or(0, |r| r.step),
        false => 0,
    };
    let steps = run.config.train.steps;
    let checkpoints = place.join(train::CHECKPOINTS);
    let saved = || Checkpoint::open(&checkpoints.join(format!("step-{steps}"))).is_ok();
    if step == steps && (!checkpoints.exists() || saved()) {
        return Ok(State::Finished);
    }
    let said = fs::read_to_string(failure(out, &run.name)).unwrap_or_default();
    Ok(match said.trim().split_once(": ") {
        Some(("diverged", what)) => State::Diverged(what.into()),
        Some(("failed", what)) => State::Failed(what.into()),
        _ => State::Unfinished(step),
    })
}

/// Returns true if the folder holds this run, and false if it holds none.
fn holds_this(place: &Path, run: &Run) -> Result<bool> {
    let file = place.join(train::CONFIG_FILE);
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            if place.join(train::METRICS_FILE).exists() {
                let got = format!("a log without {}", train::CONFIG_FILE);
                return Err(foreign(place, &run.name, got));
            }
            return Ok(false);
        }
        Err(e) => return Err(Error::io("read", &file, e)),
    };
    let held: Config = toml::from_str(&text).map_err(|e| {
        foreign(
            &file,
            &run.name,
            in_plain_words(&e.message().lines().collect::<Vec<_>>().join(" ")),
        )
    })?;
    match difference(&held, &run.config) {
        None => Ok(true),
        Some([key, theirs, ours]) => Err(foreign(
            &file,
            &run.name,
            format!("one with {key} = {theirs} instead of {ours}"),
        )),
    }
}

fn foreign(path: &Path, name: &str, got: String) -> Error {
    Error::file(
        path,
        format!("the configuration of run {name}"),
        got,
        "restore the setting, or choose another --out",
    )
}

/// Returns the names in the folder of runs that do not belong to `runs`.
pub fn others(out: &Path, runs: &[Run]) -> Vec<String> {
    let entries = fs::read_dir(out.join(RUNS)).into_iter().flatten().flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names
        .filter(|n| !runs.iter().any(|r| r.name == *n))
        .collect();
    names.sort();
    names
}

/// Returns the indices of the unfinished runs, and prints how many are finished unless `quiet`.
///
/// # Errors
/// When a folder holds a different run.
pub fn open(out: &Path, runs: &[Run], quiet: bool) -> Result<Vec<usize>> {
    let mut open = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        if state(out, run)? != State::Finished {
            open.push(i);
        }
    }
    if open.len() < runs.len() && !quiet {
        stderr_line(&format!(
            "{} of {} runs are done",
            runs.len() - open.len(),
            runs.len()
        ));
    }
    Ok(open)
}

/// Trains all unfinished runs, `jobs` at a time, each with an equal share of the threads. A run that fails leaves a file
/// with its message and does not stop the others. Returns false if `stop` was set before the end; the current runs are
/// then saved.
///
/// # Errors
/// When a folder holds a different run, which is checked before any run starts, or a message file cannot be written.
pub fn all(out: &Path, runs: &[Run], jobs: usize, quiet: bool, stop: &AtomicBool) -> Result<bool> {
    let open = open(out, runs, quiet)?;
    let (next, jobs) = (AtomicUsize::new(0), jobs.clamp(1, open.len().max(1)));
    let work = || -> Result<()> {
        while !stop.load(Ordering::SeqCst) {
            let Some(i) = open.get(next.fetch_add(1, Ordering::SeqCst)) else {
                break;
            };
            if !quiet {
                say_run(runs, *i);
            }
            let dist = Arc::new(SingleRank);
            one(out, &runs[*i], dist, quiet || jobs > 1, stop)?;
        }
        Ok(())
    };
    if jobs == 1 {
        work()?;
    } else {
        let threads = (rayon::current_num_threads() / jobs).max(1);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs)
                .map(|_| {
                    scope.spawn(|| {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                        let no_threads = |e: rayon::ThreadPoolBuildError| {
                            Error::invalid("--jobs", "threads", e.to_string(), "request fewer")
                        };
                        pool.map_err(no_threads)?.install(work)
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|w| {
                let bug = |_| Error::invalid("ablate", "a run", "a panic", "report this as a bug");
                w.join().map_err(bug)?
            })
        })?;
    }
    Ok(!stop.load(Ordering::SeqCst))
}

/// Prints which run starts.
pub fn say_run(runs: &[Run], i: usize) {
    let (number, all) = (i + 1, runs.len());
    stderr_line(&format!("run {number} of {all}: {}", runs[i].name));
}

/// Trains one run from its present state to its end, as one of the ranks that share it. On several ranks, only divergence
/// leaves a file with the message.
///
/// # Errors
/// When that file cannot be written; on several ranks, also when the run fails for a reason other than divergence.
pub fn one(
    out: &Path,
    run: &Run,
    dist: Arc<dyn Collective>,
    quiet: bool,
    stop: &AtomicBool,
) -> Result<()> {
    let place = folder(out, &run.name);
    // An existing folder shows that the run keeps checkpoints, so that it is not finished without the last one.
    let checkpoints = place.join(train::CHECKPOINTS);
    fs::create_dir_all(&checkpoints).map_err(|e| Error::io("create", &checkpoints, e))?;
    let options = train::RunOptions {
        out: place,
        resume: true,
        checkpoints: true,
        timeline: false,
        quiet,
    };
    let note = failure(out, &run.name);
    let (first, several) = (dist.rank() == 0, dist.size() > 1);
    let kind = match hooks::train_on(dist, run.config.clone(), &options, stop) {
        Ok(summary) => {
            if first && summary.outcome == Outcome::Finished && note.exists() {
                fs::remove_file(&note).map_err(|e| Error::io("remove", &note, e))?;
            }
            return Ok(());
        }
        Err(e) if e.is_divergence() => format!("diverged: {e}"),
        Err(e) if several => return Err(e),
        Err(e) => format!("failed: {e}"),
    };
    if !first {
        return Ok(());
    }
    stderr_line(&format!("{}: {kind}", run.name));
    let notes = out.join(FAILURES);
    fs::create_dir_all(&notes).map_err(|e| Error::io("create", &notes, e))?;
    publish(&note, format!("{kind}\n"))
}
