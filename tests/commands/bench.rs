//! `routegrad bench` as a user runs it on a machine without a GPU: it measures what is there, keeps records, flags what
//! became slower, and reports from files.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_routegrad"));
    command.arg("bench").args(arguments);
    command.output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs it to a good end and gives what it printed.
fn good(arguments: &[&str]) -> String {
    let output = bench(arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs it to an error and gives its text.
fn refused(arguments: &[&str]) -> String {
    let output = bench(arguments);
    assert!(!output.status.success(), "{}", text(&output.stdout));
    text(&output.stderr)
}

fn has_gpu() -> bool {
    Path::new("/dev/nvidiactl").exists()
}

/// The one file of records in a folder.
fn records(folder: &Path) -> (PathBuf, Vec<Value>) {
    let mut files = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let file = files.next().expect("a file of records");
    assert!(files.next().is_none(), "more than one file");
    let lines = fs::read_to_string(&file).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    (file, lines.collect())
}

#[test]
fn without_a_gpu_it_says_so_and_lists_operations_and_simulated_kernels() {
    if has_gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("records");
    let listed = good(&["--list", "--out", out.to_str().unwrap()]);
    assert!(listed.starts_with("no GPU was found"), "{listed}");
    for case in [
        "cpu ",
        "attention tiny",
        "step tiny 8c1 default",
        "sim ",
        "layer_backward small 8c2 zipf",
    ] {
        assert!(listed.contains(case), "{case} is missing:\n{listed}");
    }
    assert!(!out.exists(), "a list wrote records");
    let on_gpu = good(&["--list", "--device", "cuda", "--only", "layer_forward"]);
    assert!(
        on_gpu.contains("layer_forward 7.33b 32c4") && !on_gpu.contains("adamw"),
        "{on_gpu}"
    );
}

#[test]
fn the_list_for_other_languages_has_sizes_and_costs() {
    let lines = good(&["--list", "--json", "--device", "sim", "--only", "combine"]);
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines[0]["head"], true);
    assert_eq!(
        lines[1]["sizes"]["counts"].as_array().map(Vec::len),
        Some(8)
    );
    assert_eq!(lines[1]["cases"].as_array().map(Vec::len), Some(1));
    assert!(lines[1]["cases"][0]["bytes"].as_f64() > Some(0.0));
}

#[test]
fn a_case_is_on_record_once_and_a_planted_slow_one_is_flagged() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("records");
    let place = out.to_str().unwrap();
    let case = [
        "--device",
        "sim",
        "--only",
        "combine small 8c1",
        "--out",
        place,
    ];
    good(&case);
    let printed = good(&case);
    assert!(
        printed.contains("combine small 8c1") && printed.contains("no floors"),
        "{printed}"
    );
    let (file, lines) = records(&out);
    assert_eq!(lines.len(), 1);
    assert!(lines[0]["timing"]["seconds"].as_f64() > Some(0.0));

    // The same record as if it had been a thousand times as fast.
    let mut fast = lines[0].clone();
    fast["timing"]["seconds"] = (fast["timing"]["seconds"].as_f64().unwrap() / 1000.0).into();
    let baseline = folder.path().join("before.jsonl");
    fs::write(&baseline, format!("{fast}\n")).unwrap();
    let baseline = baseline.to_str().unwrap();
    let named = good(&[&case[..], &["--baseline", baseline]].concat());
    assert!(named.contains("1 of them are slower"), "{named}");
    let error = refused(&[&case[..], &["--baseline", baseline, "--fail-slower", "5%"]].concat());
    assert!(error.contains("combine small 8c1"), "{error}");

    // A baseline of another case compares nothing.
    let mut other = lines[0].clone();
    other["case"] = "another".into();
    let unrelated = folder.path().join("unrelated.jsonl");
    fs::write(&unrelated, format!("{other}\n")).unwrap();
    let unrelated = unrelated.to_str().unwrap();
    good(&[&case[..], &["--baseline", unrelated]].concat());
    let error = refused(&[&case[..], &["--baseline", unrelated, "--fail-slower", "5%"]].concat());
    assert!(
        error.contains("at least one case that is in the baseline"),
        "{error}"
    );

    // And as if it had been slower.
    let mut slow = lines[0].clone();
    slow["timing"]["seconds"] = 1000.0.into();
    fs::write(&file, format!("{slow}\n")).unwrap();
    good(
        &[
            &case[..],
            &["--baseline", file.to_str().unwrap(), "--fail-slower", "5%"],
        ]
        .concat(),
    );
}

#[test]
fn a_run_that_has_no_time_says_what_it_left() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("records");
    let printed = good(&[
        "--device",
        "sim",
        "--budget",
        "0",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(printed.contains("not run for lack of time"), "{printed}");
}

#[test]
fn records_of_peers_merge_and_what_could_not_run_is_in_the_report_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("records");
    let line = |implementation: &str, seconds: Option<f64>, detail: &str| {
        let timing = seconds.map(|s| {
            serde_json::json!({"seconds": s, "passes": [s, s], "spread": [0.1, 0.1], "samples": 5, "launches": 1,
                "sets": 2, "graph": true})
        });
        serde_json::json!({"machine": "GPU", "device": "cuda", "case": "layer_forward 1.96b 8c1", "family": "layer_forward",
            "implementation": implementation, "version": "1", "run": "r", "date": "2026-01-01T00:00:00Z", "flops": 1e12,
            "bytes": 1e9, "timing": timing, "detail": detail})
        .to_string()
    };
    let lines = [
        line("routegrad", Some(1e-3), ""),
        line("a peer", Some(2e-3), ""),
        line("another", None, "no <wheel> for this Python"),
    ];
    let file = folder.path().join("peers.jsonl");
    fs::write(&file, lines.join("\n")).unwrap();
    let place = out.to_str().unwrap();
    let merged = good(&["--merge", file.to_str().unwrap(), "--out", place]);
    assert_eq!(merged.trim(), "3 records, 3 of them new");
    let page = folder.path().join("bench.html");
    good(&["--report", page.to_str().unwrap(), "--out", place]);
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("Speed relative to a peer") && page.contains("<td>2.000</td>"));
    assert!(page.contains("no &lt;wheel&gt; for this Python"));
}

#[test]
fn the_report_of_the_recorded_runs_shows_a_summary_pictures_and_needs_no_other_file() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("bench.html");
    let readme = folder.path().join("README.md");
    let marks = fs::read_to_string("README.md").unwrap();
    fs::write(&readme, &marks).unwrap();
    let pictures = folder.path().join("pictures");
    good(&[
        "--report",
        page.to_str().unwrap(),
        "--pictures",
        pictures.to_str().unwrap(),
        "--update",
        readme.to_str().unwrap(),
    ]);
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("NVIDIA H200") && page.contains("cuBLASLt"));
    assert!(page.contains("times as fast as cuBLASLt, geometric mean"));
    assert_eq!(page.matches("<!DOCTYPE html>").count(), 1);
    for outside in ["src=", "href=", "@import", "NaN"] {
        assert!(!page.contains(outside), "{outside}");
    }
    for picture in ["bench-roofline.svg", "bench-cublas.svg"] {
        let new = fs::read_to_string(pictures.join(picture)).unwrap();
        let shown = fs::read_to_string(Path::new("docs").join(picture)).unwrap();
        assert_eq!(new, shown, "docs/{picture} is not what the command writes");
    }
    assert_eq!(
        fs::read_to_string(readme).unwrap(),
        marks,
        "the README's table is not what the command writes"
    );
}

#[test]
fn bad_input_is_named_with_what_to_do() {
    let error = refused(&["--device", "tpu"]);
    assert!(error.contains("cpu, sim or cuda"), "{error}");
    let error = refused(&["--device", "sim", "--only", "no such case"]);
    assert!(error.contains("--list"), "{error}");
    let error = refused(&["--baseline", "x", "--fail-slower", "much"]);
    assert!(error.contains("5%"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("peers.jsonl");
    fs::write(&broken, "{\"machine\": 1}\n").unwrap();
    let place = folder.path().join("records");
    let error = refused(&[
        "--merge",
        broken.to_str().unwrap(),
        "--out",
        place.to_str().unwrap(),
    ]);
    assert!(
        error.contains("peers.jsonl") && error.contains("line 1"),
        "{error}"
    );
    let error = refused(&["--report", "x.html", "--out", place.to_str().unwrap()]);
    assert!(error.contains("routegrad bench"), "{error}");
    if !has_gpu() {
        let error = refused(&["--device", "cuda"]);
        assert!(error.contains("an NVIDIA GPU from Ampere on"), "{error}");
    }
}
