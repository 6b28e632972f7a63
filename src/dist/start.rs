//! Starts the rank of this process from the environment of its launcher, and ends it.

use super::hub::Member;
use super::mpi::Mpi;
use super::mpi::library::VARIABLE;
use super::processes::Processes;
use super::tcp::Star;
use super::tcp::place::{self, Rendezvous};
use super::{Collective, SingleRank, lost};
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
    /// From the launcher, if there is one.
    #[default]
    Auto,
    /// One rank, even under a launcher.
    None,
    /// From MPI, even if no launcher is recognised.
    Mpi,
    /// From RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, without MPI.
    Tcp,
}

/// The program that started this process as one of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// MPICH's `mpirun`, or another launcher that uses PMI.
    Mpich,
    /// `srun`.
    Slurm,
    /// torchrun, or another launcher that sets the same variables.
    Torchrun,
}

/// Environment variables that contain the number of processes a launcher started.
const SIZES: [(&str, Launcher); 3] = [
    ("OMPI_COMM_WORLD_SIZE", Launcher::OpenMpi),
    ("PMI_SIZE", Launcher::Mpich),
    ("SLURM_STEP_NUM_TASKS", Launcher::Slurm),
];

/// Environment variables that contain the number of a process on its host: of torchrun, Open MPI, MPICH and Slurm.
const LOCAL_RANKS: [&str; 4] = [
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
];

static WORLD: OnceLock<Arc<Processes>> = OnceLock::new();

/// Returns the launcher that started this process as one of several, if there is one.
pub fn launcher() -> Option<Launcher> {
    find(&environment).map(|(launcher, _)| launcher)
}

/// Returns the number of processes that the launcher started; 1 without a launcher.
pub fn launcher_size() -> usize {
    find(&environment).map_or(1, |(_, size)| size)
}

fn environment(name: &str) -> Option<String> {
    var(name).ok()
}

fn find(read: &dyn Fn(&str) -> Option<String>) -> Option<(Launcher, usize)> {
    let by_variables = || Some((Launcher::Torchrun, place::size(read)?));
    // If srun or mpirun started torchrun, torchrun is the launcher. torchrun's variables without its run id may come
    // from another program, so MPI is tried first.
    match place::is_torchrun(read) {
        true => by_variables(),
        false => find_mpi(read).or_else(by_variables),
    }
}

/// Returns the launcher of MPI and the number of its processes.
fn find_mpi(read: &dyn Fn(&str) -> Option<String>) -> Option<(Launcher, usize)> {
    let size = |name: &str| read(name)?.parse::<usize>().ok();
    let mut found = SIZES.iter().filter_map(|(name, l)| Some((*l, size(name)?)));
    // Inside an allocation every program has Slurm's variables; a step with one task is not a run of several processes.
    found.find(|(launcher, size)| *launcher != Launcher::Slurm || *size > 1)
}

/// Returns the names under which to look for the launcher's MPI library, in order.
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

/// Returns the number of this process on its host, which is also the number of its GPU.
///
/// # Errors
/// Returns an error when a launcher's variable does not contain a number.
fn local_rank(read: impl Fn(&str) -> Option<String>, ranks: &Processes) -> Result<usize> {
    let named = |name: &&'static str| Some((*name, read(name)?));
    let Some((name, text)) = LOCAL_RANKS.iter().find_map(named) else {
        // If the launcher does not say it, count the lower ranks on this host.
        let members = ranks.hub().map_or(&[][..], |hub| hub.members());
        let before = members.iter().take(ranks.rank());
        let own = members.get(ranks.rank()).map(|m| &m.host);
        return Ok(before.filter(|m| Some(&m.host) == own).count());
    };
    text.trim().parse().map_err(|_| {
        let expected = "the number of this process on its host, from 0";
        Error::invalid(name, expected, text, "let the launcher set it")
    })
}

/// Starts the rank of this process. With several ranks, the run ends if one is silent or keeps the others waiting for
/// longer than `limit`.
///
/// The process uses the GPU with the number that the process has on its host.
///
/// # Errors
/// Returns an error when MPI cannot be loaded, fails, or is not the MPI of the launcher, or when the ranks cannot
/// connect.
pub fn start(ranks: Ranks, limit: Duration) -> Result<Arc<dyn Collective>> {
    let found = match ranks {
        Ranks::None => None,
        Ranks::Auto => find(&environment),
        // MPI knows the number of ranks.
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
            format!("{} according to {}", world.size(), world.wire_name()),
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
        let host = host.trim().to_string();
        // Each of torchrun's agents starts the processes of one node.
        let agent = environment("GROUP_RANK").unwrap_or_default();
        let node = format!("{host} {agent}");
        return Processes::connect(Box::new(star), [host, node], Some(hub), limit);
    }
    let mpi = Mpi::start(&names(launcher, &environment))?;
    let host = mpi.host().to_string();
    Processes::connect(Box::new(mpi), [host.clone(), host], None, limit)
}

/// Divides the ranks into groups of `size` consecutive ranks, and returns this rank as a member of its group. The
/// groups make calls independently of one another.
///
/// # Errors
/// Returns an error when `size` does not divide the number of ranks.
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

/// Returns the number of threads for this process: its cores, divided by the number of ranks that share them. None
/// without a launcher.
pub fn threads() -> Option<usize> {
    let world = WORLD.get()?;
    let members = world.hub()?.members();
    let own = &members[world.rank()];
    let shares = |m: &&Member| (&m.host, &m.cores) == (&own.host, &own.cores);
    let sharing = members.iter().filter(shares).count();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some((cores / sharing.max(1)).max(1))
}

/// Describes the ranks, the hosts and the library, for the first lines of a run's output; none without a launcher.
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
    let (size, wire) = (world.size(), world.wire_name());
    Some(format!("{size} ranks on {places}, {wire}"))
}

/// Ends the part of this process in the run, after a command with this `result`.
///
/// # Errors
/// Returns an error when the run failed, here or on another rank. It contains the error to print on the one rank that
/// prints it, and is empty on the others.
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
    // Every rank got this error, or the hub has ended the run.
    if matches!(error, Error::Ranks { .. }) {
        return Err(hub.reports_common().then_some(error));
    }
    world.leave(&error.to_string());
    let reports = hub.reports();
    Err(reports.then(|| hub.failure().map_or(error, lost)))
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
