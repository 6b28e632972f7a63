//! From the environment that a launcher leaves to this process's rank, and back to its exit status.

use super::mpi::Mpi;
use super::mpi::library::VARIABLE;
use super::{Collective, SingleRank};
use crate::device;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::env::var;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How the ranks of a run are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ranks {
    /// Those of the launcher, if there is one.
    #[default]
    Auto,
    /// One, whatever launched it.
    None,
    /// Those of MPI, even if no launcher is recognised.
    Mpi,
}

/// What started this process as one of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// MPICH's, or another one that speaks PMI.
    Mpich,
    /// `srun`.
    Slurm,
}

/// Processes that a launcher says it started, by variable of their environment.
const SIZES: [(&str, Launcher); 3] = [
    ("OMPI_COMM_WORLD_SIZE", Launcher::OpenMpi),
    ("PMI_SIZE", Launcher::Mpich),
    ("SLURM_STEP_NUM_TASKS", Launcher::Slurm),
];

/// The number of a process among those of its host, by launcher's variable: torchrun's, Open MPI's, MPICH's, Slurm's.
const LOCAL_RANKS: [&str; 4] = [
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
];

static WORLD: OnceLock<Arc<Mpi>> = OnceLock::new();

/// The launcher that started this process as one of several, if one did.
pub fn launcher() -> Option<Launcher> {
    find().map(|(launcher, _)| launcher)
}

/// The number of processes that it started; 1 without a launcher.
pub fn launcher_size() -> usize {
    find().map_or(1, |(_, size)| size)
}

fn find() -> Option<(Launcher, usize)> {
    let size = |name: &str| var(name).ok()?.parse::<usize>().ok();
    let mut found = SIZES.iter().filter_map(|(name, l)| Some((*l, size(name)?)));
    // Inside an allocation every program finds Slurm's variables; a step of one task is none of several.
    found.find(|(launcher, size)| *launcher != Launcher::Slurm || *size > 1)
}

/// Refuses processes that `torchrun` started: each would be a run of its own.
fn refuse_torchrun() -> Result<()> {
    let size = var("WORLD_SIZE").ok().and_then(|n| n.parse::<usize>().ok());
    match size {
        Some(n) if n > 1 && var("TORCHELASTIC_RUN_ID").is_ok() => Err(Error::invalid(
            "ranks",
            "a launcher of MPI, or --ranks none",
            format!("{n} processes of torchrun"),
            "start it with mpirun or srun",
        )),
        _ => Ok(()),
    }
}

/// Names to look for the launcher's MPI library under.
fn names(launcher: Option<Launcher>) -> Vec<String> {
    if let Ok(name) = var(VARIABLE) {
        return vec![name];
    }
    let open_mpi = ["libmpi.so.40", "libmpi.so"];
    let mpich = ["libmpi.so.12", "libmpich.so.12", "libmpi_abi.so.0"];
    let ordered = match launcher {
        Some(Launcher::OpenMpi) => [&open_mpi[..], &["libmpi_abi.so.0"]].concat(),
        Some(Launcher::Slurm) if var("PMIX_RANK").is_ok() => [&open_mpi[..], &mpich[..]].concat(),
        _ => [&mpich[..], &open_mpi[..]].concat(),
    };
    ordered.into_iter().map(String::from).collect()
}

/// The number of this process among those of its host, which is that of its GPU.
///
/// # Errors
/// When a launcher's variable holds something else.
fn local_rank(read: impl Fn(&str) -> Option<String>, mpi: &Mpi) -> Result<usize> {
    let named = |name: &&'static str| Some((*name, read(name)?));
    let Some((name, text)) = LOCAL_RANKS.iter().find_map(named) else {
        // Without a word from the launcher ranks of a host count themselves.
        let members = mpi.hub().map_or(&[][..], |hub| hub.members());
        let before = members.iter().take(mpi.rank());
        let own = members.get(mpi.rank()).map(|m| &m.host);
        return Ok(before.filter(|m| Some(&m.host) == own).count());
    };
    text.trim().parse().map_err(|_| {
        let help = "let the launcher set it";
        Error::invalid(
            name,
            "the number of this process on its host, from 0",
            text,
            help,
        )
    })
}

/// This process's rank. On several, one that is silent or keeps the others waiting for longer than `limit` ends the run.
///
/// # Errors
/// When MPI cannot be loaded or refuses, is not the launcher's, or the ranks cannot connect.
///
/// The GPU with this process's number on its host becomes the one that the process uses.
pub fn start(ranks: Ranks, limit: Duration) -> Result<Arc<dyn Collective>> {
    let found = find();
    match (ranks, found) {
        (Ranks::None, _) => return Ok(Arc::new(SingleRank)),
        (Ranks::Auto, None) => return refuse_torchrun().map(|()| Arc::new(SingleRank) as _),
        _ => {}
    }
    let mpi = match WORLD.get() {
        Some(mpi) => mpi.clone(),
        None => {
            let started = Arc::new(Mpi::start(&names(found.map(|f| f.0)), limit)?);
            WORLD.get_or_init(|| started).clone()
        }
    };
    let launched = found.map_or(mpi.size(), |(_, size)| size);
    if launched != mpi.size() {
        return Err(Error::invalid(
            "ranks",
            format!("the {launched} processes that the launcher started"),
            format!("{} in the eyes of {}", mpi.size(), mpi.version()),
            format!(
                "name the MPI library of the launcher in {VARIABLE} (with srun: --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH), or use --ranks none"
            ),
        ));
    }
    if launched > 1 {
        device::choose_gpu(local_rank(|name| var(name).ok(), &mpi)?);
    }
    Ok(mpi)
}

/// Consecutive groups of `size` ranks each; this rank in its own. The groups make calls independently of one another.
///
/// # Errors
/// When `size` does not divide the number of ranks.
pub fn groups(all: &Arc<dyn Collective>, size: usize) -> Result<Arc<dyn Collective>> {
    if size == 0 || all.size() % size != 0 {
        return Err(Error::invalid(
            "ranks",
            format!("groups of a size that divides {}", all.size()),
            format!("groups of {size}"),
            "choose another --ranks-per-run, or start another number of processes",
        ));
    }
    match WORLD.get() {
        Some(mpi) if mpi.size() > size => Ok(Arc::new(mpi.group(size)?)),
        _ => Ok(all.clone()),
    }
}

/// Threads for this process where ranks share cores: its part of them. None without a launcher.
pub fn threads() -> Option<usize> {
    let mpi = WORLD.get()?;
    let members = mpi.hub()?.members();
    let own = &members[mpi.rank()];
    let sharing = members
        .iter()
        .filter(|m| (&m.host, &m.cores) == (&own.host, &own.cores));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some((cores / sharing.count().max(1)).max(1))
}

/// Ranks, hosts and library, for the run's introduction; none without a launcher.
pub fn describe() -> Option<String> {
    let mpi = WORLD.get()?;
    let mut hosts: HashMap<&str, usize> = HashMap::new();
    for member in mpi.hub()?.members() {
        *hosts.entry(&member.host).or_default() += 1;
    }
    let places = match hosts.len() {
        1 => "one host".into(),
        n => format!("{n} hosts"),
    };
    Some(format!(
        "{} ranks on {places}, {}",
        mpi.size(),
        mpi.version()
    ))
}

/// Ends this process's part in the run after `result`. Gives the error that is to be printed, if any: of several ranks one
/// prints.
///
/// # Errors
/// The run failed, here or on another rank.
pub fn conclude(result: Result<()>) -> Result<(), Option<Error>> {
    let Some(mpi) = WORLD.get() else {
        return result.map_err(Some);
    };
    let Err(error) = result.and_then(|()| mpi.finish()) else {
        return Ok(());
    };
    let Some(hub) = mpi.hub() else {
        return Err(Some(error));
    };
    if mpi.size() == 1 {
        return Err(Some(error));
    }
    // Every rank met it, or the hub has ended the run.
    if matches!(error, Error::Ranks { .. }) {
        return Err(hub.reports_common().then_some(error));
    }
    mpi.leave(&error.to_string());
    let reports = hub.reports();
    Err(reports.then(|| match hub.failure() {
        Some(text) => Error::Ranks {
            text: text.into(),
            cause: None,
        },
        None => error,
    }))
}
