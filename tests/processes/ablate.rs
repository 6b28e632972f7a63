//! `ablate` on the processes of a launcher: a run for each group of ranks.

use crate::common::*;
use crate::launchers::*;
use std::fs;

const STEPS: u64 = 60;

/// Arguments of all grids here.
fn grid<'a>(ranks_per_run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [SHARED, &["--ranks-per-run", ranks_per_run], more].concat()
}

#[test]
#[ignore = "slow"]
fn ranks_train_runs_side_by_side_and_a_killed_grid_ends_in_the_report_of_one_process() {
    wait_for_other_tests();
    let launchers = launchers();
    let (Some(first), Some(last)) = (launchers.first(), launchers.last()) else {
        return;
    };
    let place = Place::new();
    succeed(&mut place.ablate("one", STEPS, SHARED));
    let expected = ablation_report(&place.path("one"));
    let command = place.ablate("two", STEPS, &grid("1", &[]));
    let (out, said) = succeed(&mut first.ranks(2, &command));
    assert!(said.contains("2 runs at a time, each on 1 rank"), "{said}");
    assert_eq!(out.matches("report: ").count(), 1, "{out}");
    assert!(ablation_report(&place.path("two")) == expected);

    let command = place.ablate("killed", STEPS, &grid("1", &[]));
    let out = place.path("killed");
    let mut run = Running::start(*last, last.ranks(2, &command), &out, 2);
    let begun = wait_for_step(&mut run.child, &out.join("runs/topk-0"), 25);
    assert!(begun, "the grid ended before it was killed");
    signal(run.process(1).unwrap(), "-KILL");
    let (success, stderr, _) = run.end(5.0);
    assert!(!success, "{stderr}");
    succeed(&mut last.ranks(2, &command));
    assert!(ablation_report(&out) == expected);
}

#[test]
#[ignore = "slow"]
fn two_ranks_of_a_group_train_what_two_ranks_of_a_launcher_do() {
    let Some(launcher) = launchers().into_iter().next() else {
        return;
    };
    let place = Place::new();
    let command = place.ablate("grid", STEPS, &grid("2", &[]));
    succeed(&mut launcher.ranks(4, &command));
    let steps = STEPS.to_string();
    let options = ["--router", "default", "--seed", "1", "--steps", &steps];
    succeed(&mut launcher.ranks(2, &train(&place, "run", &options)));
    let of_grid = place.path("grid/runs/default-1");
    assert_same_end(&place.path("run"), &of_grid, STEPS);
}

#[test]
#[ignore = "slow"]
fn a_run_that_diverges_on_several_ranks_stands_in_the_report_and_stops_no_other() {
    let Some(launcher) = launchers().into_iter().last() else {
        return;
    };
    let place = Place::new();
    let rates = ["--learning-rate", "1e30,1e-3"];
    let most = ["--set", "train.max_skipped_steps=3"];
    let command = place.ablate("grid", STEPS, &grid("2", &[&rates[..], &most].concat()));
    let (out, said) = succeed(&mut launcher.ranks(4, &command));
    assert!(said.contains("diverged: "), "{said}");
    assert_eq!(out.matches(": diverged after step").count(), 4, "{out}");
    let runs = fs::read_to_string(place.path("grid/runs.csv")).unwrap();
    assert_eq!(runs.matches("finished").count(), 4, "{runs}");
}

#[test]
fn groups_that_do_not_divide_the_ranks_are_refused() {
    let Some(launcher) = launchers().into_iter().next() else {
        return;
    };
    let place = Place::new();
    let said = refused(launcher.ranks(2, &place.ablate("grid", STEPS, &grid("3", &[]))));
    let expected = "groups of a size that divides 2";
    assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");
    let jobs = grid("1", &["--jobs", "2"]);
    let said = refused(launcher.ranks(2, &place.ablate("grid", STEPS, &jobs)));
    assert!(said[0].contains("1 under a launcher"), "{said:?}");
}
