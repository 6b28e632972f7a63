//! A process of a run that dies, hangs, fails or is told to stop ends the whole run, which loses no checkpoint.

use crate::common::*;
use crate::launchers::*;
use routegrad::tensor::random::{Purpose, Stream};
use routegrad::train::checkpoint;
use std::path::Path;
use std::time::Duration;

/// The step that a resumed run says it goes on from.
fn resumed_from(stderr: &str) -> usize {
    let line = stderr.lines().find_map(|l| l.strip_prefix("from step "));
    line.map_or(0, |l| l.split(' ').next().unwrap().parse().unwrap())
}

/// The step of the newest checkpoint, all of whose newer ones are whole.
fn newest_whole(out: &Path) -> Option<u64> {
    let (found, damaged) = checkpoint::newest(&out.join("checkpoints")).unwrap();
    assert!(damaged.is_empty(), "{damaged:?}");
    found.map(|c| c.step())
}

#[test]
#[ignore = "slow"]
fn twenty_kills_of_any_rank_end_all_within_seconds_and_the_run_ends_in_the_same_bytes() {
    wait_for_other_tests();
    let launchers = launchers();
    if launchers.is_empty() {
        return;
    }
    const STEPS: &str = "400";
    let place = Place::new();
    let options = ["--steps", STEPS, "--set", "train.eval_interval=1000"];
    succeed(&mut launchers[0].ranks(2, &train(&place, "whole", &options)));
    let out = place.path("killed");
    let random = Stream::new(5, Purpose::Check, 0, 0);
    let mut slowest: f64 = 0.0;
    for n in 0..20u64 {
        let launcher = launchers[n as usize % launchers.len()];
        let before = steps_logged(&out);
        let command = match n {
            0 => train(&place, "killed", &options),
            _ => place.resume("killed"),
        };
        let mut command = launcher.ranks(2, &command);
        // Eight of them at points of rank 0's saves.
        let at_point = n % 5 < 2;
        if at_point {
            let point = 1.0 + random.uniform(2 * n) * 16.0;
            command.env("ROUTEGRAD_FAULT_POINT", (point as u64).to_string());
        }
        let mut run = Running::start(launcher, command, &out, 2);
        let rank = match at_point {
            true => 0,
            false => n as usize / 2 % 2,
        };
        if at_point {
            wait_until(60.0, "the first process", || run.process(0).is_some());
            wait_until(60.0, "its end", || run.process(0).is_none());
        } else {
            let ahead = 1 + (random.uniform(2 * n) * 20.0) as usize;
            assert!(
                wait_for_step(&mut run.child, &out, before + ahead),
                "kill {n}"
            );
            let later = random.uniform(2 * n + 1) * 0.01;
            std::thread::sleep(Duration::from_secs_f32(later));
            signal(run.process(rank).unwrap(), "-KILL");
        }
        let (success, stderr, seconds) = run.end(5.0);
        slowest = slowest.max(seconds);
        assert!(!success, "kill {n}: {stderr}");
        assert!(!stderr.contains("warning: skipped"), "kill {n}: {stderr}");
        let expected = format!("error: rank {rank} (");
        let said = errors(&stderr);
        // MPICH's launcher may kill the rank that reports before it does.
        let least = usize::from(launcher == Launcher::OpenMpi);
        let named = |e: &String| e.starts_with(&expected) && e.contains(" ended at call ");
        assert!(
            (least..=1).contains(&said.len()) && said.iter().all(named),
            "kill {n}, {launcher:?}: {stderr}"
        );
        let logged = steps_logged(&out).max(before);
        let saved = newest_whole(&out).unwrap_or(0) as usize;
        // The last save that was begun may have been under way.
        assert!(saved + 30 >= logged, "kill {n}: step {saved} of {logged}");
    }
    println!("slowest end: {slowest:.1} s");
    // It goes on from where it is on one, two and four ranks.
    let copied = |name: &str| {
        let status = std::process::Command::new("cp")
            .arg("-r")
            .args([&out, &place.path(name)])
            .status();
        assert!(status.unwrap().success());
        let from = newest_whole(&out).unwrap() + 5;
        let mut command = place.resume(name);
        command.args(["--steps", &from.to_string()]);
        (command, from as usize)
    };
    let (mut one, from) = copied("one");
    let (_, stderr) = succeed(&mut one);
    assert_eq!(resumed_from(&stderr), from - 5);
    let (four, from) = copied("four");
    let (_, stderr) = succeed(&mut launchers[0].ranks(4, &four));
    assert_eq!(resumed_from(&stderr), from - 5);
    succeed(&mut launchers[0].ranks(2, &place.resume("killed")));
    assert_same_end(&place.path("whole"), &out, STEPS.parse().unwrap());
}

#[test]
#[ignore = "slow"]
fn a_rank_that_is_stopped_is_named_with_its_call_within_ten_seconds() {
    wait_for_other_tests();
    for (launcher, rank) in launchers().into_iter().zip([1, 0]) {
        let place = Place::new();
        let out = place.path("run");
        let command = train(&place, "run", &["--steps", "100000", "--rank-timeout", "5"]);
        let mut run = Running::start(launcher, launcher.ranks(2, &command), &out, 2);
        assert!(wait_for_step(&mut run.child, &out, 15));
        // Two heartbeats more: what is reported is what the last one told, and 15 steps fit between two.
        std::thread::sleep(Duration::from_secs(1));
        signal(run.process(rank).unwrap(), "-STOP");
        let (success, stderr, seconds) = run.end(10.0);
        let said = errors(&stderr);
        println!("{launcher:?}, {seconds:.1} s: {said:?}");
        assert!(!success && said.len() == 1, "{stderr}");
        let named = said[0].starts_with(&format!("error: rank {rank} ("));
        assert!(
            named && said[0].contains(" at call ") && said[0].contains("step "),
            "{said:?}"
        );
        newest_whole(&out).unwrap();
    }
}

#[test]
#[ignore = "slow"]
fn a_full_disk_of_the_rank_that_writes_stops_all_and_costs_no_checkpoint() {
    wait_for_other_tests();
    for launcher in launchers() {
        let place = Place::new();
        let out = place.path("run");
        let command = train(&place, "run", &["--steps", "100000"]);
        let mut command = launcher.ranks(2, &command);
        // Five files of each save, the manifest the fifth: the third save finds the disk full.
        command.env("ROUTEGRAD_DISK_FULL", "13");
        let (success, stderr, _) = Running::start(launcher, command, &out, 2).end(60.0);
        let said = errors(&stderr);
        assert!(!success && said.len() == 1, "{stderr}");
        assert!(
            said[0].starts_with("error: rank 0 (") && said[0].contains("cannot write"),
            "{said:?}"
        );
        assert_eq!(newest_whole(&out), Some(20));
    }
}

#[test]
#[ignore = "slow"]
fn an_error_of_another_rank_ends_all_and_is_reported_once_with_its_name() {
    for launcher in launchers() {
        let place = Place::new();
        let own = train(&place, "run", &["--steps", "100"]);
        let other = train(&place, "run", &["--config", "/nonexistent/config.toml"]);
        let said = refused(launcher.start(&[(2, &own), (1, &other)]));
        assert_eq!(said.len(), 1, "{said:?}");
        let named = said[0].starts_with("error: rank 2 (") && said[0].contains(" failed at call ");
        assert!(
            named && said[0].contains("/nonexistent/config.toml"),
            "{said:?}"
        );
        assert!(!place.path("run").exists());
    }
}

#[test]
fn sigusr1_of_the_launcher_saves_and_stops_all_after_the_same_step() {
    let (place, options) = (Place::new(), ["--steps", "60"]);
    for launcher in launchers() {
        // Both launchers give the same bytes: one is compared with the other.
        let whole = place.path("whole");
        if !whole.exists() {
            succeed(&mut launcher.ranks(2, &train(&place, "whole", &options)));
        }
        let name = format!("cut-{launcher:?}");
        let out = place.path(&name);
        let mut child = launcher
            .ranks(2, &train(&place, &name, &options))
            .spawn()
            .unwrap();
        assert!(wait_for_step(&mut child, &out, 13));
        signal(child.id(), "-USR1");
        let output = child.wait_with_output().unwrap();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{launcher:?}: {stdout}{stderr}");
        assert_eq!(
            stdout.matches("stopped and saved at step").count(),
            1,
            "{stdout}"
        );
        let step = steps_logged(&out);
        assert!(step < 60 && newest_whole(&out) == Some(step as u64));
        let (_, stderr) = succeed(&mut launcher.ranks(2, &place.resume(&name)));
        assert_eq!(resumed_from(&stderr), step);
        assert_same_end(&whole, &out, 60);
    }
}
