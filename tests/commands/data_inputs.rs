//! Which files `data prepare` reads, and what it says of those that it does not.

use crate::common::*;
use routegrad::data::folder::{Folder, Side};
use routegrad::data::prepare::{self, Options};
use std::fs;
use std::io::Write;
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
    for other in ["b.arrow", "b.jsonl.bz2", "b.csv"] {
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
fn tokens_of_a_preparation_are_not_read_as_documents() {
    let a = lines("a");
    let folder = folder_with(&[("in/a.jsonl", &a), ("other/manifest.json", &a)]);
    let options = Options {
        quiet: true,
        ..Options::new(
            &[folder.path().join("in")],
            &folder.path().join("in/tokens"),
        )
    };
    prepare::run(&options).unwrap();
    for input in ["in", "in/tokens"] {
        let error = prepared(folder.path(), &[input], &[]).unwrap_err();
        assert!(
            error.contains("in/tokens/manifest.json: ") && error.contains("--out"),
            "{error}"
        );
    }
    // Another program's file may have that name.
    assert_eq!(prepared(folder.path(), &["other"], &[]), Ok([10, 0]));
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

#[test]
fn compressed_files_are_read_as_their_names_say_and_one_that_is_cut_off_is_no_success() {
    let a = lines("a");
    let gzip = |text: &str| {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        writer.write_all(text.as_bytes()).unwrap();
        writer.finish().unwrap()
    };
    let folder = folder_with(&[("plain.jsonl", &a)]);
    let write = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).unwrap();
    // Two members in one file are one text.
    let (first, second) = a.split_at(a.len() / 2);
    write("a.jsonl.gz", &[gzip(first), gzip(second)].concat());
    write("b.json", a.as_bytes());
    write("b.json.gz", &gzip(&a));
    write("c.txt.gz", &gzip(&a.replace('\n', "\n\n\n")));
    for name in ["a.jsonl.gz", "b.json", "b.json.gz", "c.txt.gz"] {
        assert_eq!(prepared(folder.path(), &[name], &[]), Ok([10, 0]), "{name}");
    }
    let whole = gzip(&a);
    write("cut.jsonl.gz", &whole[..whole.len() - 9]);
    let mut command = program();
    command.current_dir(folder.path());
    let line = fail(command.args([
        "data",
        "prepare",
        "cut.jsonl.gz",
        "plain.jsonl",
        "--out",
        "cut",
    ]));
    assert!(
        line.contains("cut.jsonl.gz") && line.contains("of which the rest was left out"),
        "{line}"
    );
    write("list.json", b"[{\"text\": \"a\"}]");
    let error = prepared(folder.path(), &["list.json"], &[]).unwrap_err();
    assert!(
        error.contains("list.json") && error.contains("an object on each line"),
        "{error}"
    );
}

#[cfg(feature = "text")]
#[test]
fn parquet_is_read_whatever_its_codec_and_one_without_a_reader_is_refused_before_anything_is_written()
 {
    let folder = folder_with(&[]);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gzip.parquet");
    let gzip = fs::read(path).unwrap();
    let write = |content: &[u8]| fs::write(folder.path().join("a.parquet"), content).unwrap();
    write(&gzip);
    assert_eq!(prepared(folder.path(), &["a.parquet"], &[]), Ok([2, 0]));
    // The codec behind the column's name: 2 for gzip, 3 for LZO, as signed numbers are stored.
    let column = gzip.windows(6).position(|b| b == b"text\x15\x04").unwrap();
    let mut lzo = gzip.clone();
    lzo[column + 5] = 6;
    write(&lzo);
    let error = prepared(folder.path(), &["a.parquet"], &[]).unwrap_err();
    assert!(error.contains("LZO") && error.contains("zstd"), "{error}");
    assert!(!folder.path().join("out").exists());
    let text = || vec![(Some("some text"), "source"); 10];
    for codec in [
        parquet::basic::Compression::BROTLI(Default::default()),
        parquet::basic::Compression::LZ4_RAW,
        parquet::basic::Compression::LZ4,
    ] {
        crate::tokens::parquet_with(codec, &folder.path().join("a.parquet"), &text(), 4);
        assert_eq!(
            prepared(folder.path(), &["a.parquet"], &[]),
            Ok([10, 0]),
            "{codec}"
        );
    }
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

#[test]
fn a_run_is_evaluated_on_its_own_text_from_any_folder_and_never_on_another_without_being_told() {
    let place = Place::new();
    let mut train = program();
    train.current_dir(place.folder.path());
    train.args([
        "train", "--data", "text.txt", "--out", "runs/a", "--steps", "2",
    ]);
    for set in MICRO {
        train.args(["--set", set]);
    }
    succeed(&mut train);
    let (run, elsewhere) = (place.path("runs/a"), tempfile::tempdir().unwrap());
    let in_folder = |folder: &Path, arguments: &[&str]| {
        let mut command = program();
        command
            .current_dir(folder)
            .args(arguments)
            .arg("--model")
            .arg(&run);
        command
    };
    let (here, _) = succeed(&mut in_folder(place.folder.path(), &["eval"]));
    let (there, _) = succeed(&mut in_folder(elsewhere.path(), &["eval"]));
    let losses = [here, there].map(|text| {
        text.lines()
            .find(|l| l.contains("loss"))
            .unwrap()
            .to_string()
    });
    assert_eq!(losses[0], losses[1]);
    fs::write(&place.text, lines("another text").repeat(20)).unwrap();
    for command in ["eval", "analyze"] {
        let line = fail(&mut in_folder(elsewhere.path(), &[command]));
        assert!(
            line.contains("text.txt") && line.contains("digest") && line.contains("--data"),
            "{line}"
        );
    }
    succeed(
        in_folder(elsewhere.path(), &["eval"])
            .arg("--data")
            .arg(&place.text),
    );
}
