//! Prepares the process for a command: threads, ranks and signals.

use super::ranks::{RanksArgs, RanksFrom};
use crate::device::Device;
use crate::dist::{self, Collective, Ranks};
use crate::error::{Error, Result};
use crate::kernels::launchers;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Largest number of threads: more than any machine has cores. The system may have no memory for the stacks of many
/// more.
const MOST_THREADS: usize = 1024;

/// Longest time limit of ranks in seconds, 30 years; a much longer time could not be added to the time of the clock.
const LONGEST_LIMIT: f64 = 1e9;

pub(super) fn set_threads(threads: usize) -> Result<()> {
    let invalid = |got: String| {
        Error::usage(
            "--threads",
            format!("a number of threads from 1 to {MOST_THREADS}"),
            got,
            "leave it out for all cores",
        )
    };
    if !(1..=MOST_THREADS).contains(&threads) {
        return Err(invalid(threads.to_string()));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| invalid(e.to_string()))
}

/// Runs `f`. For the CPU it runs on a thread of a new pool, with as many threads as parallel loops use. A parallel loop
/// that is started outside a pool waits twice for the system to wake a thread: the thread that starts the loop, and
/// then the caller. A step has hundreds of loops. For a GPU `f` runs on this thread, which has the context of the GPU.
pub(super) fn in_pool<R: Send>(device: Device, f: impl FnOnce() -> R + Send) -> Result<R> {
    if device != Device::Cpu {
        return Ok(f());
    }
    let threads = rayon::current_num_threads();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| {
        let help = "pass a smaller number to --threads, or raise the limit of threads (ulimit -u)";
        Error::invalid("train", format!("{threads} threads"), e.to_string(), help)
    })?;
    Ok(pool.install(f))
}

/// Sets the GPU architecture that the simulator simulates to that of `--sim-arch`.
pub(super) fn simulate(architecture: Option<i32>, device: Device) -> Result<()> {
    let Some(architecture) = architecture else {
        return Ok(());
    };
    if device != Device::Sim {
        let help = "add --device sim, or leave --sim-arch out";
        let got = format!("device {device}");
        return Err(Error::usage("--sim-arch", "device sim", got, help));
    }
    launchers::simulate(architecture);
    Ok(())
}

/// Starts the rank of this process, and sets its number of threads.
pub(super) fn start_ranks(args: &RanksArgs, threads: Option<usize>) -> Result<Arc<dyn Collective>> {
    if !(1.0..=LONGEST_LIMIT).contains(&args.rank_timeout) {
        let got = args.rank_timeout.to_string();
        let help = "leave it out for the default";
        return Err(Error::usage(
            "--rank-timeout",
            format!("a number of seconds from 1 to {LONGEST_LIMIT:e}"),
            got,
            help,
        ));
    }
    let limit = Duration::from_secs_f64(args.rank_timeout);
    let ranks = match args.ranks {
        RanksFrom::Auto => Ranks::Auto,
        RanksFrom::None => Ranks::None,
        RanksFrom::Mpi => Ranks::Mpi,
        RanksFrom::Tcp => Ranks::Tcp,
    };
    let dist = dist::start(ranks, limit)?;
    if let (None, Some(threads)) = (threads, dist::threads()) {
        set_threads(threads)?;
    }
    Ok(dist)
}

/// Starts the ranks of a command, and compares their arguments: all ranks must have the same.
///
/// # Errors
/// Returns the errors of [`start_ranks`], and an error when two ranks have different arguments.
pub(super) fn start_same_ranks(
    args: &RanksArgs,
    threads: Option<usize>,
) -> Result<Arc<dyn Collective>> {
    let dist = start_ranks(args, threads)?;
    let words = std::env::args_os().skip(1);
    let words: Vec<String> = words.map(|w| w.to_string_lossy().into()).collect();
    let both = |a: &str, b: &str| format!("the commands `{a}` and `{b}`");
    let help = "start every rank with the same arguments";
    dist::same_on_all(&*dist, &words.join(" "), both, help)?;
    Ok(dist)
}

/// Returns an error if a launcher started several processes of a command that runs in one process.
pub(super) fn refuse_launcher() -> Result<()> {
    match dist::launcher_size() {
        1 => Ok(()),
        n => Err(Error::usage(
            "routegrad",
            "one process; only `train`, `ablate`, `eval` and `analyze` run on several",
            format!("{n} processes of a launcher"),
            "start the command without mpirun, srun or torchrun",
        )),
    }
}

/// Sets `stop` at the first SIGINT, SIGTERM or SIGHUP (a lost connection); a second one ends the process at once.
/// SIGUSR1, which launchers forward to every rank, sets `stop` but never ends the process.
pub(super) fn watch_signals(stop: &Arc<AtomicBool>) -> Result<()> {
    let refused = |e: std::io::Error| {
        let help = "report this as a bug";
        Error::invalid("train", "signal handlers", e.to_string(), help)
    };
    signal_hook::flag::register(SIGUSR1, stop.clone()).map_err(refused)?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(refused)?;
    }
    Ok(())
}
