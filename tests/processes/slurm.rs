//! Runs that `srun` starts. They need a running Slurm and are skipped with a message where there is none.

use crate::common::*;
use crate::launchers::*;
use std::process::{Command, Stdio};

/// The launchers of MPI whose libraries `srun` can start, with the option of `srun` for each.
fn modes() -> Vec<(Launcher, &'static str)> {
    let nodes = Command::new("sinfo").arg("-h").output();
    if !nodes.is_ok_and(|o| o.status.success() && !o.stdout.is_empty()) {
        println!("skipped: no Slurm is running");
        return vec![];
    }
    let mode = |launcher| match launcher {
        Launcher::OpenMpi => "--mpi=pmix",
        _ => "--mpi=pmi2",
    };
    launchers().into_iter().map(|l| (l, mode(l))).collect()
}

/// `command` as a job with this name, on two ranks with one thread each.
fn srun(mode: &str, name: &str, command: &Command) -> Command {
    let mut launched = Command::new("srun");
    launched.args([mode, "-n", "2", "--overcommit", "-J", name]);
    launched.arg(command.get_program()).args(["--threads", "1"]);
    launched.args(command.get_args());
    launched.stdout(Stdio::piped()).stderr(Stdio::piped());
    launched
}

#[test]
fn ranks_of_srun_end_in_the_bytes_of_mpirun_also_after_scancel_sent_sigusr1() {
    for (launcher, mode) in modes() {
        let (place, options) = (Place::new(), ["--steps", "60"]);
        succeed(&mut launcher.ranks(2, &train(&place, "mpirun", &options)));
        let job = format!("routegrad-{}-{launcher:?}", std::process::id());
        let mut child = srun(mode, &job, &train(&place, "srun", &options))
            .spawn()
            .unwrap();
        assert!(wait_for_step(&mut child, &place.path("srun"), 13));
        let (ids, _) = succeed(Command::new("squeue").args(["-h", "-o", "%i", "-n", &job]));
        let step = format!("{}.0", ids.trim());
        succeed(Command::new("scancel").args(["--signal=USR1", &step]));
        let output = child.wait_with_output().unwrap();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{mode}: {stdout}{stderr}");
        assert!(stderr.contains("2 ranks on "), "{mode}: {stderr}");
        assert_eq!(stdout.matches("stopped and saved at step").count(), 1);
        assert!(steps_logged(&place.path("srun")) < 60);
        succeed(&mut srun(mode, &job, &place.resume("srun")));
        assert_same_end(&place.path("mpirun"), &place.path("srun"), 60);
    }
}

#[test]
fn a_killed_rank_of_srun_ends_the_others_with_a_message() {
    for (_, mode) in modes() {
        let place = Place::new();
        let out = place.path("run");
        let command = train(&place, "run", &["--steps", "100000"]);
        let mut child = srun(mode, "routegrad-kill", &command).spawn().unwrap();
        assert!(wait_for_step(&mut child, &out, 5));
        let victim = process("SLURM_PROCID", &out, 1);
        signal(victim.expect("rank 1"), "-KILL");
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success());
        let said = errors(&text(&output.stderr));
        assert!(said.len() == 1 && said[0].contains("rank 1"), "{said:?}");
    }
}
