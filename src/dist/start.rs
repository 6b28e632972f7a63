//! From the environment that a launcher leaves to this process's rank, and back to its exit status.

use super::mpi::Mpi;
use super::mpi::library::VARIABLE;
use super::processes::Processes;
use super::tcp::Star;
use super::tcp::place::{self, Rendezvous};
use super::{Collective, SingleRank};
use crate::device;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::env::var;
use std::fs;
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
    /// Those that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, without MPI.
    Tcp,
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
    /// torchrun, or another one that sets its variables.
    Torchrun,
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

static WORLD: OnceLock<Arc<Processes>> = OnceLock::new();

/// The launcher that started this process as one of several, if one did.
pub fn launcher() -> Option<Launcher> {
    find(&environment).map(|(launcher, _)| launcher)
}

/// The number of processes that it started; 1 without a launcher.
pub fn launcher_size() -> usize {
    find(&environment).map_or(1, |(_, size)| size)
}

fn environment(name: &str) -> Option<String> {
    var(name).ok()
}

fn find(read: &dyn Fn(&str) -> Option<String>) -> Option<(Launcher, usize)> {
    let by_variables = || Some((Launcher::Torchrun, place::size(read)?));
    // srun and mpirun may have started torchrun, which is nearer then; variables alone may be left from elsewhere.
    match place::is_torchrun(read) {
        true => by_variables(),
        false => find_mpi(read).or_else(by_variables),
    }
}

/// The launcher of MPI.
fn find_mpi(read: &dyn Fn(&str) -> Option<String>) -> Option<(Launcher, usize)> {
    let size = |name: &str| read(name)?.parse::<usize>().ok();
    let mut found = SIZES.iter().filter_map(|(name, l)| Some((*l, size(name)?)));
    // Inside an allocation every program finds Slurm's variables; a step of one task is none of several.
    found.find(|(launcher, size)| *launcher != Launcher::Slurm || *size > 1)
}

/// Names to look for the launcher's MPI library under.
fn names(launcher: Launcher, read: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    if let Some(name) = read(VARIABLE) {
        return vec![name];
    }
    let open_mpi = ["libmpi.so.40", "libmpi.so"];
    let mpich = ["libmpi.so.12", "libmpich.so.12", "libmpi_abi.so.0"];
    let ordered = match launcher {
        Launcher::OpenMpi => [&open_mpi[..], &["libmpi_abi.so.0"]].concat(),
        Launcher::Slurm if read("PMIX_RANK").is_some() => [&open_mpi[..], &mpich[..]].concat(),
        _ => [&mpich[..], &open_mpi[..]].concat(),
    };
    ordered.into_iter().map(String::from).collect()
}

/// The number of this process among those of its host, which is that of its GPU.
///
/// # Errors
/// When a launcher's variable holds something else.
fn local_rank(read: impl Fn(&str) -> Option<String>, ranks: &Processes) -> Result<usize> {
    let named = |name: &&'static str| Some((*name, read(name)?));
    let Some((name, text)) = LOCAL_RANKS.iter().find_map(named) else {
        // Without a word from the launcher ranks of a host count themselves.
        let members = ranks.hub().map_or(&[][..], |hub| hub.members());
        let before = members.iter().take(ranks.rank());
        let own = members.get(ranks.rank()).map(|m| &m.host);
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
/// The GPU with this process's number on its host becomes the one that the process uses.
///
/// # Errors
/// When MPI cannot be loaded or refuses, is not the launcher's, or the ranks cannot connect.
pub fn start(ranks: Ranks, limit: Duration) -> Result<Arc<dyn Collective>> {
    let found = match ranks {
        Ranks::None => None,
        Ranks::Auto => find(&environment),
        // MPI knows the number.
        Ranks::Mpi => find_mpi(&environment).or(Some((Launcher::Mpich, 0))),
        Ranks::Tcp => Some((Launcher::Torchrun, place::size(&environment).unwrap_or(0))),
    };
    let (launcher, launched) = match found {
        None | Some((Launcher::Torchrun, 1)) => return Ok(Arc::new(SingleRank)),
        Some(found) => found,
    };
    let world = match WORLD.get() {
        Some(world) => world.clone(),
        None => {
            let started = Arc::new(connect(launcher, limit)?);
            WORLD.get_or_init(|| started).clone()
        }
    };
    if launched != 0 && launched != world.size() {
        return Err(Error::invalid(
            "ranks",
            format!("the {launched} processes that the launcher started"),
            format!("{} in the eyes of {}", world.size(), world.wire_name()),
            format!(
                "name the MPI library of the launcher in {VARIABLE} (with srun: --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH), or use --ranks none"
            ),
        ));
    }
    if world.size() > 1 {
        device::choose_gpu(local_rank(environment, &world)?);
    }
    Ok(world)
}

/// Connects the processes that a launcher started.
fn connect(launcher: Launcher, limit: Duration) -> Result<Processes> {
    if launcher == Launcher::Torchrun {
        let meeting = Rendezvous::of(&environment)?;
        let (star, hub) = Star::start(&meeting, limit)?;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        return Processes::connect(Box::new(star), host.trim().into(), Some(hub), limit);
    }
    let mpi = Mpi::start(&names(launcher, &environment))?;
    let host = mpi.host().to_string();
    Processes::connect(Box::new(mpi), host, None, limit)
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
        Some(world) if world.size() > size => Ok(Arc::new(world.group(size)?)),
        _ => Ok(all.clone()),
    }
}

/// Threads for this process where ranks share cores: its part of them. None without a launcher.
pub fn threads() -> Option<usize> {
    let world = WORLD.get()?;
    let members = world.hub()?.members();
    let own = &members[world.rank()];
    let sharing = members
        .iter()
        .filter(|m| (&m.host, &m.cores) == (&own.host, &own.cores));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some((cores / sharing.count().max(1)).max(1))
}

/// Ranks, hosts and library, for the run's introduction; none without a launcher.
pub fn describe() -> Option<String> {
    let world = WORLD.get()?;
    let mut hosts: HashMap<&str, usize> = HashMap::new();
    for member in world.hub()?.members() {
        *hosts.entry(&member.host).or_default() += 1;
    }
    let places = match hosts.len() {
        1 => "one host".into(),
        n => format!("{n} hosts"),
    };
    Some(format!(
        "{} ranks on {places}, {}",
        world.size(),
        world.wire_name()
    ))
}

/// Ends this process's part in the run after `result`. Gives the error that is to be printed, if any: of several ranks one
/// prints.
///
/// # Errors
/// The run failed, here or on another rank.
pub fn conclude(result: Result<()>) -> Result<(), Option<Error>> {
    let Some(world) = WORLD.get() else {
        return result.map_err(Some);
    };
    let Err(error) = result.and_then(|()| world.finish()) else {
        return Ok(());
    };
    let Some(hub) = world.hub() else {
        return Err(Some(error));
    };
    if world.size() == 1 {
        return Err(Some(error));
    }
    // Every rank met it, or the hub has ended the run.
    if matches!(error, Error::Ranks { .. }) {
        return Err(hub.reports_common().then_some(error));
    }
    world.leave(&error.to_string());
    let reports = hub.reports();
    Err(reports.then(|| match hub.failure() {
        Some(text) => Error::Ranks {
            text: text.into(),
            cause: None,
        },
        None => error,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(set: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        move |name| {
            let value = set.iter().find(|(n, _)| *n == name);
            value.map(|(_, v)| v.to_string())
        }
    }

    fn found(set: &[(&str, &str)]) -> Option<(Launcher, usize)> {
        find(&reader(set))
    }

    #[test]
    fn launchers_are_recognised_by_their_variables() {
        use Launcher::*;
        let torchrun = [
            ("RANK", "1"),
            ("WORLD_SIZE", "4"),
            ("MASTER_ADDR", "a"),
            ("MASTER_PORT", "1"),
        ];
        let run_id = ("TORCHELASTIC_RUN_ID", "none");
        // A step of srun with and without PMI, for Open MPI by PMIx and for MPICH by PMI-2.
        let pmix = [("SLURM_STEP_NUM_TASKS", "8"), ("PMIX_RANK", "3")];
        let pmi2 = [("SLURM_STEP_NUM_TASKS", "8"), ("PMI_SIZE", "8")];
        let cases: [(&[(&str, &str)], _); 10] = [
            (&[], None),
            (&[("OMPI_COMM_WORLD_SIZE", "2")], Some((OpenMpi, 2))),
            (&[("PMI_SIZE", "3")], Some((Mpich, 3))),
            (&pmix, Some((Slurm, 8))),
            (&pmi2, Some((Mpich, 8))),
            (&[("SLURM_STEP_NUM_TASKS", "1")], None),
            (&torchrun, Some((Torchrun, 4))),
            (&[("WORLD_SIZE", "4"), ("RANK", "1")], None),
            (&[run_id, ("WORLD_SIZE", "4")], Some((Torchrun, 4))),
            (&[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "8")], None),
        ];
        for (set, expected) in cases {
            assert_eq!(found(set), expected, "{set:?}");
        }
        // torchrun as a task of srun, and mpirun where such variables are set.
        let within_srun = [&pmix[..], &torchrun, &[run_id]].concat();
        assert_eq!(found(&within_srun), Some((Torchrun, 4)));
        let mpirun = [&torchrun[..], &[("OMPI_COMM_WORLD_SIZE", "2")]].concat();
        assert_eq!(found(&mpirun), Some((OpenMpi, 2)));
    }

    #[test]
    fn a_step_of_srun_loads_the_library_of_its_pmi() {
        let first = |set: &[(&str, &str)]| names(Launcher::Slurm, &reader(set)).swap_remove(0);
        assert_eq!(first(&[("PMIX_RANK", "3")]), "libmpi.so.40");
        assert_eq!(first(&[]), "libmpi.so.12");
        assert_eq!(first(&[("PMIX_RANK", "3"), (VARIABLE, "x")]), "x");
    }
}
