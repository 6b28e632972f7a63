//! Files with random damage: of ours every one is noticed, those of others give an error or something
//! that can be read; nothing panics, hangs or reads out of bounds.
//!
//! `ROUTEGRAD_CORRUPTIONS=10000 cargo test --release --features text --test data_corruption` makes so
//! many in all.
use crate::tokens::*;
use routegrad::config::Layers;
use routegrad::data::folder::{Folder, Side};
use routegrad::data::prepare::{self, Options};
use routegrad::data::tokenizer::TOKENIZER_FILE;
use routegrad::data::{Corpus, Tokenizer, adopt_tokenizer, configure};
use routegrad::tensor::random::{Purpose, Stream};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Corruptions in all, over the kinds of files.
fn budget() -> u64 {
    let given = std::env::var("ROUTEGRAD_CORRUPTIONS").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(400)
}

/// Longest that one damaged file may take.
const LONGEST: Duration = Duration::from_secs(20);

/// Number `n` of the damages of a file: bits flipped, bytes overwritten, cut off, doubled or inserted.
fn damage(content: &[u8], kind: u64, n: u64) -> Vec<u8> {
    let stream = Stream::new(kind, Purpose::Check, n, 0);
    let draw = |i: u64, below: usize| (f64::from(stream.uniform(i)) * below as f64) as usize;
    let mut bytes = content.to_vec();
    let at = draw(1, bytes.len());
    match draw(0, 6) {
        0 | 1 => bytes[at] ^= 1 << draw(2, 8),
        2 => bytes.truncate(at),
        3 => {
            let end = bytes.len().min(at + 1 + draw(2, 40));
            let with = [0, 0xff, 0x80, b'"'][draw(3, 4)];
            bytes[at..end].fill(with);
        }
        4 => drop(bytes.splice(at..at, content[..draw(2, content.len().min(64))].to_vec())),
        _ => {
            for i in 0..1 + draw(2, 8) as u64 {
                let at = draw(10 + i, bytes.len());
                bytes[at] = draw(30 + i, 256) as u8;
            }
        }
    }
    if bytes == content {
        bytes.push(0);
    }
    bytes
}

/// Runs `read` on each damaged copy of the file at `path`; the file is whole again afterwards.
fn for_each_damage(path: &Path, kind: u64, count: u64, mut read: impl FnMut(u64)) {
    let content = fs::read(path).unwrap();
    for n in 0..count {
        fs::write(path, damage(&content, kind, n)).unwrap();
        let begun = Instant::now();
        read(n);
        let name = path.file_name().unwrap();
        assert!(
            begun.elapsed() < LONGEST,
            "{name:?}: damage {n} took {:?}",
            begun.elapsed()
        );
    }
    fs::write(path, content).unwrap();
}

fn inputs() -> (tempfile::TempDir, impl Fn(&str) -> PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    tokenizer(folder.path(), 0);
    parquet_of(&folder.path().join("in.parquet"), &documents(60), 20);
    fs::write(folder.path().join("in.jsonl"), json_lines(&documents(30))).unwrap();
    let root = folder.path().to_path_buf();
    (folder, move |name: &str| root.join(name))
}

#[test]
fn every_damage_of_a_folder_of_tokens_is_noticed() {
    let (_folder, path) = inputs();
    let options = Options {
        tokenizer: Some(path(TOKENIZER_FILE)),
        validation_fraction: 0.2,
        shard_tokens: 3000,
        ..Options::new(&[path("in.parquet")], &path("tokens"))
    };
    prepare::run(&options).unwrap();
    let mut layers = Layers::preset("tiny");
    let sets = ["model.sequence_length=16", "model.vocab_size=264"];
    layers.set = sets.map(str::to_string).to_vec();
    let mut config = configure(&layers, &|_| Ok(())).unwrap();
    config
        .data
        .set_source(&path("tokens").display().to_string());
    adopt_tokenizer(&mut config.data).unwrap();
    Corpus::load(&config.data, &config.model, 0).unwrap();
    let names = [
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.bin",
        "train-00001.idx",
        "validation-00000.bin",
        "validation-00000.idx",
    ];
    let each = budget() / 2 / names.len() as u64;
    for (kind, name) in names.iter().enumerate() {
        for_each_damage(&path("tokens").join(name), kind as u64, each, |n| {
            let verified = Folder::open(&path("tokens")).and_then(|f| f.verify());
            assert!(verified.is_err(), "{name}: verifying misses damage {n}");
            let loaded = Corpus::load(&config.data, &config.model, 0);
            assert!(loaded.is_err(), "{name}: training misses damage {n}");
        });
    }
    let whole = Folder::open(&path("tokens")).unwrap();
    whole.verify().unwrap();
    // Without the digests of shards, what opens is still read within its bounds.
    let each = each / 4;
    for (kind, name) in ["train-00000.bin", "train-00001.idx"].iter().enumerate() {
        for_each_damage(&path("tokens").join(name), 100 + kind as u64, each, |_| {
            if let Ok(folder) = Folder::open(&path("tokens")) {
                let read = folder.document(Side::Train, 0);
                let tokenizer = folder.tokenizer().unwrap();
                let _ = read.and_then(|tokens| tokenizer.decode(&tokens));
            }
        });
    }
}

#[test]
#[ignore = "slow"]
fn damaged_inputs_give_an_error_or_a_folder_that_is_whole() {
    let (_folder, path) = inputs();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let lines = fs::read(path("in.jsonl")).unwrap();
    let packed = ruzstd::encoding::compress_to_vec(lines.as_slice(), level);
    fs::write(path("in.jsonl.zst"), packed).unwrap();
    let texts: Vec<String> = documents(30).into_iter().map(|d| d.0).collect();
    fs::write(path("in.txt"), texts.join("\n\n\n")).unwrap();
    let names = [
        "in.parquet",
        "in.parquet",
        "in.jsonl",
        "in.jsonl.zst",
        "in.txt",
    ];
    let each = budget() * 3 / 8 / names.len() as u64;
    let mut outcomes = [0; 2];
    for (kind, name) in names.iter().enumerate() {
        let options = Options {
            shard_tokens: 3000,
            strict: kind == 1,
            ..Options::new(&[path(name)], &path("out"))
        };
        for_each_damage(&path(name), 20 + kind as u64, each, |_| {
            let result = prepare::run(&options);
            outcomes[usize::from(result.is_ok())] += 1;
            if result.is_ok() {
                let folder = Folder::open(&path("out")).unwrap();
                folder.verify().unwrap();
                folder.document(Side::Train, 0).unwrap();
            }
            if path("out").exists() {
                fs::remove_dir_all(path("out")).unwrap();
            }
        });
    }
    assert!(outcomes.iter().all(|n| *n > each / 2), "{outcomes:?}");
}

#[test]
fn a_damaged_tokenizer_gives_an_error_or_encodes() {
    let (_folder, path) = inputs();
    let text = &documents(1)[0].0;
    let mut outcomes = [0; 2];
    for_each_damage(&path(TOKENIZER_FILE), 40, budget() / 8, |_| {
        let opened = Tokenizer::open(&path(TOKENIZER_FILE));
        outcomes[usize::from(opened.is_ok())] += 1;
        if let Ok(found) = opened
            && let Ok(tokens) = found.encode(text)
        {
            let size = found.vocab_size();
            assert!(tokens.iter().all(|t| (*t as usize) < size));
            let _ = found.decode(&tokens);
        }
    });
    assert!(outcomes.iter().all(|n| *n > 0), "{outcomes:?}");
}
