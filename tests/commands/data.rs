//! Tokens from files of documents: what `data prepare` writes, whatever befalls it, and what training
//! reads of it.
use crate::common::*;
use crate::tokens::*;
use routegrad::data::folder::{Folder, Side};
use routegrad::data::prepare::{self, Options};
use routegrad::data::tokenizer::TOKENIZER_FILE;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Inputs and a tokenizer in a temporary folder.
struct Inputs {
    folder: tempfile::TempDir,
    documents: Vec<(String, String)>,
}

impl Inputs {
    fn new(n: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let documents = documents(n);
        tokenizer(folder.path(), 0);
        parquet_of(&folder.path().join("in.parquet"), &documents, 40);
        Inputs { folder, documents }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn options(&self, input: &str, out: &str) -> Options {
        Options {
            tokenizer: Some(self.path(TOKENIZER_FILE)),
            validation_fraction: 0.1,
            shard_tokens: 2000,
            ..Options::new(&[self.path(input)], &self.path(out))
        }
    }

    /// The same by the program.
    fn prepare(&self, input: &str, out: &str) -> Command {
        let mut command = program();
        command.args(["data", "prepare"]).arg(self.path(input));
        command.arg("--tokenizer").arg(self.path(TOKENIZER_FILE));
        command.args(["--validation-fraction", "0.1", "--shard-tokens", "2000"]);
        command.arg("--out").arg(self.path(out));
        command
    }
}

fn prepare(options: &Options) -> Folder {
    prepare::run(options).unwrap();
    let folder = Folder::open(&options.out).unwrap();
    folder.verify().unwrap();
    folder
}

/// The text and the source of every document of a side, what stands around the text taken off.
fn read(folder: &Folder, side: Side) -> Vec<(String, String)> {
    let tokenizer = folder.tokenizer().unwrap();
    let manifest = folder.manifest();
    let documents = folder.documents(side).unwrap();
    documents
        .iter()
        .enumerate()
        .map(|(i, entry)| {
            let tokens = folder.document(side, i).unwrap();
            let (before, after) = (manifest.before.len(), manifest.after.len());
            let (text, end) = tokens.split_at(tokens.len() - after);
            assert_eq!(end, manifest.after);
            assert_eq!(text[..before], manifest.before);
            let text = tokenizer.decode(&text[before..]).unwrap();
            assert_eq!(text.len() as u64, entry.bytes);
            (text, manifest.sources[entry.source as usize].name.clone())
        })
        .collect()
}

#[test]
fn every_format_gives_the_same_tokens_and_decoding_gives_the_text_back() {
    let inputs = Inputs::new(200);
    let lines = json_lines(&inputs.documents);
    fs::write(inputs.path("in.jsonl"), &lines).unwrap();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let (first, second) = lines.split_at(lines.len() / 2);
    let frames = [first, second].map(|t| ruzstd::encoding::compress_to_vec(t.as_bytes(), level));
    fs::write(inputs.path("in.jsonl.zst"), frames.concat()).unwrap();
    let parquet = prepare(&inputs.options("in.parquet", "parquet"));
    let every = |side: usize| {
        let pick = |i: &usize| (4..200).step_by(10).any(|h| h == *i) == (side == 1);
        let chosen = (0..200).filter(pick);
        chosen
            .map(|i| inputs.documents[i].clone())
            .collect::<Vec<_>>()
    };
    for side in Side::BOTH {
        assert_eq!(read(&parquet, side), every(side as usize), "{side:?}");
    }
    // Several shards were made, of both sides.
    assert!(parquet.manifest().shards.len() > 8);
    for input in ["in.jsonl", "in.jsonl.zst"] {
        let out = input.replace('.', "-");
        prepare(&inputs.options(input, &out));
        assert!(
            files(&inputs.path(&out)) == files(&inputs.path("parquet")),
            "{input}"
        );
    }
    // Text files name no sources: each is one.
    fs::create_dir(inputs.path("texts")).unwrap();
    let texts: Vec<&str> = inputs.documents.iter().map(|d| d.0.as_str()).collect();
    fs::write(inputs.path("texts/a.txt"), texts[..90].join("\n\n\n")).unwrap();
    let rest = texts[90..].join("\n\n\n");
    let rest = ruzstd::encoding::compress_to_vec(rest.as_bytes(), level);
    fs::write(inputs.path("texts/b.txt.zst"), rest).unwrap();
    let folder = prepare(&inputs.options("texts", "texts-out"));
    let manifest = folder.manifest();
    let names: Vec<&str> = manifest.sources.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["a.txt", "b.txt.zst"]);
    for (name, content) in files(&inputs.path("parquet")) {
        if name.ends_with(".bin") {
            let path = inputs.path("texts-out").join(&name);
            assert!(fs::read(path).unwrap() == content, "{name}");
        }
    }
}

#[test]
fn a_large_vocabulary_takes_four_bytes_and_ends_can_be_chosen() {
    let inputs = Inputs::new(30);
    tokenizer(inputs.folder.path(), 70_000);
    let folder = prepare(&inputs.options("in.parquet", "both"));
    let manifest = folder.manifest();
    assert_eq!((manifest.token_bytes, manifest.vocab_size), (4, 70_264));
    assert_eq!(
        (&manifest.before[..], &manifest.after[..]),
        (&[70_262][..], &[70_263][..])
    );
    let options = Options {
        bos: Some("none".into()),
        eos: Some(BOS.into()),
        ..inputs.options("in.parquet", "chosen")
    };
    let folder = prepare(&options);
    assert!(folder.manifest().before.is_empty());
    assert_eq!(folder.manifest().after, [70_262]);
    assert_eq!(folder.tokenizer().unwrap().eos(), Some(70_262));
    assert_eq!(read(&folder, Side::Train).len(), 27);
    // The text held a special token's name in letters, and it stayed letters.
    let tokens = folder.document(Side::Train, 0).unwrap();
    assert!(!tokens.contains(&70_263));
}

#[test]
fn bytes_need_no_tokenizer_and_documents_can_be_held_out_from_a_file() {
    let inputs = Inputs::new(20);
    fs::write(inputs.path("held.jsonl"), json_lines(&documents(3))).unwrap();
    let options = Options {
        tokenizer: None,
        validation: vec![inputs.path("held.jsonl")],
        ..inputs.options("in.parquet", "out")
    };
    let folder = prepare(&options);
    let manifest = folder.manifest();
    assert_eq!((manifest.vocab_size, manifest.token_bytes), (256, 2));
    assert_eq!(manifest.after, [10, 10, 10]);
    assert_eq!(read(&folder, Side::Train), inputs.documents);
    assert_eq!(read(&folder, Side::Validation), documents(3));
}

#[test]
fn threads_change_no_byte() {
    let inputs = Inputs::new(300);
    for threads in ["1", "2", "5"] {
        succeed(
            inputs
                .prepare("in.parquet", threads)
                .args(["--threads", threads]),
        );
    }
    let one = files(&inputs.path("1"));
    assert!(one == files(&inputs.path("2")) && one == files(&inputs.path("5")));
}

#[test]
#[ignore = "slow"]
fn a_kill_at_any_point_costs_no_finished_shard_and_changes_no_byte() {
    let inputs = Inputs::new(30);
    succeed(&mut inputs.prepare("in.parquet", "whole"));
    let whole = files(&inputs.path("whole"));
    let mut kept = 0;
    for point in 1.. {
        let out = format!("killed-{point}");
        let mut command = inputs.prepare("in.parquet", &out);
        command.env("ROUTEGRAD_FAULT_POINT", point.to_string());
        if command.output().unwrap().status.code().is_some() {
            assert!(point > 20, "only {point} points were passed");
            break;
        }
        // What is there is not taken for the whole, unless it is.
        let place = inputs.path(&out);
        if let Ok(found) = Folder::open(&place) {
            found.verify().unwrap();
        }
        let ended = place.join("manifest.json").exists() && !place.join("unfinished.json").exists();
        if !ended {
            let (_, stderr) = succeed(&mut inputs.prepare("in.parquet", &out));
            kept += usize::from(stderr.contains("continuing after"));
        }
        let mut now = files(&place);
        // The lock of a killed preparation holds nobody off.
        now.retain(|(name, _)| name != ".lock");
        let names: Vec<&String> = now.iter().map(|f| &f.0).collect();
        assert!(now == whole, "{point}: {names:?}");
        fs::remove_dir_all(place).unwrap();
    }
    assert!(kept > 10, "only {kept} went on behind finished shards");
}

#[test]
fn a_full_disk_is_named_and_the_same_command_ends_it() {
    let inputs = Inputs::new(60);
    succeed(&mut inputs.prepare("in.parquet", "whole"));
    for write in [1, 2, 3, 4, 30, 60] {
        let out = format!("full-{write}");
        let mut command = inputs.prepare("in.parquet", &out);
        let line = fail(command.env("ROUTEGRAD_DISK_FULL", write.to_string()));
        assert!(line.contains("free some space"), "{write}: {line}");
        let left = files(&inputs.path(&out));
        let unfinished = |f: &&(String, Vec<u8>)| f.0.starts_with(".unfinished-");
        assert_eq!(left.iter().filter(unfinished).count(), 0);
        succeed(&mut inputs.prepare("in.parquet", &out));
        assert!(
            files(&inputs.path(&out)) == files(&inputs.path("whole")),
            "{write}"
        );
    }
}

#[test]
fn another_preparation_does_not_go_on_with_the_first() {
    let inputs = Inputs::new(60);
    let mut command = inputs.prepare("in.parquet", "out");
    command.env("ROUTEGRAD_FAULT_POINT", "15").output().unwrap();
    let line = fail(inputs.prepare("in.parquet", "out").args(["--eos", "none"]));
    assert!(line.contains("other after"), "{line}");
    // Nor is what it left taken for tokens.
    let mut train = program();
    train.args(["train", "--out"]).arg(inputs.path("run"));
    let line = fail(train.arg("--data").arg(inputs.path("out")));
    assert!(line.contains("preparation has not finished"), "{line}");
    succeed(&mut inputs.prepare("in.parquet", "out"));
    let line = fail(&mut inputs.prepare("in.parquet", "out"));
    assert!(line.contains("a finished folder of tokens"), "{line}");
}

#[test]
fn bad_documents_are_told_and_left_out_and_strict_refuses_them() {
    let inputs = Inputs::new(3);
    let good = json_lines(&inputs.documents);
    let bad = b"{\"text\": \"cut\n{\"text\": 3}\n\n{\"other\": 1}\n{\"text\": null}\n{\"text\": \" \"}\n\xff\n";
    fs::write(inputs.path("in.jsonl"), [good.as_bytes(), bad].concat()).unwrap();
    let (stdout, stderr) = succeed(&mut inputs.prepare("in.jsonl", "out"));
    assert!(
        stdout.contains("3 documents without text, 4 that could not be read"),
        "{stdout}"
    );
    for part in [
        "document 4 of in.jsonl",
        "`text` is not a string: 3",
        "no field `text`",
    ] {
        assert!(stderr.contains(part), "no `{part}` in {stderr}");
    }
    let line = fail(inputs.prepare("in.jsonl", "strict").arg("--strict"));
    assert!(
        line.contains("document 4") && line.contains("--strict"),
        "{line}"
    );

    let rows = [
        (Some("one"), "a"),
        (None, "a"),
        (Some(""), "a"),
        (Some("two"), "b"),
    ];
    parquet(&inputs.path("nulls.parquet"), &rows, 2);
    let options = Options {
        validation_fraction: 0.0,
        ..inputs.options("nulls.parquet", "nulls")
    };
    let folder = prepare(&options);
    let of = |text: &str, source: &str| (text.to_string(), source.to_string());
    assert_eq!(read(&folder, Side::Train), [of("one", "a"), of("two", "b")]);
    assert_eq!(folder.manifest().empty, 2);
}

/// Overwrites the middle of the n-th row group's data.
fn damage_group(path: &Path, share: f64) {
    let mut bytes = fs::read(path).unwrap();
    let at = (bytes.len() as f64 * share) as usize;
    bytes[at..at + 200].fill(0xa5);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_row_group_is_left_out_the_others_are_read_and_it_is_no_success() {
    let inputs = Inputs::new(200);
    damage_group(&inputs.path("in.parquet"), 0.3);
    let output = inputs.prepare("in.parquet", "out").output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|o| String::from_utf8(o).unwrap());
    assert!(!output.status.success(), "{stderr}");
    assert!(stderr.contains("the rest of row group"), "{stderr}");
    assert!(
        stderr.contains("in.parquet, of which the rest was left out"),
        "{stderr}"
    );
    let folder = Folder::open(&inputs.path("out")).unwrap();
    let found = Side::BOTH.map(|side| read(&folder, side)).concat();
    assert!((120..200).contains(&found.len()), "{stdout}");
    assert!(found.iter().all(|d| inputs.documents.contains(d)));
    assert_eq!(found.len() as u64 + folder.manifest().unreadable, 200);
    let line = fail(inputs.prepare("in.parquet", "strict").arg("--strict"));
    assert!(line.contains("row group"), "{line}");
}

#[test]
fn unusable_inputs_are_named_before_anything_is_written() {
    let inputs = Inputs::new(20);
    let whole = fs::read(inputs.path("in.parquet")).unwrap();
    fs::write(inputs.path("cut.parquet"), &whole[..whole.len() - 100]).unwrap();
    fs::write(inputs.path("in.jsonl"), "{\"content\": \"a\", \"id\": 1}\n").unwrap();
    fs::write(inputs.path("in.csv"), "text").unwrap();
    fs::create_dir(inputs.path("empty")).unwrap();
    for (input, arguments, parts) in [
        (
            "cut.parquet",
            &[][..],
            &["cut.parquet", "a complete parquet file"][..],
        ),
        (
            "in.parquet",
            &["--text-column", "txt"],
            &["a column `txt`", "as `text`"],
        ),
        (
            "in.parquet",
            &["--text-column", "token_count"],
            &["of strings"],
        ),
        (
            "in.parquet",
            &["--source-column", "source"],
            &["a column `source`", "token_count"],
        ),
        ("in.jsonl", &[], &["a column `text`", "content, id"]),
        ("in.csv", &[], &[".jsonl", ".zst"]),
        ("empty", &[], &["a folder with files that end in"]),
        ("none.txt", &[], &["check the path"]),
        ("in.parquet", &["--eos", "</s>"], &["--eos", "`</s>`"]),
    ] {
        let line = fail(inputs.prepare(input, "out").args(arguments));
        for part in parts {
            assert!(line.contains(part), "no `{part}` in: {line}");
        }
        assert!(!inputs.path("out").exists(), "{input}");
    }
    let all = Options {
        validation_fraction: 1.0,
        ..inputs.options("in.parquet", "out")
    };
    let e = prepare::run(&all).unwrap_err().to_string();
    assert!(e.contains("below 1"), "{e}");
    fs::write(inputs.path(TOKENIZER_FILE), "{\"model\": 1}").unwrap();
    let line = fail(&mut inputs.prepare("in.parquet", "out"));
    assert!(line.contains("expected a tokenizer"), "{line}");
}

/// `train` of the micro model on prepared tokens.
fn train(data: &[&str], out: &Path, arguments: &[&str]) -> Command {
    let mut command = program();
    command.args(["train", "--out"]).arg(out).args(data);
    for set in MICRO {
        command.args(["--set", set]);
    }
    command.args(arguments);
    command
}

#[test]
fn a_run_on_tokens_stops_resumes_speaks_and_exports_with_its_tokenizer() {
    let inputs = Inputs::new(200);
    let folder = prepare(&inputs.options("in.parquet", "tokens"));
    let tokens = inputs.path("tokens").display().to_string();
    let data = ["--data", tokens.as_str()];
    let (whole, cut) = (inputs.path("whole"), inputs.path("cut"));
    let (_, stderr) = succeed(&mut train(&data, &whole, &["--steps", "120"]));
    assert!(stderr.contains("180 documents"), "{stderr}");
    let config = fs::read_to_string(whole.join("config.toml")).unwrap();
    assert!(config.contains("vocab_size = 264"), "{config}");
    assert!(config.contains(&folder.manifest().tokenizer));

    let mut child = train(&data, &cut, &["--steps", "120"]).spawn().unwrap();
    assert!(wait_for_step(&mut child, &cut, 33));
    child.kill().unwrap();
    child.wait().unwrap();
    let resume = |arguments: &[&str]| {
        let mut command = program();
        command.args(["train", "--resume", "--out"]).arg(&cut);
        command.args(arguments);
        command
    };
    succeed(&mut resume(&[]));
    assert_same_end(&whole, &cut, 120);

    // Validation is told by source, weighted by tokens it makes the whole.
    let last = metrics(&whole).pop().unwrap();
    let by_source = last["validation_by_source"].as_object().unwrap();
    assert_eq!(by_source.keys().collect::<Vec<_>>(), ["s0", "s1", "s2"]);

    let mut eval = program();
    let (stdout, _) = succeed(eval.args(["eval", "--model"]).arg(&whole));
    let number = |name: &str| -> f64 {
        let line = stdout.lines().find(|l| l.starts_with(name)).unwrap();
        let mut words = line[name.len()..].split_whitespace();
        words.next().unwrap().parse().unwrap()
    };
    // All validation tokens but the last few are predicted, and their bytes counted.
    let counts = folder.manifest().counts(Side::Validation);
    let bytes_per_token = counts.bytes as f64 / counts.tokens as f64;
    let expected = number("validation loss") / bytes_per_token / std::f64::consts::LN_2;
    let found = number("bits per byte");
    assert!(
        (found / expected - 1.0).abs() < 0.02,
        "{found} is not {expected}"
    );
    assert!(stdout.contains("s1: "), "{stdout}");

    // The tokens are gone: the run has its tokenizer.
    let moved = inputs.path("moved");
    fs::rename(inputs.path("tokens"), &moved).unwrap();
    let mut generate = program();
    generate.args([
        "generate",
        "--tokens",
        "30",
        "--prompt",
        "Document 1 word2 word3",
        "--model",
    ]);
    let (stdout, _) = succeed(generate.arg(&whole));
    assert!(stdout.starts_with("Document 1 word2 word3"), "{stdout}");
    let mut export = program();
    export.args(["export", "--to", "hf", "--model"]).arg(&whole);
    let (stdout, _) = succeed(export.arg("--out").arg(inputs.path("hf")));
    assert!(stdout.contains("the run's own"), "{stdout}");
    let same = |name: &str| {
        fs::read(inputs.path("hf").join(name)).unwrap() == fs::read(moved.join(name)).unwrap()
    };
    assert!(same("tokenizer.json") && same("tokenizer_config.json"));

    // Another tokenizer in its place is noticed.
    tokenizer(&whole, 1);
    let mut generate = program();
    let line = fail(generate.args(["generate", "--model"]).arg(&whole));
    assert!(
        line.contains("expected the tokenizer of fingerprint"),
        "{line}"
    );
}

#[test]
fn a_step_reads_the_same_tokens_however_it_is_divided_from_a_mix_too() {
    use routegrad::config::Layers;
    use routegrad::data::{Corpus, configure};
    let inputs = Inputs::new(200);
    fs::write(inputs.path("b.jsonl"), json_lines(&documents(50))).unwrap();
    prepare(&inputs.options("in.parquet", "a"));
    prepare(&inputs.options("b.jsonl", "b"));
    let (a, b) = (inputs.path("a"), inputs.path("b"));
    let mix = format!(
        "data.mix=[{{source={:?}, weight=3}}, {{source={:?}, weight=1}}]",
        a.display().to_string(),
        b.display().to_string()
    );
    let load = |set: &str| {
        let mut layers = Layers::preset("tiny");
        let sets = ["model.sequence_length=16", "model.vocab_size=264", set];
        layers.set = sets.map(str::to_string).to_vec();
        let config = configure(&layers, &|_| Ok(())).unwrap();
        Corpus::load(&config.data, &config.model, 5).unwrap()
    };
    for corpus in [
        load(&format!("data.source={:?}", a.display().to_string())),
        load(&mix),
    ] {
        let whole = corpus.sequences(4090..4110).tokens;
        let parts: Vec<i32> = [4090..4093, 4093..4100, 4100..4110]
            .into_iter()
            .flat_map(|r| corpus.sequences(r).tokens)
            .collect();
        assert_eq!(whole.len(), 20 * 17);
        assert_eq!(whole, parts);
        let n = corpus.evaluation(0).sequences;
        let windows = corpus.held_out(0);
        assert_eq!(windows.len(), n);
        for window in windows {
            let tokens: u64 = corpus.shares(window).iter().map(|s| s.tokens).sum();
            assert_eq!(tokens, 16);
        }
    }
    // A run on the mix, killed and resumed, ends in the same bytes.
    let (whole, cut) = (inputs.path("whole"), inputs.path("cut"));
    let data = ["--set", mix.as_str()];
    succeed(&mut train(&data, &whole, &["--steps", "60"]));
    let mut child = train(&data, &cut, &["--steps", "60"]).spawn().unwrap();
    wait_for_step(&mut child, &cut, 25);
    let _ = child.kill();
    child.wait().unwrap();
    let mut resume = program();
    succeed(resume.args(["train", "--resume", "--out"]).arg(&cut));
    assert_same_end(&whole, &cut, 60);
}

#[test]
fn tokens_that_do_not_fit_the_run_are_refused() {
    let inputs = Inputs::new(200);
    prepare(&inputs.options("in.parquet", "a"));
    let options = Options {
        tokenizer: None,
        ..inputs.options("in.parquet", "bytes")
    };
    prepare(&options);
    let path = |name: &str| inputs.path(name).display().to_string();
    let (a, bytes, out) = (path("a"), path("bytes"), inputs.path("run"));
    let refused = |data: &[&str], part: &str| {
        let line = fail(&mut train(data, &out, &[]));
        assert!(line.contains(part), "no `{part}` in: {line}");
        assert!(!out.exists());
    };
    refused(
        &["--data", &a, "--set", "model.vocab_size=256"],
        "at least 264",
    );
    let mix =
        |b: &str| format!("data.mix=[{{source={a:?}, weight=1}}, {{source={b:?}, weight=1}}]");
    refused(&["--set", &mix(&bytes)], "tokenizer bytes");
    refused(
        &["--set", &mix(&path("in.parquet"))],
        "a folder of tokens in data.mix",
    );
    refused(
        &["--set", "data.mix=[{source=\"a\", weight=-1}]"],
        "above 0",
    );
    // A run of bytes is not evaluated on tokens.
    let on_bytes = ["--data", &bytes, "--steps", "10"];
    succeed(&mut train(&on_bytes, &out, &[]));
    let mut eval = program();
    let line = fail(eval.args(["eval", "--data", &a, "--model"]).arg(&out));
    assert!(
        line.contains("vocab") || line.contains("tokenizer"),
        "{line}"
    );
    // A shard that was changed after its manifest.
    let shard = inputs.path("a/train-00001.bin");
    let mut content = fs::read(&shard).unwrap();
    content[100] ^= 1;
    fs::write(&shard, &content).unwrap();
    let other = inputs.path("other");
    let line = fail(&mut train(&["--data", &a], &other, &[]));
    assert!(
        line.contains("train-00001.bin") && line.contains("digest"),
        "{line}"
    );
    fs::write(&shard, &content[..100]).unwrap();
    let line = fail(&mut train(&["--data", &a], &other, &[]));
    assert!(
        line.contains("train-00001.bin") && line.contains("bytes"),
        "{line}"
    );
}

#[test]
fn a_side_too_short_for_a_sequence_is_told_with_numbers_and_what_to_do() {
    let inputs = Inputs::new(200);
    let prepare = |out: &str, share: &str| {
        let mut command = program();
        command.args(["data", "prepare", "--validation-fraction", share]);
        command.arg("--tokenizer").arg(inputs.path(TOKENIZER_FILE));
        command.arg(inputs.path("in.parquet"));
        command.arg("--out").arg(inputs.path(out));
        succeed(&mut command).1
    };
    // Some 1,000 tokens: enough for tiny, too few for 557m.
    let told = prepare("some", "0.03");
    let folder = Folder::open(&inputs.path("some")).unwrap();
    let tokens = folder.manifest().counts(Side::Validation).tokens;
    assert!((257..=2048).contains(&tokens), "{tokens}");
    let warning = format!("warning: the held-out part has {tokens} tokens");
    assert!(told.contains(&warning), "{told}");
    assert!(
        told.contains("presets 557m 2048, 1.96b 2048, 7.33b 2048;"),
        "{told}"
    );
    assert!(told.contains("--validation-fraction"), "{told}");
    let least = format!("--sequence-length {} or less", tokens - 1);
    assert!(
        told.contains(&least) && !told.contains("training part"),
        "{told}"
    );
    // The advice holds to the token.
    let train = |length: u64| {
        let mut command = program();
        command.args(["train", "--no-checkpoint", "--quiet", "--steps", "1"]);
        command.args([
            "--set",
            "model.hidden=16",
            "--set",
            "model.heads=1",
            "--set",
            "model.layers=2",
        ]);
        command.args(["--batch", "1", "--set", "train.eval_sequences=1"]);
        command.args(["--sequence-length", &length.to_string()]);
        command.arg("--data").arg(inputs.path("some"));
        command.arg("--out").arg(inputs.path(&length.to_string()));
        command
    };
    let (said, _) = succeed(&mut train(tokens - 1));
    assert!(said.contains("nats per token"), "{said}");
    assert!(fail(&mut train(tokens)).contains("validation text of more than"));
    // Nothing held out, and little to train on.
    let told = prepare("none", "0");
    assert!(told.contains("the held-out part has 0 tokens"), "{told}");
    assert!(!told.contains("--sequence-length"), "{told}");
    // Enough on both sides: no word.
    let told = prepare("half", "0.5");
    assert!(!told.contains("warning"), "{told}");
}
