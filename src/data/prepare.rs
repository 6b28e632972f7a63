//! Converts files of documents to a folder of tokens: [`Folder`].
//!
//! One thread reads, all cores encode, and one thread writes. Documents keep their order, so the folder has the same bytes
//! for any number of threads. Only the chunks that are being processed are in memory. Shards are closed at the end of a
//! document, those of both sides together; `unfinished.json` then holds the state of the preparation, so that a killed
//! preparation can continue from there. The manifest is written last.

mod inputs;
mod items;
mod lines;
mod options;
#[cfg(feature = "text")]
mod parquet;
mod shards;

pub use options::Options;

use super::folder::{Counts, FORMAT, Folder, MANIFEST, Manifest, STATE, Side, digest};
use super::tokenizer::{TOKENIZER_CONFIG_FILE, Tokenizer};
use crate::error::{Error, Result};
use crate::report::files::{UNFINISHED, replace};
use crate::report::lock::{FolderLock, LOCK_FILE};
use crate::report::progress::Progress;
use inputs::Input;
use items::{Document, Item};
use serde_json::{Value, json};
use shards::{Encoded, Place, Position, State, Writer};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

/// Minimum number of bytes of text that are encoded as one chunk.
const CHUNK: usize = 1 << 17;

/// The result of a preparation.
#[derive(Debug)]
pub struct Summary {
    /// The manifest of the finished folder.
    pub manifest: Manifest,
    /// Files of which the rest, or the rest of a row group, could not be read.
    pub cut: Vec<PathBuf>,
    /// Number of documents, among those that were decoded again, whose decoded text differs from the original.
    pub altered: u64,
    /// Bytes of text that this process encoded.
    pub bytes: u64,
    /// Time in seconds that this process took to encode them.
    pub seconds: f64,
}

/// Prepares a folder of tokens, or continues a preparation that was killed.
///
/// # Errors
/// When an input cannot be read or has no text column, the tokenizer or the options differ from those with which the
/// folder was started, there is no document, or the disk is full. Closed shards are kept.
pub fn run(options: &Options) -> Result<Summary> {
    options.validate()?;
    let tokenizer = options.open_tokenizer()?;
    let (inputs, left_out) = inputs::list_all(options)?;
    // Opens every file before reading the first, so that a bad file is reported at the start.
    for input in &inputs {
        inputs::open(&input.path, options)?;
    }
    let _lock = FolderLock::take(&options.out)?;
    let begun = Instant::now();
    let state = begin(options, &tokenizer, &inputs)?;
    let bytes = inputs.iter().map(|input| input.bytes).sum();
    let progress = Progress::new(bytes, options.quiet);
    left_out.iter().for_each(|text| progress.note(text));
    if state.place.seen > 0 {
        let (shards, out) = (state.manifest.shards.len(), options.out.display());
        progress.note(&format!(
            "continuing after {shards} finished shards in {out}"
        ));
    }
    let mut writer = Writer::new(options, state, &progress);
    let place = writer.place;
    let read = std::thread::scope(|threads| {
        let waiting = 4 * rayon::current_num_threads();
        let (send, receive) = sync_channel(waiting);
        let writer = &mut writer;
        let writing = threads.spawn(move || write(writer, &receive));
        let read = read(options, &tokenizer, &inputs, place, send);
        let written = writing.join();
        let written = written.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.and(read)
    });
    let (bytes, altered, cut) = (writer.encoded, writer.altered, writer.cut());
    let finished = read.and_then(|()| writer.finish());
    drop(progress);
    let manifest = finished.inspect_err(|_| shards::remove_unfinished(&options.out))?;
    Ok(Summary {
        manifest,
        cut,
        altered,
        bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Returns the state of a killed preparation in the folder, if it was started with the plan of `state`.
fn unfinished(out: &Path, state: &State) -> Result<Option<State>> {
    let state_file = out.join(STATE);
    if !state_file.exists() {
        return Ok(None);
    }
    let text = fs::read(&state_file).map_err(|e| Error::io("read", &state_file, e))?;
    let found: State = serde_json::from_slice(&text).map_err(|e| {
        let help = "remove the folder and start again";
        Error::file(
            &state_file,
            "the state of a preparation",
            e.to_string(),
            help,
        )
    })?;
    if found.plan == state.plan {
        return Ok(Some(found));
    }
    Err(Error::file(
        out,
        "the inputs and options with which this preparation was started",
        different(&found.plan, &state.plan),
        "restore them, or choose another --out",
    ))
}

/// Returns an error if the folder contains anything other than unfinished shards.
fn refuse_used(out: &Path) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    let entries = fs::read_dir(out).map_err(|e| Error::io("list", out, e))?;
    let left = |name: &str| name.starts_with(UNFINISHED) || name == LOCK_FILE;
    let mut names = entries.flatten().map(|e| e.file_name());
    if !names.any(|name| !left(&name.to_string_lossy())) {
        return Ok(());
    }
    let got = match Folder::is(out) {
        true => "a finished folder of tokens",
        false => "a folder that is not empty",
    };
    let help = "choose another --out, or remove the content of the folder";
    Err(Error::file(out, "a new or an empty folder", got, help))
}

/// Opens or creates the folder, and returns the state from which to continue.
fn begin(options: &Options, tokenizer: &Tokenizer, inputs: &[Input]) -> Result<State> {
    let out = &options.out;
    let after = options.behind_document(tokenizer);
    let before: Vec<i32> = tokenizer.bos().into_iter().collect();
    let files = tokenizer.files();
    let mut config = files.iter().filter(|f| f.0 == TOKENIZER_CONFIG_FILE);
    let state = State {
        plan: json!({
            "tokenizer": tokenizer.fingerprint(),
            "before": before,
            "after": after,
            "validation_fraction": options.fraction(),
            "columns": [options.text_column, options.source_column()],
            "separator": options.separator,
            "shard_tokens": options.shard_tokens,
            "inputs": inputs
                .iter()
                .map(|i| json!([i.name, i.validation, i.bytes, i.nanoseconds.to_string()]))
                .collect::<Vec<_>>(),
        }),
        manifest: Manifest {
            format: FORMAT.into(),
            tokenizer: tokenizer.fingerprint().into(),
            tokenizer_config: config.next().map_or(String::new(), |f| digest(&f.1)),
            vocab_size: tokenizer.vocab_size(),
            before,
            after,
            token_bytes: token_bytes(tokenizer),
            sources: Vec::new(),
            empty: 0,
            unreadable: 0,
            shards: Vec::new(),
            checksum: String::new(),
        },
        place: Place::default(),
        cut: BTreeSet::new(),
    };
    if let Some(found) = unfinished(out, &state)? {
        write_missing(out, &files)?;
        // The preparation was killed just before its end; the last step is repeated.
        if out.join(MANIFEST).exists() {
            fs::remove_file(out.join(MANIFEST)).map_err(|e| Error::io("remove", out, e))?;
        }
        return Ok(found);
    }
    refuse_used(out)?;
    fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
    shards::save(out, &state)?;
    write_missing(out, &files)?;
    Ok(state)
}

fn write_missing(out: &Path, files: &[(&str, Vec<u8>)]) -> Result<()> {
    let mut missing = files.iter().filter(|(name, _)| !out.join(name).exists());
    missing.try_for_each(|(name, content)| replace(out, name, content))
}

/// Returns the names of the keys whose values differ between two plans.
fn different(a: &Value, b: &Value) -> String {
    let keys = a.as_object().into_iter().flat_map(|a| a.keys());
    let others = keys.filter(|k| a[*k] != b[*k]).map(String::as_str);
    format!("other {}", others.collect::<Vec<_>>().join(", "))
}

/// Returns whether document `n`, counted from 0, is held out. The share of held-out documents among the first n is
/// `fraction` for every n, up to rounding.
fn held_out(n: u64, fraction: f64) -> bool {
    let before = |n: u64| (n as f64 * fraction + 0.5).floor();
    before(n + 1) > before(n)
}

/// An item and its position.
type Placed<D> = (Item<D>, Position);

/// Reads the inputs from `place` on, and sends the encoded chunks, in order.
fn read(
    options: &Options,
    tokenizer: &Tokenizer,
    inputs: &[Input],
    mut place: Place,
    send: SyncSender<Receiver<Vec<Placed<Encoded>>>>,
) -> Result<()> {
    let mut chunk = Vec::new();
    let mut size = 0;
    let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
    rayon::in_place_scope(|jobs| {
        // False if the receiver is gone because the writer failed.
        let put = |chunk: Vec<Placed<Document>>| {
            let (done, result) = sync_channel(1);
            let names = &names;
            jobs.spawn(move |_| {
                let encode = |(item, at): Placed<Document>| {
                    (encode(options, tokenizer, names[at.input], item), at)
                };
                let _ = done.send(chunk.into_iter().map(encode).collect());
            });
            send.send(result).is_ok()
        };
        let mut consumed_before = 0;
        for (i, input) in inputs.iter().enumerate() {
            if i >= place.input {
                let mut documents = inputs::open(&input.path, options)?;
                documents.skip(place.rows);
                while let Some(item) = documents.next() {
                    let side = match input.validation || held_out(place.seen, options.fraction()) {
                        true => Side::Validation,
                        false => Side::Train,
                    };
                    place.rows = place.rows.saturating_add(item.rows());
                    place.seen = place.seen.saturating_add(item.rows());
                    size += match &item {
                        Item::Document(document) => document.text.len() + 64,
                        _ => 64,
                    };
                    let position = Position {
                        side,
                        input: i,
                        place,
                        consumed: consumed_before + documents.consumed(),
                    };
                    chunk.push((item, position));
                    if size >= CHUNK {
                        size = 0;
                        if !put(std::mem::take(&mut chunk)) {
                            return Ok(());
                        }
                    }
                }
                place = Place {
                    input: i + 1,
                    rows: 0,
                    ..place
                };
            }
            consumed_before += input.bytes;
        }
        put(chunk);
        Ok(())
    })
}

/// Encodes a document that is read from the input `name`; an error makes it unreadable.
fn encode(options: &Options, tokenizer: &Tokenizer, name: &str, item: Item) -> Item<Encoded> {
    match item {
        Item::Document(document) => match tokens(options, tokenizer, name, document) {
            Ok(encoded) => Item::Document(encoded),
            Err(e) => Item::one_unreadable(e.to_string()),
        },
        Item::Empty => Item::Empty,
        Item::Unreadable { rows, what, rest } => Item::Unreadable { rows, what, rest },
    }
}

fn tokens(
    options: &Options,
    tokenizer: &Tokenizer,
    name: &str,
    Document { text, source }: Document,
) -> Result<Encoded> {
    let own = tokenizer.encode(&text)?;
    let altered = options.round_trip && tokenizer.decode(&own)? != text;
    let before: Vec<i32> = tokenizer.bos().into_iter().collect();
    let all = [before, own, options.behind_document(tokenizer)].concat();
    Ok(Encoded {
        source: source.unwrap_or_else(|| name.to_string()),
        counts: Counts {
            documents: 1,
            tokens: all.len() as u64,
            bytes: text.len() as u64,
        },
        tokens: match token_bytes(tokenizer) {
            2 => all.iter().flat_map(|t| (*t as u16).to_le_bytes()).collect(),
            _ => all.iter().flat_map(|t| (*t as u32).to_le_bytes()).collect(),
        },
        altered,
    })
}

/// Returns the number of bytes of a token in a shard.
fn token_bytes(tokenizer: &Tokenizer) -> u8 {
    match tokenizer.vocab_size() <= 1 << 16 {
        true => 2,
        false => 4,
    }
}

/// Writes all chunks until the channel is closed.
fn write(writer: &mut Writer, chunks: &Receiver<Receiver<Vec<Placed<Encoded>>>>) -> Result<()> {
    for chunk in chunks {
        // A chunk whose encoding panicked has no result; the thread that panicked reports it. Nothing behind the chunk is
        // written, so that a preparation that continues reads it again.
        let Ok(items) = chunk.recv() else { break };
        for (item, at) in items {
            writer.take(item, at)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_behind_a_chunk_that_was_lost() {
        let folder = tempfile::tempdir().unwrap();
        let options = Options::new(&[], folder.path());
        let state = begin(&options, &Tokenizer::bytes(), &[]).unwrap();
        let progress = Progress::new(0, true);
        let mut writer = Writer::new(&options, state, &progress);
        let place = |rows| Place {
            input: 0,
            rows,
            seen: rows,
        };
        let at = |rows| Position {
            side: Side::Train,
            input: 0,
            place: place(rows),
            consumed: 0,
        };
        let (send, chunks) = sync_channel(3);
        for rows in 1..=3 {
            let (done, result) = sync_channel(1);
            // The second chunk has no result.
            if rows != 2 {
                done.send(vec![(Item::Empty, at(rows))]).unwrap();
            }
            send.send(result).unwrap();
        }
        drop(send);
        write(&mut writer, &chunks).unwrap();
        assert_eq!(writer.place, place(1));
    }

    #[test]
    fn the_share_of_held_out_documents_is_as_requested_and_even() {
        for (fraction, expected) in [(0.0, 0), (0.005, 5), (0.25, 250), (0.9, 900)] {
            let held: Vec<u64> = (0..1000).filter(|n| held_out(*n, fraction)).collect();
            assert_eq!(held.len(), expected);
            let mut gaps = held.windows(2).map(|w| (w[1] - w[0]) as f64);
            assert!(gaps.all(|gap| (gap - 1.0 / fraction).abs() <= 1.0));
        }
    }
}
