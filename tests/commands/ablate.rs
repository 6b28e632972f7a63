//! `ablate` as a user runs it: a grid that was killed ends in the report of one that was not, runs
//! that `train` made count as done, and one that fails stops no other.

use crate::common::*;
use std::fs;
use std::process::Command;

const STEPS: u64 = 100;

/// `ablate` of the micro model: two routers, two seeds, and further arguments.
fn ablate(place: &Place, out: &str, arguments: &[&str]) -> Command {
    place.ablate(out, STEPS, arguments)
}

#[test]
#[ignore = "slow"]
fn a_grid_that_is_killed_and_terminated_ends_in_the_bytes_of_one_that_is_not() {
    let place = Place::new();
    let (whole, _) = succeed(&mut ablate(&place, "whole", &["--quiet"]));
    let cut = place.path("cut");
    for (n, (run, step, signal)) in [
        ("topk-0", 35, "-KILL"),
        ("default-0", 15, "-TERM"),
        ("topk-1", 70, "-KILL"),
        ("topk-1", 90, "-TERM"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut child = ablate(&place, "cut", &[]).spawn().unwrap();
        assert!(
            wait_for_step(&mut child, &cut.join("runs").join(run), step),
            "{n}: the grid ended before it was stopped"
        );
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
        let output = child.wait_with_output().unwrap();
        if n > 0 {
            // The run that was cut off goes on from its newest checkpoint.
            let said = text(&output.stderr);
            assert!(said.contains("from step "), "{n}: {said}");
        }
        if signal == "-TERM" {
            assert!(output.status.success(), "{}", text(&output.stderr));
            assert!(text(&output.stdout).contains("run the same command again to continue"));
        }
    }
    // What is done is not done again.
    let touched = || {
        fs::metadata(cut.join("runs/topk-0/metrics.jsonl"))
            .unwrap()
            .modified()
            .unwrap()
    };
    let before = touched();
    let (end, said) = succeed(&mut ablate(&place, "cut", &[]));
    assert!(
        said.contains("of 4 runs are done") && before == touched(),
        "{said}"
    );

    let paths = |text: &str, out: &str| text.replace(place.path(out).to_str().unwrap(), "OUT");
    assert_eq!(paths(&whole, "whole"), paths(&end, "cut"));
    for run in ["topk-0", "default-0", "topk-1", "default-1"] {
        let of = |out: &str| place.path(out).join("runs").join(run);
        assert_same_end(&of("whole"), &of("cut"), STEPS);
    }
    let files = ablation_report(&cut);
    assert!(ablation_report(&place.path("whole")) == files);
    for name in [
        "report.html",
        "summary.md",
        "final-loss.csv",
        "final-loss.svg",
        "validation-loss.svg",
        "runs.csv",
    ] {
        assert!(files.contains_key(name), "{name}");
    }
    let page = &files["report.html"];
    for outside in ["src=", "href=", "@import", "NaN"] {
        assert!(!page.contains(outside), "the page has {outside}");
    }

    // Built again, with and without the grid on the command line, it is the same to the last byte.
    let page = fs::read(cut.join("report.html")).unwrap();
    fs::remove_file(cut.join("report.html")).unwrap();
    succeed(
        program()
            .args(["ablate", "--report-only", "--out"])
            .arg(&cut),
    );
    assert!(page == fs::read(cut.join("report.html")).unwrap());
    succeed(&mut ablate(&place, "cut", &["--report-only"]));
    assert!(page == fs::read(cut.join("report.html")).unwrap());
}

#[test]
fn runs_that_train_made_count_as_done_and_several_at_a_time_end_alike() {
    let place = Place::new();
    let steps = STEPS.to_string();
    for (router, seed) in [
        ("topk", "0"),
        ("topk", "1"),
        ("default", "0"),
        ("default", "1"),
    ] {
        let name = format!("trained/runs/{router}-{seed}");
        let options = ["--router", router, "--seed", seed, "--steps", &steps];
        succeed(&mut place.train(&name, &options));
    }
    let log = place.path("trained/runs/topk-0/metrics.jsonl");
    let before = fs::read(&log).unwrap();
    let (_, said) = succeed(&mut ablate(&place, "trained", &[]));
    assert!(said.contains("4 of 4 runs are done"), "{said}");
    assert!(before == fs::read(&log).unwrap());

    succeed(&mut ablate(
        &place,
        "together",
        &["--jobs", "3", "--threads", "3"],
    ));
    assert!(ablation_report(&place.path("trained")) == ablation_report(&place.path("together")));
}

#[test]
#[ignore = "slow"]
fn a_run_that_fails_stands_in_the_report_and_stops_no_other() {
    let place = Place::new();
    // A rate that no model survives, and a healthy one.
    let rates = [
        "--learning-rate",
        "1e30,1e-3",
        "--set",
        "train.max_skipped_steps=3",
    ];
    let (out, said) = succeed(&mut ablate(&place, "grid", &rates));
    assert!(said.contains("diverged: "), "{said}");
    assert_eq!(out.matches(": diverged after step").count(), 4, "{out}");
    let runs = fs::read_to_string(place.path("grid/runs.csv")).unwrap();
    assert_eq!(runs.matches("diverged after step").count(), 4);
    assert_eq!(runs.matches("finished").count(), 4);
    // Tried again, it says the same.
    let (again, _) = succeed(&mut ablate(&place, "grid", &rates));
    assert_eq!(out, again);
}

#[test]
fn a_dry_run_lists_and_does_nothing() {
    let place = Place::new();
    let (out, _) = succeed(&mut ablate(&place, "grid", &["--dry-run"]));
    for part in [
        "topk-0",
        "default-1",
        "4 runs",
        "4c1",
        "new",
        "seconds of one H200",
    ] {
        assert!(out.contains(part), "no {part} in {out}");
    }
    assert!(!place.path("grid").exists());
    // --experts has priority over --set.
    for list in ["8c1", "8c1,16c2"] {
        let (out, _) = succeed(&mut ablate(
            &place,
            "grid",
            &["--experts", list, "--dry-run"],
        ));
        assert!(out.contains("8c1") && !out.contains("4c1"), "{out}");
    }
    let figure = ["ablate", "--figure", "5", "--scale", "0.01", "--dry-run"];
    let (out, _) = succeed(program().args(figure));
    for part in ["figure 5", "tiny instead of 1.96b", "sparsemixer-0", "8c2"] {
        assert!(out.contains(part), "no {part} in {out}");
    }
}

#[test]
fn the_text_of_the_command_line_replaces_a_mix_in_a_file() {
    let place = Place::new();
    let mix = "[data]\nmix = [{ source = \"none\", weight = 1.0 }]";
    fs::write(place.path("mix.toml"), mix).unwrap();
    let mut grid = place.ablate("grid", 1, &["--quiet", "--config"]);
    succeed(grid.arg(place.path("mix.toml")));
    let config = fs::read_to_string(place.path("grid/runs/topk-0/config.toml")).unwrap();
    assert!(config.contains("mix = []"), "{config}");
}

#[test]
fn what_is_wrong_with_a_grid_is_said_before_any_run_begins() {
    let place = Place::new();
    let out = place.path("grid");
    for (arguments, parts) in [
        (
            &["--axis", "train.lerning_rate=1,2"][..],
            &["`train.learning_rate`"][..],
        ),
        (&["--axis", "router.beta=1,2"], &["run ", "router"]),
        (
            &["--seed", "1,1"],
            &["one run with the name", "the same run twice"],
        ),
        (
            &["--name", "{router}"],
            &["one run with the name", "train.seed"],
        ),
        (
            &["--baseline", "remoe"],
            &["one of topk, default", "`remoe`"],
        ),
        (&["--axis", "model.top_k"], &["--axis", "key=value"]),
        (
            &["--axis", "train.seed=5,6"],
            &["--axis: ", "`train.seed`, whose values --seed gives"],
        ),
        (
            &["--axis", "model.top_k=1,2", "--set", "model.top_k=1"],
            &["--set: ", "`model.top_k`, whose values --axis gives"],
        ),
        (
            &["--axis", "steps=5,6", "--axis", "train.steps=7"],
            &["whose values --axis gives"],
        ),
        (
            &["--axis", "data.mix=[]"],
            &["--data: ", "beside `data.mix`, whose values --axis gives"],
        ),
        (&["--name", ""], &["names of runs", "``"]),
        (&["--name", ".."], &["names of runs", "`..`"]),
        (&["--jobs", "0"], &["--jobs"]),
        (
            &[
                "--jobs",
                "2",
                "--set",
                "train.device=cuda",
                "--set",
                "model.head_dim=64",
            ],
            &["--jobs: expected 1 for runs on a GPU", "got 2"],
        ),
        (&["--ranks-per-run", "2"], &["--ranks-per-run", "launcher"]),
        (&["--target-perplexity", "0.5"], &["above 1"]),
        (&["--scale", "0.1"], &["--scale", "preset"]),
        (&["--figure", "4"], &["analyze"]),
        (&["--grid", "none.toml"], &["none.toml", "check the path"]),
        (&["--report-only", "--dry-run"], &[]),
    ] {
        let mut command = ablate(&place, "grid", &[]);
        if arguments[0] == "--seed" {
            command = program();
            command.arg("ablate").arg("--out").arg(&out);
        }
        command.args(arguments);
        if parts.is_empty() {
            assert_eq!(command.output().unwrap().status.code(), Some(2));
            continue;
        }
        let line = fail(&mut command);
        for part in parts {
            assert!(line.contains(part), "{arguments:?}: no `{part}` in: {line}");
        }
        assert!(!out.exists(), "{arguments:?} left a folder");
    }
    // MICRO sets a number that the axis sets too.
    fs::write(place.path("g.toml"), "[axes]\nexperts = [\"8c1\"]").unwrap();
    let line = fail(ablate(&place, "grid", &["--grid"]).arg(place.path("g.toml")));
    assert!(
        line.contains("`model.num_experts`, whose values the axis `experts`"),
        "{line}"
    );
    let empty = fail(program().args(["ablate", "--out"]).arg(&out));
    assert!(empty.contains("at least one axis"), "{empty}");

    // A folder that holds another run of that name is left as it is.
    let other = ["--router", "topk", "--steps", "10"];
    succeed(&mut place.train("grid/runs/topk-0", &other));
    let log = fs::read(out.join("runs/topk-0/metrics.jsonl")).unwrap();
    for arguments in [&[][..], &["--dry-run"], &["--report-only"]] {
        let line = fail(&mut ablate(&place, "grid", arguments));
        for part in ["topk-0", "train.steps = 10 instead of 100", "--out"] {
            assert!(line.contains(part), "no `{part}` in: {line}");
        }
    }
    assert!(log == fs::read(out.join("runs/topk-0/metrics.jsonl")).unwrap());
    assert!(!out.join("ablation.toml").exists());
}
