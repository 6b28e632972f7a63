//! A rank that keeps the others waiting is named with its call, also where steps are replayed and the hosts do not meet.

use crate::common::*;
use crate::launchers::*;
use crate::nccl::{calls::train_small, config, stand_in};
use routegrad::dist::{self, Ranks, doing, doing_alone};
use routegrad::{Error, Trainer};
use std::process::Command;
use std::time::Duration;

const LAUNCHER: Launcher = Launcher::Torchrun;

#[test]
#[ignore = "slow"]
fn a_rank_that_is_stopped_within_replayed_steps_is_named_with_its_call_within_ten_seconds() {
    wait_for_other_tests();
    let place = Place::new();
    let out = place.path("run");
    let options = ["--steps", "100000", "--rank-timeout", "5"];
    let mut command = LAUNCHER.ranks(2, &train_small(&place, "run", &options));
    command.env("ROUTEGRAD_NCCL", stand_in());
    let mut run = Running::start(LAUNCHER, command, &out, 2);
    assert!(wait_for_step(&mut run.child, &out, 8));
    // Two heartbeats more: what is reported is what the last one told.
    std::thread::sleep(Duration::from_secs(1));
    let stopped = run.process(1).unwrap();
    signal(stopped, "-STOP");
    let seconds = wait_until(10.0, "the end of the other rank", || {
        run.process(0).is_none()
    });
    // Launchers do that.
    signal(stopped, "-KILL");
    let (success, stderr, _) = run.end(5.0);
    let said = errors(&stderr);
    println!("{seconds:.1} s: {said:?}");
    assert!(!success && said.len() == 1, "{stderr}");
    let call = said[0].split(" at call ").nth(1).unwrap_or_default();
    let call = call.split(',').next().unwrap_or_default();
    assert!(
        said[0].starts_with("error: rank 1 (")
            && call.parse::<u64>().is_ok_and(|call| call >= 8)
            && said[0].contains("step "),
        "{said:?}"
    );
}

/// Not a test of its own: what each process of the next one does.
#[test]
fn a_rank_of_the_test_of_a_slow_host() {
    let Ok(slow) = std::env::var("ROUTEGRAD_TEST_SLOW") else {
        return;
    };
    let dist = dist::start(Ranks::Auto, Duration::from_secs(2)).unwrap();
    let config = config(&["router.name=\"default\""]);
    let mut run = Trainer::builder(config)
        .ranks(dist.clone())
        .build()
        .unwrap();
    for step in 1.. {
        doing(format!("step {step}"));
        // Its heart beats on.
        if step == 7 && dist.rank().to_string() == slow {
            doing("a hook behind step 6");
            std::thread::sleep(Duration::from_secs(60));
        }
        run.step().unwrap();
    }
}

#[test]
#[ignore = "slow"]
fn a_rank_that_does_not_begin_a_replayed_step_is_named_with_what_it_does() {
    wait_for_other_tests();
    for rank in [1, 0] {
        let mut own = Command::new(std::env::current_exe().unwrap());
        own.args(["--exact", "stalls::a_rank_of_the_test_of_a_slow_host"]);
        let mut command = LAUNCHER.start(&[(2, &own)]);
        command
            .env("ROUTEGRAD_TEST_SLOW", rank.to_string())
            .env("ROUTEGRAD_NCCL", stand_in());
        let begun = std::time::Instant::now();
        let said = refused(command);
        println!("{:.1} s: {said:?}", begun.elapsed().as_secs_f64());
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(
            said[0].contains("has kept the others waiting for 2 s")
                && said[0].contains("a hook behind step 6"),
            "{said:?}"
        );
        assert!(
            said[0].starts_with(&format!("error: rank {rank} (")),
            "{said:?}"
        );
    }
}

/// Not a test of its own: what each process of the next one does.
#[test]
fn a_rank_of_the_test_of_long_work() {
    if std::env::var("ROUTEGRAD_TEST_LONG").is_err() {
        return;
    }
    let dist = dist::start(Ranks::Auto, Duration::from_secs(1)).unwrap();
    if dist.rank() == 1 {
        doing_alone("long work");
        std::thread::sleep(Duration::from_secs(5));
    }
    dist.barrier().unwrap();
    assert!(dist::conclude(Ok(())).is_ok());
}

#[test]
#[ignore = "slow"]
fn ranks_wait_without_a_limit_for_whichever_works_alone() {
    wait_for_other_tests();
    let mut own = Command::new(std::env::current_exe().unwrap());
    own.args(["--exact", "stalls::a_rank_of_the_test_of_long_work"]);
    let mut command = LAUNCHER.start(&[(3, &own)]);
    succeed(command.env("ROUTEGRAD_TEST_LONG", "1"));
}

/// Not a test of its own: what each process of the next one does.
#[test]
fn a_rank_of_the_test_of_an_error() {
    if std::env::var("ROUTEGRAD_TEST_ERROR").is_err() {
        return;
    }
    let dist = dist::start(Ranks::Auto, Duration::from_secs(5)).unwrap();
    let train = || -> routegrad::Result<()> {
        let config = config(&["router.name=\"topk\""]);
        let mut run = Trainer::builder(config).ranks(dist.clone()).build()?;
        for step in 1.. {
            if step == 7 && dist.rank() == 1 {
                return Err(Error::invalid("a", "b", "what is planted", "d"));
            }
            run.step()?;
        }
        Ok(())
    };
    if let Err(Some(error)) = dist::conclude(train()) {
        eprintln!("error: {error}");
    }
    std::process::exit(1);
}

/// A rank that frees its communicator waits for the others, which wait for this rank.
#[test]
#[ignore = "slow"]
fn the_error_of_a_rank_is_told_before_its_devices_are_disconnected() {
    wait_for_other_tests();
    let mut own = Command::new(std::env::current_exe().unwrap());
    own.args(["--exact", "stalls::a_rank_of_the_test_of_an_error"]);
    own.arg("--nocapture");
    let mut command = LAUNCHER.start(&[(2, &own)]);
    command
        .env("ROUTEGRAD_TEST_ERROR", "1")
        .env("ROUTEGRAD_NCCL", stand_in());
    let begun = std::time::Instant::now();
    let said = refused(command);
    let seconds = begun.elapsed().as_secs_f64();
    println!("{seconds:.1} s: {said:?}");
    assert!(
        said.len() == 1 && said[0].contains("rank 1") && said[0].contains("what is planted"),
        "{said:?}"
    );
}

/// One batch of 64 sequences in double precision, which takes rank 0 longer than the others wait for a rank.
#[test]
#[ignore = "slow"]
fn ranks_without_a_batch_to_evaluate_wait_without_a_limit() {
    wait_for_other_tests();
    let place = Place::new();
    let mut train = program();
    train.args(["train", "--preset", "small", "--steps", "1", "--quiet"]);
    train.args(["--rank-timeout", "2", "--threads", "1", "--no-checkpoint"]);
    train.arg("--out").arg(place.path("run"));
    for set in [
        "train.dtype=\"f64\"",
        "train.sequences_per_step=64",
        "train.micro_batch=64",
        "train.eval_sequences=64",
    ] {
        train.args(["--set", set]);
    }
    succeed(&mut LAUNCHER.ranks(2, &train));
}
