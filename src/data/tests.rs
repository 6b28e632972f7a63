//! Tests of the corpus.

use super::*;
use crate::config::Config;
use std::fs;
use std::path::Path;

fn load(config: &Config) -> Result<Corpus> {
    Corpus::load(&config.data, &config.model, config.train.seed)
}

fn from(source: &Path, set: &[&str]) -> Result<Corpus> {
    let mut config = Config::tiny(set);
    config.data.source = source.display().to_string();
    load(&config)
}

/// The corpus of one file with this text.
fn of_text(text: &str, set: &[&str]) -> Corpus {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    fs::write(&path, text).unwrap();
    from(&path, set).unwrap()
}

fn documents(corpus: &Corpus) -> [u64; 2] {
    corpus.counts().map(|c| c.documents)
}

fn bytes(tokens: &[i32]) -> Vec<u8> {
    tokens.iter().map(|t| *t as u8).collect()
}

/// The training and the validation text.
fn texts(corpus: &Corpus) -> [Vec<u8>; 2] {
    let part = &corpus.parts[0];
    [&part.train, &part.validation].map(|side| {
        let mut tokens = Vec::new();
        side.tokens.copy(0..side.len(), &mut tokens);
        bytes(&tokens)
    })
}

/// Returns `n` documents of `length` letters each; all letters of a document are the same, and each document has the next
/// letter.
fn letters(n: usize, length: usize) -> String {
    let docs: Vec<String> = (0..n)
        .map(|i| char::from(b'a' + i as u8).to_string().repeat(length))
        .collect();
    docs.join(DOCUMENT_END)
}

#[test]
fn the_embedded_corpus_is_complete_and_split_by_documents() {
    let corpus = load(&Config::tiny(&[])).unwrap();
    assert_eq!(documents(&corpus), [221, 12]);
    let [train, validation] = corpus.counts().map(|c| c.bytes as usize);
    // The separator between the two sides is not part of either.
    assert_eq!(train + validation + DOCUMENT_END.len(), 10_761_854);
    let share = validation as f64 / (train + validation) as f64;
    assert!((share - 0.05).abs() < 0.01, "{share}");
}

#[test]
fn no_document_is_on_both_sides() {
    let corpus = of_text(&letters(20, 300), &["data.validation_fraction=0.2"]);
    assert_eq!(documents(&corpus), [16, 4]);
    let inside = |side: &[u8]| -> Vec<u8> {
        let mut found: Vec<u8> = side.iter().copied().filter(|b| *b != b'\n').collect();
        found.dedup();
        found
    };
    assert_eq!(inside(&texts(&corpus)[1]), b"chmr");
    assert_eq!(inside(&texts(&corpus)[0]), b"abdefgijklnopqst");
}

#[test]
fn a_step_reads_the_same_sequences_for_any_division() {
    let corpus = load(&Config::tiny(&[])).unwrap();
    let whole = corpus.sequences(32..48).tokens;
    let parts: Vec<i32> = [32..36, 36..40, 40..47, 47..48]
        .into_iter()
        .flat_map(|r| corpus.sequences(r).tokens)
        .collect();
    assert_eq!(whole.len(), 16 * 257);
    assert_eq!(whole, parts);
    let mut other = Config::tiny(&[]);
    other.train.seed = 1;
    assert_ne!(load(&other).unwrap().sequences(32..48).tokens, whole);
}

#[test]
fn an_epoch_predicts_almost_every_training_byte_once() {
    let text: String = (0..5000u32).map(|i| format!("{i:05}\n")).collect();
    let text = text[..15_000].to_string() + DOCUMENT_END + &text[15_000..];
    let corpus = of_text(&text, &["model.sequence_length=64"]);
    let n = (texts(&corpus)[0].len() - 64) / 64;
    let tokens = corpus.sequences(0..n as u64).tokens;
    let mut targets: Vec<&[i32]> = tokens.chunks(65).map(|w| &w[1..]).collect();
    targets.sort_unstable();
    targets.dedup();
    assert_eq!(targets.len(), n, "a window came twice");
}

#[test]
fn evaluation_windows_cover_the_validation_text() {
    let corpus = load(&Config::tiny(&[])).unwrap();
    let all = corpus.evaluation(0);
    let n = all.sequences;
    assert_eq!(all.tokens.len(), n * 257);
    let targets: Vec<u8> = (all.tokens.chunks(257))
        .flat_map(|w| bytes(&w[1..]))
        .collect();
    let validation = &texts(&corpus)[1];
    assert_eq!(targets, validation[1..=n * 256]);
    assert!(validation.len() - 1 - n * 256 < 256);
    let some = corpus.evaluation(10);
    assert_eq!((some.tokens.len(), some.sequences), (10 * 257, 10));
    assert_eq!(corpus.evaluation(10), some);
}

#[test]
fn the_end_of_a_single_document_is_held_out_without_cutting_a_character() {
    let text = "one line\n\né of another\n\n".repeat(400);
    let corpus = of_text(&text, &["data.validation_fraction=0.0501"]);
    assert!(corpus.is_one_document());
    assert!(!load(&Config::tiny(&[])).unwrap().is_one_document());
    let [train, validation] = texts(&corpus).map(|side| String::from_utf8(side).unwrap());
    assert_eq!(train.clone() + &validation, text);
    let share = validation.len() as f64 / text.len() as f64;
    assert!((share - 0.0501).abs() < 1e-3, "{share}");
}

#[test]
fn the_validation_windows_predict_every_token_but_the_first_once() {
    // 105 validation tokens in windows of 10: ten windows, and one for the last four tokens that begins earlier.
    let set = ["model.sequence_length=10", "data.validation_fraction=0.05"];
    let corpus = of_text(&"abcdefg".repeat(300), &set);
    let count = |most: usize| -> u64 {
        let windows = corpus.validation(most).into_iter();
        let shares = windows.flat_map(|w| corpus.shares(w));
        shares.map(|s| s.tokens).sum()
    };
    assert_eq!(corpus.counts()[1].tokens, 105);
    assert_eq!([0, 11, 10, 3].map(count), [104, 104, 100, 30]);
    let last = corpus.validation(0).pop().unwrap();
    assert_eq!(last.repeated(), 6);
    let [_, text] = texts(&corpus);
    assert_eq!(bytes(&corpus.read(&[last]).tokens), text[94..]);
}

#[test]
fn the_shortest_text_has_one_window() {
    let corpus = of_text(&letters(2, 2), &["model.sequence_length=1"]);
    assert_eq!(corpus.sequences(0..2).tokens, [97, 97, 97, 97]);
    assert_eq!(corpus.evaluation(0).tokens, [98, 98]);
}

#[test]
fn folders_are_read_in_the_order_of_their_paths_and_may_be_compressed() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("b")).unwrap();
    fs::write(dir.path().join("c.txt"), letters(3, 300)).unwrap();
    fs::write(dir.path().join("b/a.txt"), "b".repeat(300)).unwrap();
    fs::write(dir.path().join("notes.md"), "not text of the corpus").unwrap();
    let packed = ruzstd::encoding::compress_to_vec(
        "z".repeat(300).as_bytes(),
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    // Two frames in one file are one text.
    fs::write(
        dir.path().join("a.txt.zst"),
        [&packed[..], &packed].concat(),
    )
    .unwrap();
    let corpus = from(dir.path(), &["data.validation_fraction=0.01"]).unwrap();
    assert_eq!(documents(&corpus), [4, 1]);
    let [train, _] = texts(&corpus);
    let all: Vec<&[u8]> = train
        .split(|b| *b == b'\n')
        .filter(|p| !p.is_empty())
        .collect();
    let lengths: Vec<(u8, usize)> = all.iter().map(|p| (p[0], p.len())).collect();
    assert_eq!(
        lengths,
        [(b'z', 600), (b'b', 300), (b'b', 300), (b'c', 300)]
    );
}

#[test]
fn the_error_for_bad_text_names_the_file_and_the_fault() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, set: &[&str], parts: &[&str]| {
        let e = from(path, set).err().unwrap().to_string();
        for part in parts {
            assert!(e.contains(part), "no `{part}` in: {e}");
        }
    };
    let none = dir.path().join("none.txt");
    refused(&none, &[], &["none.txt", "check the path"]);
    refused(dir.path(), &[], &["a folder with .txt"]);
    let small = ["model.vocab_size=99"];
    let cut = &include_bytes!("../../data/embedded/sotu.txt.zst")[..100_000];
    let (run, short, long) = ("x".repeat(900), letters(4, 20), letters(4, 300));
    let separated = ["data.document_separator=---"];
    let check = |name: &str, content: &[u8], set: &[&str], parts: &[&str]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        refused(&path, set, parts);
    };
    check("0.txt", b"", &[], &["0.txt", "empty"]);
    check("1.txt", b" \n\n\n \n", &[], &["1.txt", "empty"]);
    let latin = b"caf\xc3\xa9 caf\xe9.";
    check("2.txt", latin, &[], &["2.txt", "UTF-8", "offset 9"]);
    let few = ["validation text of more than 256", "got 45"];
    check("3.txt", run.as_bytes(), &[], &few);
    let few = ["256 tokens", "sequence_length"];
    check("4.txt", short.as_bytes(), &[], &few);
    let large = ["vocab_size = 99", "byte 100 at offset 606"];
    check("5.txt", long.as_bytes(), &small, &large);
    check("6.txt.zst", cut, &[], &["6.txt.zst", "cut-off"]);
    check("7.txt.zst", b"not zstd", &[], &["7.txt.zst", "header"]);
    // Separators, and no document between them.
    let none = ["256 tokens", "got 0"];
    check("8.txt", b"---\n---", &separated, &none);
}

#[test]
fn prefetched_batches_equal_directly_read_ones_from_any_start() {
    let corpus = std::sync::Arc::new(load(&Config::tiny(&[])).unwrap());
    for first in [0, 3, 1000] {
        let read = corpus.clone();
        let steps = first..first + 20;
        let read = move |step| read.sequences(step * 16..(step + 1) * 16);
        let mut prefetch = Prefetch::new(steps.clone(), read).unwrap();
        for step in steps {
            let direct = corpus.sequences(step * 16..(step + 1) * 16);
            assert!(prefetch.take(step) == direct, "step {step} from {first}");
        }
    }
}

#[test]
fn a_batch_holds_the_beginnings_of_documents_on_request() {
    let set = [
        "model.sequence_length=24",
        "data.validation_fraction=0.3",
        "data.document_boundaries=true",
    ];
    let text = letters(20, 11);
    let corpus = of_text(&text, &set);
    assert_eq!(of_text(&text, &set[..2]).sequences(0..4).first_key, None);
    for batch in [corpus.sequences(0..9), corpus.evaluation(0)] {
        for sequences in batch.chunks(1) {
            assert_eq!(sequences.length().unwrap(), 24);
            // Each document is a run of one letter, followed by the separator.
            let tokens = bytes(sequences.tokens);
            let mut begin = 0;
            for (row, first) in sequences.first_key.unwrap().iter().enumerate() {
                if row > 0 && tokens[row - 1] == b'\n' && tokens[row] != b'\n' {
                    begin = row;
                }
                assert_eq!(*first as usize, begin, "row {row} of {tokens:?}");
            }
        }
    }
}
