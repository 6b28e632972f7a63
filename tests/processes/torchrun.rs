//! Processes that have torchrun's variables and no MPI: the same bytes, who is let in, and what ends a run.

use crate::common::*;
use crate::launchers::*;
use crate::nccl::{calls::train_small, stand_in};
use crate::runs::train_in_threads;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const LAUNCHER: Launcher = Launcher::Torchrun;

/// Twenty steps of `default`.
const RUN: &[&str] = &[
    "--set",
    "train.steps=20",
    "--set",
    "router.name=\"default\"",
];

#[test]
fn one_two_and_four_processes_end_in_the_bytes_of_threads() {
    beside_other_tests();
    let place = Place::new();
    for ranks in [1, 2, 4] {
        let [by_tcp, in_threads] = ["tcp", "threads"].map(|by| format!("{by}-{ranks}"));
        let (_, said) = succeed(&mut LAUNCHER.ranks(ranks, &train(&place, &by_tcp, RUN)));
        let named = format!("{ranks} ranks on one host, TCP by 127.0.0.1, port ");
        assert_eq!(said.contains(&named), ranks > 1, "{said}");
        train_in_threads(&place, &in_threads, ranks, RUN);
        assert_same_end(&place.path(&by_tcp), &place.path(&in_threads), 20);
    }
}

#[test]
#[ignore = "slow"]
fn nccl_meets_by_tcp_and_a_grid_trains_in_groups() {
    beside_other_tests();
    let place = Place::new();
    let options = ["--router", "default", "--steps", "6"];
    succeed(&mut LAUNCHER.ranks(2, &train_small(&place, "host", &options)));
    let mut command = LAUNCHER.ranks(2, &train_small(&place, "nccl", &options));
    let (_, said) = succeed(command.env("ROUTEGRAD_NCCL", stand_in()));
    assert!(
        said.contains("NCCL") && !said.contains("one by one"),
        "{said}"
    );
    assert_same_end(&place.path("host"), &place.path("nccl"), 6);

    let groups = [SHARED, &["--ranks-per-run", "2"]].concat();
    succeed(&mut LAUNCHER.ranks(4, &place.ablate("grid", 10, &groups)));
    let options = ["--router", "default", "--seed", "1", "--steps", "10"];
    succeed(&mut LAUNCHER.ranks(2, &train(&place, "run", &options)));
    let of_grid = place.path("grid/runs/default-1");
    assert_same_end(&place.path("run"), &of_grid, 10);
}

#[test]
fn a_killed_rank_ends_all_with_one_message_that_names_it_and_no_launcher_helps() {
    wait_for_other_tests();
    for rank in [1, 0] {
        let place = Place::new();
        let out = place.path("run");
        let command = LAUNCHER.ranks(3, &train_of_three(&place));
        let mut run = Running::start(LAUNCHER, command, &out, 3);
        assert!(wait_for_step(&mut run.child, &out, 3));
        signal(run.process(rank).unwrap(), "-KILL");
        let (success, stderr, seconds) = run.end(5.0);
        println!("{seconds:.1} s: {stderr}");
        let said = errors(&stderr);
        let named = said[0].starts_with(&format!("error: rank {rank} ("));
        assert!(
            !success && said.len() == 1 && named && said[0].contains(" ended at call "),
            "{stderr}"
        );
    }
}

/// A run without end of three ranks.
fn train_of_three(place: &Place) -> Command {
    let batch = [
        "--set",
        "train.micro_batch=3",
        "--set",
        "train.sequences_per_step=6",
    ];
    train(place, "run", &[&batch[..], &["--steps", "100000"]].concat())
}

/// A process of its own rank.
fn alone(command: &mut Command, rank: usize, set: &[(&str, String)]) -> Child {
    command
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string());
    command.envs(set.iter().map(|(name, value)| (name, value)));
    command.args(["--threads", "1"]).spawn().unwrap()
}

fn ended(child: Child) -> (bool, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.success(), text(&output.stderr))
}

#[test]
fn strangers_are_refused_and_the_run_goes_on() {
    beside_other_tests();
    let place = Place::new();
    let port = free_port();
    let set = variables(2, port);
    let first = alone(&mut train(&place, "run", RUN), 0, &set);
    let begun = Instant::now();
    let connect = || loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(e) => assert!(begun.elapsed() < Duration::from_secs(60), "{e}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    // One that says nothing, one that says much.
    let mut silent = connect();
    let mut loud = connect();
    let _ = loud.write_all(&[b'x'; 1 << 16]);
    let mut other = set.clone();
    other[4].1 = "another".into();
    let (success, said) = ended(alone(&mut train(&place, "run", RUN), 1, &other));
    assert!(!success && said.contains("the token differs"), "{said}");
    let (success, said) = ended(alone(
        &mut train(&place, "run", RUN),
        2,
        &variables(3, port),
    ));
    assert!(
        !success && said.contains("another number of ranks"),
        "{said}"
    );
    let second = alone(&mut train(&place, "run", RUN), 1, &set);
    // When the ranks have met nobody listens any more.
    wait_until(60.0, "the first step", || {
        steps_logged(&place.path("run")) > 0
    });
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    for rank in [first, second] {
        let (success, said) = ended(rank);
        assert!(success, "{said}");
    }
    let mut rest = Vec::new();
    let _ = silent.read_to_end(&mut rest);
    train_in_threads(&place, "threads", 2, RUN);
    assert_same_end(&place.path("run"), &place.path("threads"), 20);
}

#[test]
fn a_port_in_use_and_missing_variables_are_named() {
    beside_other_tests();
    let place = Place::new();
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let (success, said) = ended(alone(
        &mut train(&place, "run", RUN),
        0,
        &variables(2, port),
    ));
    assert!(!success && said.contains("in use"), "{said}");
    assert!(
        said.contains(&format!("127.0.0.1, port {port}")) && said.contains("ROUTEGRAD_RANKS_PORT"),
        "{said}"
    );
    let mut command = train(&place, "run", RUN);
    command
        .env("WORLD_SIZE", "2")
        .env("TORCHELASTIC_RUN_ID", "none");
    let error = fail(&mut command);
    assert!(error.contains("no RANK"), "{error}");
    let error = fail(train(&place, "run", RUN).args(["--ranks", "tcp"]));
    assert!(error.contains("no WORLD_SIZE"), "{error}");
    assert!(!place.path("run").exists());
    let mut routers = program();
    routers.arg("routers").envs(variables(2, port));
    let error = fail(routers.env("RANK", "0"));
    assert!(error.contains("2 processes of a launcher"), "{error}");
}

/// With PyTorch's own launcher, where it is installed.
#[test]
fn torchrun_itself_starts_the_ranks() {
    beside_other_tests();
    if Command::new("torchrun").arg("--help").output().is_err() {
        println!("skipped: torchrun is not installed");
        return;
    }
    let place = Place::new();
    let own = train(&place, "run", RUN);
    let mut command = Command::new("torchrun");
    command.args(["--standalone", "--nproc-per-node", "2", "--no-python"]);
    command.arg(own.get_program()).args(own.get_args());
    let (_, said) = succeed(command.args(["--threads", "1"]));
    assert!(said.contains("2 ranks on one host, TCP by "), "{said}");
    train_in_threads(&place, "threads", 2, RUN);
    assert_same_end(&place.path("run"), &place.path("threads"), 20);
}
