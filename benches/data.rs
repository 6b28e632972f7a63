//! How fast text becomes tokens and tokens become batches.
//!
//! `cargo bench --bench data --features text -- TOKENIZER.json INPUT…` encodes the documents of the
//! inputs, parquet or JSON lines with a field `text`, by Hugging Face's library alone and by
//! `data prepare`, in turns, each three times; then reads batches of what was prepared on one core.

#[cfg(feature = "text")]
fn main() {
    measure::run();
}

#[cfg(not(feature = "text"))]
fn main() {
    println!("build with --features text");
}

#[cfg(feature = "text")]
mod measure {
    use routegrad::config::Layers;
    use routegrad::data::folder::{Folder, Side};
    use routegrad::data::prepare::{self, Options};
    use routegrad::data::{Corpus, configure};
    use std::path::{Path, PathBuf};
    use std::time::Instant;

    pub fn run() {
        let arguments: Vec<PathBuf> = std::env::args()
            .skip(1)
            .filter(|a| !a.starts_with("--"))
            .map(PathBuf::from)
            .collect();
        let [tokenizer, inputs @ ..] = &arguments[..] else {
            println!("give a tokenizer.json and inputs: -- TOKENIZER.json INPUT…");
            return;
        };
        let folder = tempfile::tempdir().expect("a temporary folder");
        let out = |round: usize| folder.path().join(format!("tokens-{round}"));
        let prepared = |round: usize| {
            let options = Options {
                tokenizer: Some(tokenizer.clone()),
                // Enough for a window of validation, however small the inputs.
                validation_fraction: 0.05,
                ..Options::new(inputs, &out(round))
            };
            let summary = prepare::run(&options).expect("inputs that can be prepared");
            summary.bytes as f64 / 1e6 / summary.seconds
        };
        prepared(0);
        let texts = texts(&out(0));
        let alone = || {
            // A new one each time: it remembers words.
            let library = tokenizers::Tokenizer::from_file(tokenizer).expect("a tokenizer");
            let bytes: usize = texts.iter().map(String::len).sum();
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let begun = Instant::now();
            let encoded = library.encode_batch_fast(texts, false).expect("text");
            let seconds = begun.elapsed().as_secs_f64();
            assert!(encoded.iter().all(|e| !e.get_ids().is_empty()));
            bytes as f64 / 1e6 / seconds
        };
        let threads = rayon::current_num_threads();
        println!(
            "MB/s on {threads} threads: library alone, data prepare (files read and written), ratio"
        );
        for round in 1..=3 {
            let (library, ours) = (alone(), prepared(round));
            println!("{library:>8.2} {ours:>8.2} {:>6.2}", ours / library);
        }
        read_batches(&out(0));
    }

    /// The training documents as text.
    fn texts(folder: &Path) -> Vec<String> {
        let folder = Folder::open(folder).expect("what was prepared");
        let tokenizer = folder.tokenizer().expect("its tokenizer");
        let all = folder.side(Side::Train).expect("its tokens");
        let mut begin = 0;
        let documents = folder.documents(Side::Train).expect("its documents");
        let text = |document: &routegrad::data::folder::Entry| {
            let end = document.end as usize;
            let tokens = &all[begin..end - folder.manifest().after.len()];
            begin = end;
            let tokens = &tokens[folder.manifest().before.len()..];
            tokenizer.decode(tokens).expect("text")
        };
        documents.iter().map(text).collect()
    }

    fn read_batches(folder: &Path) {
        let vocabulary = Folder::open(folder).expect("tokens").manifest().vocab_size;
        let mut layers = Layers::preset("tiny");
        layers.set = vec![
            format!("data.source={:?}", folder.display().to_string()),
            format!("model.vocab_size={vocabulary}"),
            "model.sequence_length=2048".into(),
        ];
        let config = configure(&layers, &|_| Ok(())).expect("a configuration");
        let corpus = Corpus::load(&config.data, &config.model, 0).expect("tokens");
        for _ in 0..3 {
            let begun = Instant::now();
            let tokens: usize = (0..4000)
                .map(|i| corpus.sequences(i..i + 1).tokens.len())
                .sum();
            let rate = tokens as f64 / 1e6 / begun.elapsed().as_secs_f64();
            println!("{rate:>8.0} M tokens/s read on one core, 2,048 at a time");
        }
    }
}
