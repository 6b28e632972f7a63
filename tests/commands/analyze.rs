//! `analyze` as a user runs it.

use crate::common::*;
use std::fs;

#[test]
fn a_checkpoint_becomes_one_page_with_data_that_no_thread_count_changes() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "10"]));
    let analyze = |threads: &str, out: &str| {
        let mut command = program();
        command.args(["analyze", "--sequences", "4", "--threads", threads]);
        command.arg("--model").arg(place.path("run"));
        succeed(command.arg("--out").arg(place.path(out)));
        let mut files: Vec<_> = fs::read_dir(place.path(out))
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        files.sort();
        let name = |p: &std::path::PathBuf| p.file_name().unwrap().to_str().unwrap().to_owned();
        let read = |p: &std::path::PathBuf| (name(p), fs::read_to_string(p).unwrap());
        files.iter().map(read).collect::<Vec<_>>()
    };
    let one = analyze("1", "one");
    assert!(one == analyze("2", "two"));

    let text = |name: &str| &one.iter().find(|(n, _)| n == name).unwrap().1;
    let json: serde_json::Value = serde_json::from_str(text("analysis.json")).unwrap();
    let page = text("report.html");
    let mut figures = 0;
    for analysis in json["analyses"].as_array().unwrap() {
        let name = analysis["name"].as_str().unwrap();
        assert!(page.contains(&format!("id=\"{name}\"")), "{name}");
        let rows = analysis["table"]["rows"].as_array().unwrap();
        if rows.is_empty() {
            // One expert a token: none are chosen together.
            assert_eq!(name, "co-activation");
            continue;
        }
        assert_eq!(text(&format!("{name}.csv")).lines().count(), 1 + rows.len());
        assert!(page.contains(text(&format!("{name}.svg"))), "{name}");
        figures += 1;
    }
    assert_eq!(figures, 10);
    for outside in ["src=", "href=", "@import", "NaN"] {
        assert!(!page.contains(outside), "the page needs {outside}");
    }
}

/// The state that a setting of `default` adds is the checkpoint's own in every analysis.
#[test]
fn checkpoints_of_every_router_and_kind_of_default_vectors_are_analysed() {
    let place = Place::new();
    let kinds: &[&[&str]] = &[
        &["--router", "topk"],
        &["--router", "remoe"],
        &["--router", "lossfree"],
        &["--router", "densemixer"],
        &["--set", "router.shrink=\"running\""],
        &["--set", "router.source=\"sampled\""],
        &[
            "--set",
            "router.shrink=0.5",
            "--set",
            "router.use_at_evaluation=false",
        ],
    ];
    for (i, kind) in kinds.iter().enumerate() {
        let run = format!("run-{i}");
        succeed(&mut place.train(&run, &[&["--steps", "3", "--quiet"], *kind].concat()));
        let mut command = program();
        command.args(["analyze", "--sequences", "2", "--model"]);
        let (said, _) = succeed(command.arg(place.path(&run)));
        assert!(said.contains("gradient-error"), "{kind:?}: {said}");
    }
}

#[test]
fn what_cannot_be_analysed_is_answered_with_what_to_do() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "10"]));
    let error = |arguments: &[&str]| {
        let mut command = program();
        command.arg("analyze").arg("--model").arg(place.path("run"));
        fail(command.args(arguments))
    };
    assert!(error(&["--sequences", "0"]).contains("1 sequence or more"));
    assert!(error(&["--data", "no-such-folder"]).contains("check the path"));
    let file = place.text.to_str().unwrap();
    assert!(error(&["--sequences", "1", "--out", file]).contains(file));
    assert!(!place.path("run/analysis").exists());
    let line = fail(program().args(["analyze", "--model", "no-such-run"]));
    assert!(line.contains("no-such-run"), "{line}");
}

#[test]
fn every_source_of_held_out_text_is_named_though_there_are_more_than_twelve() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "2"]));
    fs::create_dir(place.path("texts")).unwrap();
    let name = |i: usize| format!("{}.txt", char::from(b'a' + i as u8));
    for i in 0..14 {
        // Later files have longer documents.
        let document = format!("a word of file {i} ").repeat(20 + i);
        let text = vec![document; 10].join("\n\n\n");
        fs::write(place.path("texts").join(name(i)), text).unwrap();
    }
    let tokens = place.path("tokens");
    let mut prepare = program();
    prepare
        .args(["data", "prepare", "--quiet", "--validation-fraction", "0.3"])
        .arg(place.path("texts"));
    succeed(prepare.arg("--out").arg(&tokens));
    let on_tokens = |command: &str| {
        let mut program = program();
        program.args([command, "--model"]).arg(place.path("run"));
        succeed(program.arg("--data").arg(&tokens)).0
    };
    let evaluated = on_tokens("eval");
    for i in 0..14 {
        assert!(evaluated.contains(&name(i)), "{}: {evaluated}", name(i));
    }
    let analysed = on_tokens("analyze");
    let note = analysed.lines().find(|l| l.contains("less held-out text"));
    let note = note.unwrap_or_else(|| panic!("{analysed}"));
    assert!(note.contains("a.txt") && note.contains("b.txt"), "{note}");
    assert!(!note.contains("c.txt"), "{note}");
}
