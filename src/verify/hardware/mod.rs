//! The hardware check: proves and measures on a GPU what cannot be shown without one.
//!
//! [`check`] runs every task that has no record yet, most important first, within a time limit, and writes each record
//! when the task ends. Each task runs in its own process with a time limit, so that a kernel that hangs or faults affects
//! only its own task. On the simulator, the tasks of complete steps run at a small size, which shows that they detect
//! errors. [`status::table`] writes a table of what is proven.

mod benchmark;
pub mod code;
mod connects;
mod determinism;
mod kind;
pub mod loss_parity;
mod no_host_sync;
mod outcome;
mod place;
mod process;
mod program;
pub mod record;
mod resume;
pub mod run_task;
mod scales;
pub mod status;
pub(crate) mod steps;
pub mod task;
pub mod throughput;
pub mod timing;

#[cfg(feature = "cuda")]
pub(crate) use place::with_kernels;
pub use place::{FOLDER, Place};

use crate::device::machine;
use crate::error::{Error, Result};
use crate::report::records;
use place::machine_name;
use record::{Ending, Record, Records};
use std::time::Instant;
use task::Task;

/// Options of [`check`].
pub struct Options {
    /// Where the tasks run, and the folder of the records.
    pub place: Place,
    /// Time limit in seconds. A task that would probably end later is not started.
    pub budget: f64,
    /// List the tasks that would run, and run nothing.
    pub list: bool,
    /// Run only tasks whose names contain this text.
    pub only: Option<String>,
    /// Also run tasks that have already passed.
    pub again: bool,
}

/// Runs the tasks that have no record of success: first those that were never tried, then those that failed.
///
/// # Errors
/// When there is no usable GPU, a record cannot be written, or a task failed.
pub fn check(options: &Options) -> Result<()> {
    let mut records = Records::open(&options.place.out)?;
    let gpu = machine_name(options.place.device);
    let (tasks, done) = pending(options, &records, gpu.as_deref().ok());
    let total: f64 = tasks.iter().map(|task| task.estimate).sum();
    match &gpu {
        Ok(name) => say!(
            "{name}: {} tasks to run, about {total:.0} s; {done} are on record",
            tasks.len()
        ),
        Err(why) => say!(
            "no GPU to use: {why}\nwith one, {} tasks would run, about {total:.0} s, in this order:",
            tasks.len()
        ),
    }
    if options.list || gpu.is_err() {
        list(&tasks)?;
    }
    let gpu = match gpu {
        _ if options.list => return Ok(()),
        Ok(gpu) => gpu,
        Err(why) => {
            let help = "run it on a machine with one: scripts/bundle makes a folder to carry there";
            return Err(Error::invalid(
                "hardware-check",
                "an NVIDIA GPU from Ampere on with a driver for CUDA 13.0",
                why,
                help,
            ));
        }
    };
    let mut visit = Visit {
        gpu,
        place: options.place.clone(),
        commit: machine::commit(),
        driver: machine::driver(),
        system: machine::system(),
        state: machine::state(),
    };
    let start = Instant::now();
    let (mut ran, mut failed) = (0, 0);
    for (i, task) in tasks.iter().enumerate() {
        let remaining = options.budget - start.elapsed().as_secs_f64();
        if remaining < task.estimate {
            continue; // a shorter task may still fit
        }
        let Some(record) = visit.run(task, remaining)? else {
            continue;
        };
        // The record is saved before it is printed, since printing fails if the reader has closed the pipe.
        records.insert(record.clone());
        records.save(&visit.gpu)?;
        let (ending, seconds) = (label(record.ending), record.seconds);
        let (place, name, detail) = (i + 1, task.name(), record.detail);
        say!("{place:4}  {ending:9}  {seconds:6.1} s  {name}: {detail}");
        ran += 1;
        failed += usize::from(matches!(record.ending, Ending::Failed | Ending::TimedOut));
    }
    let (left, out) = (tasks.len() - ran, options.place.out.display());
    say!("{ran} ran, {failed} failed, {left} not run for lack of time; records: {out}");
    if failed == 0 {
        return Ok(());
    }
    Err(Error::invalid(
        "hardware-check",
        "every task to pass",
        format!("{failed} that failed"),
        "their records name the faults; a difference between a kernel and the simulator is a bug in one of them",
    ))
}

fn list(tasks: &[Task]) -> Result<()> {
    for (i, task) in tasks.iter().enumerate() {
        let needs = match task.needs.as_str() {
            "" => String::new(),
            needs => format!("  (needs {needs})"),
        };
        let (place, name) = (i + 1, task.name());
        say!("{place:4}  {:4.0} s  {name}{needs}", task.estimate);
    }
    Ok(())
}

fn label(ending: Ending) -> &'static str {
    match ending {
        Ending::Passed => "passed",
        Ending::Failed => "FAILED",
        Ending::TimedOut => "TIMED OUT",
        Ending::Unavailable => "not here",
    }
}

/// Returns the tasks to run, in order, and the number of finished tasks.
fn pending(options: &Options, records: &Records, gpu: Option<&str>) -> (Vec<Task>, usize) {
    let only = options.only.as_deref();
    let wanted = |task: &Task| only.is_none_or(|only| task.name().contains(only));
    let ending = |task: &Task| {
        let key = (gpu?.to_string(), task.name(), code::code(task.source)?);
        Some(records.get(&key)?.ending)
    };
    let queue = task::queue(options.place.device).into_iter();
    let all: Vec<Task> = queue.filter(wanted).collect();
    let count = all.len();
    let again = |task: &Task| {
        options.again || matches!(ending(task), Some(Ending::Failed | Ending::TimedOut))
    };
    let (mut tasks, tried): (Vec<Task>, Vec<Task>) =
        all.into_iter().partition(|task| ending(task).is_none());
    tasks.extend(tried.into_iter().filter(again));
    let done = count - tasks.len();
    (tasks, done)
}

/// The values that all records of one run of the program share.
struct Visit {
    gpu: String,
    place: Place,
    commit: String,
    driver: String,
    system: String,
    /// State of the GPU after the previous task.
    state: serde_json::Value,
}

impl Visit {
    /// Runs a task in its own process; returns no record if the remaining time ended before the time limit of the task.
    fn run(&mut self, task: &Task, remaining: f64) -> Result<Option<Record>> {
        let start = Instant::now();
        let limit = task.limit().min(remaining + 10.0);
        let outcome = process::in_child(task, &self.place, limit)?;
        let seconds = start.elapsed().as_secs_f64();
        if outcome.ending == Ending::TimedOut && limit < task.limit() {
            return Ok(None);
        }
        let after = machine::state();
        let before = std::mem::replace(&mut self.state, after.clone());
        Ok(Some(Record {
            gpu: self.gpu.clone(),
            task: task.name(),
            code: code::code(task.source).unwrap_or("none".into()),
            ending: outcome.ending,
            detail: outcome.detail,
            measured: outcome.measured,
            date: records::now(),
            commit: self.commit.clone(),
            driver: self.driver.clone(),
            system: self.system.clone(),
            seconds,
            before,
            after,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::kind::Kind;
    use super::record::tests::record;
    use super::*;
    use crate::device::Device;
    use std::path::PathBuf;

    fn options(only: Option<&str>) -> Options {
        Options {
            place: Place {
                device: Device::Cuda,
                out: PathBuf::new(),
                planted: false,
            },
            budget: 0.0,
            list: true,
            only: only.map(String::from),
            again: false,
        }
    }

    #[test]
    fn recorded_tasks_do_not_run_again_and_failed_tasks_come_last() {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(folder.path()).unwrap();
        let names = |records: &Records, options: &Options| {
            pending(options, records, Some("NVIDIA H200"))
                .0
                .iter()
                .map(Task::name)
                .collect::<Vec<_>>()
        };
        let all = names(&records, &options(None));
        assert_eq!(all.len(), task::queue(Device::Cuda).len());
        if !cfg!(routegrad_cuda) {
            return; // without compiled code there are no keys
        }
        let mut add = |task: &str, ending, code: &str| {
            records.insert(Record {
                ending,
                ..record(task, code, "")
            });
        };
        let code = &code::code("unit").unwrap();
        add(&all[0], Ending::Passed, code);
        add(&all[1], Ending::Failed, code);
        add(&all[2], Ending::Passed, "of another build");
        add(&all[3], Ending::Unavailable, code);
        let left = names(&records, &options(None));
        assert_eq!(left.len(), all.len() - 2);
        assert_eq!((&left[0], left.last()), (&all[2], Some(&all[1])));
        let again = Options {
            again: true,
            ..options(None)
        };
        assert_eq!(names(&records, &again).len(), all.len());
    }

    #[test]
    fn a_filter_selects_the_tasks_whose_names_contain_it() {
        let records = Records::open(std::path::Path::new("/nonexistent")).unwrap();
        let (tasks, _) = pending(&options(Some("memcheck: dispatch")), &records, None);
        assert!(
            !tasks.is_empty()
                && tasks
                    .iter()
                    .all(|t| t.kind == Kind::Memcheck && t.source == "dispatch")
        );
    }
}
