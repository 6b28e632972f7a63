//! Which files `data prepare` reads, and what it says of those that it does not.

use crate::common::*;
use routegrad::data::folder::{Folder, Side};
use routegrad::data::prepare::{self, Options};
use std::fs;
use std::path::Path;

fn lines(name: &str) -> String {
    let line = |i| format!("{{\"text\": \"{name} document {i}\"}}\n");
    (0..10).map(line).collect()
}

/// Documents to train on and held out of `inputs` in `folder`; nothing is held out of the inputs themselves.
fn prepared(folder: &Path, inputs: &[&str], validation: &[&str]) -> Result<[usize; 2], String> {
    let out = folder.join("out");
    let _ = fs::remove_dir_all(&out);
    let paths = |names: &[&str]| names.iter().map(|n| folder.join(n)).collect::<Vec<_>>();
    let options = Options {
        validation_fraction: 0.0,
        validation: paths(validation),
        quiet: true,
        ..Options::new(&paths(inputs), &out)
    };
    prepare::run(&options).map_err(|e| e.to_string())?;
    let folder = Folder::open(&out).map_err(|e| e.to_string())?;
    Ok([Side::Train, Side::Validation].map(|side| folder.documents(side).unwrap().len()))
}

fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

#[test]
fn a_file_that_is_held_out_is_not_trained_on_and_one_named_twice_counts_once() {
    let [a, b, held] = ["a", "b", "held"].map(lines);
    let folder = folder_with(&[
        ("in/a.jsonl", &a),
        ("in/b.jsonl", &b),
        ("in/held.jsonl", &held),
    ]);
    let found = |inputs: &[&str], validation: &[&str]| prepared(folder.path(), inputs, validation);
    assert_eq!(found(&["in"], &["in/held.jsonl"]), Ok([20, 10]));
    assert_eq!(
        found(&["in", "in/a.jsonl", "in/../in/b.jsonl"], &[]),
        Ok([30, 0])
    );
    assert_eq!(
        found(&["in/a.jsonl"], &["in/held.jsonl", "in/held.jsonl"]),
        Ok([10, 10])
    );
}

#[test]
fn byte_order_marks_and_line_ends_of_windows_cost_no_document() {
    let text: Vec<String> = (0..10).map(|i| format!("document {i}")).collect();
    let files = [
        ("a.jsonl", format!("\u{feff}{}", lines("a"))),
        ("b.txt", format!("\u{feff}{}", text.join("\n\n\n"))),
        ("c.txt", text.join("\r\n\r\n\r\n")),
    ];
    for (name, content) in files {
        let folder = folder_with(&[(name, &content)]);
        assert_eq!(prepared(folder.path(), &[name], &[]), Ok([10, 0]), "{name}");
    }
    let wrong = format!("\u{feff}{}", lines("a").replace("text", "body"));
    let folder = folder_with(&[("a.jsonl", &wrong)]);
    let error = prepared(folder.path(), &["a.jsonl"], &[]).unwrap_err();
    assert!(error.contains("expected a column `text`"), "{error}");
}

#[test]
fn files_that_nothing_reads_are_refused_and_copies_of_systems_passed_over() {
    let a = lines("a");
    let folder = folder_with(&[
        ("in/a.jsonl", &a),
        ("in/._a.jsonl", "\0"),
        ("in/.ipynb_checkpoints/a-checkpoint.jsonl", &a),
        ("in/README.md", "about"),
    ]);
    assert_eq!(prepared(folder.path(), &["in"], &[]), Ok([10, 0]));
    for other in ["b.json", "b.jsonl.gz", "b.csv"] {
        let path = folder.path().join("in").join(other);
        fs::write(&path, "{}").unwrap();
        let error = prepared(folder.path(), &["in"], &[]).unwrap_err();
        assert!(
            error.contains(other) && error.contains("convert"),
            "{error}"
        );
        fs::remove_file(path).unwrap();
    }
}

#[test]
#[cfg(unix)]
fn folders_are_read_through_links_once() {
    let folder = folder_with(&[("in/a.jsonl", &lines("a")), ("other/b.jsonl", &lines("b"))]);
    let link = |to: &str, name: &str| {
        std::os::unix::fs::symlink(folder.path().join(to), folder.path().join("in").join(name))
    };
    link("other", "linked").unwrap();
    link("in", "back").unwrap();
    assert_eq!(prepared(folder.path(), &["in"], &[]), Ok([20, 0]));
}

#[cfg(feature = "text")]
#[test]
fn parquet_that_cannot_be_decompressed_is_refused_before_anything_is_written() {
    let folder = folder_with(&[]);
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gzip.parquet");
    fs::copy(fixture, folder.path().join("a.parquet")).unwrap();
    let error = prepared(folder.path(), &["a.parquet"], &[]).unwrap_err();
    assert!(error.contains("GZIP") && error.contains("zstd"), "{error}");
    assert!(!folder.path().join("out").exists());
}

#[test]
fn a_flag_for_the_data_wins_over_a_mix_in_the_configuration() {
    let folder = folder_with(&[("a.jsonl", &lines("a")), ("b.jsonl", &lines("b"))]);
    for name in ["a", "b"] {
        let mut command = program();
        command.current_dir(folder.path());
        succeed(command.args(["data", "prepare", &format!("{name}.jsonl"), "--out", name]));
    }
    let mix =
        "[data]\nmix = [{ source = \"a\", weight = 0.5 }, { source = \"b\", weight = 0.5 }]\n";
    fs::write(folder.path().join("c.toml"), mix).unwrap();
    let mut command = program();
    command.current_dir(folder.path());
    command.args([
        "train", "--config", "c.toml", "--data", "nowhere", "--steps", "1",
    ]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && text.contains("nowhere"),
        "{text}"
    );
}
