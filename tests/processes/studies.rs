//! `analyze` and `eval` on several ranks write and print what one process does.

use crate::common::*;
use crate::launchers::*;
use std::fs;
use std::process::Command;

/// `command` of the run `run` in `place`.
fn of_run(place: &Place, command: &str, arguments: &[&str]) -> Command {
    let mut program = program();
    program.arg(command).arg("--model").arg(place.path("run"));
    program.args(arguments);
    program
}

#[test]
#[ignore = "slow"]
fn analyses_have_the_same_bytes_on_one_two_and_three_ranks() {
    let by_mpi: Vec<_> = launchers().into_iter().zip([2, 3]).collect();
    let by_tcp = vec![(Launcher::Torchrun, 3)];
    for (router, top_k, runs) in [("topk", 2, by_mpi), ("default", 1, by_tcp)] {
        let place = Place::new();
        let k = format!("model.top_k={top_k}");
        let options = ["--steps", "4", "--router", router, "--set", &k];
        succeed(&mut train(&place, "run", &options));
        let analyze = |out: &str| {
            let out = place.path(out).display().to_string();
            // Two micro-batches, the second not full.
            of_run(&place, "analyze", &["--sequences", "6", "--out", &out])
        };
        let (told, _) = succeed(&mut analyze("1"));
        let expected = files(&place.path("1"));
        assert!(expected.len() > 15, "{} files", expected.len());
        for (launcher, ranks) in runs {
            let out = format!("{launcher:?}-{ranks}");
            let (said, _) = succeed(&mut launcher.ranks(ranks, &analyze(&out)));
            let found = files(&place.path(&out));
            let names = |files: &[(String, Vec<u8>)]| -> Vec<String> {
                files.iter().map(|(name, _)| name.clone()).collect()
            };
            assert_eq!(names(&found), names(&expected), "{router}, {out}");
            for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                assert!(found == expected, "{router}, {out}: {name}");
            }
            let report = |out: &str| place.path(out).join("report.html").display().to_string();
            assert_eq!(said, told.replace(&report("1"), &report(&out)));
        }
    }
}

#[test]
fn evaluations_and_scores_are_those_of_one_process() {
    let place = Place::new();
    let options = ["--steps", "4", "--router", "default"];
    succeed(&mut train(&place, "run", &options));
    let question = |i: u64| {
        let (query, goal) = (i % 7, i % 5);
        format!(
            r#"{{"doc_id": {i}, "doc": {{"query": "word{query}", "goal": "word{goal} word{i}", "choices": ["word1 word2", "word{goal}"], "gold": {}}}}}"#,
            i % 2
        )
    };
    let questions: Vec<String> = (0..40).map(question).collect();
    fs::write(place.path("piqa.jsonl"), questions.join("\n")).unwrap();
    let tasks = place.folder.path().to_str().unwrap();
    let kinds: [&[&str]; 4] = [
        &[],
        &["--sequences", "5", "--dtype", "f64"],
        &["--compare-default-vectors"],
        &["--tasks", "piqa", "--task-data", tasks],
    ];
    for (i, kind) in kinds.iter().enumerate() {
        let eval = |out: &str| {
            let mut command = of_run(&place, "eval", kind);
            if kind.contains(&"--tasks") {
                command.arg("--out").arg(place.path(out));
            }
            command
        };
        // The table of scores says how long they took.
        let told = |said: &str| -> Vec<String> {
            let lines = said.lines().filter(|line| !line.contains(" tokens in "));
            lines.map(String::from).collect()
        };
        let one = told(&succeed(&mut eval("one")).0);
        assert!(one.len() > 2, "{one:?}");
        for (launcher, ranks) in launchers().into_iter().zip([2, 3]) {
            let out = format!("{i}-{launcher:?}");
            let (said, _) = succeed(&mut launcher.ranks(ranks, &eval(&out)));
            assert_eq!(told(&said), one, "{kind:?}, {launcher:?}");
            if kind.contains(&"--tasks") {
                let answers = |out: &str| fs::read(place.path(out).join("piqa.jsonl")).unwrap();
                assert!(answers(&out) == answers("one"), "{launcher:?}");
            }
        }
    }
}

#[test]
fn ranks_of_other_arguments_or_questions_and_errors_of_one_rank_end_all_with_one_message() {
    let place = Place::new();
    succeed(&mut train(&place, "run", &["--steps", "4"]));
    for launcher in launchers() {
        let analyze = |sequences: &str| of_run(&place, "analyze", &["--sequences", sequences]);
        let said = refused(launcher.start(&[(1, &analyze("2")), (1, &analyze("3"))]));
        let expected = "--sequences 2` and `analyze";
        assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");

        // Rank 0 alone writes.
        let file = place.text.to_str().unwrap();
        let analyze = of_run(&place, "analyze", &["--sequences", "2", "--out", file]);
        let said = refused(launcher.ranks(2, &analyze));
        assert!(said.len() == 1 && said[0].contains(file), "{said:?}");

        // The same path on another host, as a folder that each process enters for itself.
        for (folder, choice) in [("a", "one"), ("b", "another")] {
            let line = format!(
                r#"{{"doc_id": 0, "doc": {{"query": "a", "goal": "b", "choices": ["{choice}", "c"], "gold": 0}}}}"#
            );
            fs::create_dir_all(place.path(folder)).unwrap();
            fs::write(place.path(folder).join("piqa.jsonl"), line).unwrap();
        }
        let program = env!("CARGO_BIN_EXE_routegrad");
        let in_folder = |folder: &str| {
            let mut command = Command::new("sh");
            let (folder, run) = (place.path(folder), place.path("run"));
            let line = format!(
                "cd {} && exec {program} eval --tasks piqa --task-data . --model {}",
                folder.display(),
                run.display()
            );
            command.args(["-c", &line]);
            command
        };
        let said = refused(launcher.start(&[(1, &in_folder("a")), (1, &in_folder("b"))]));
        let expected = "on rank 0 and rank 1 questions with the digests";
        assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");
    }
}
