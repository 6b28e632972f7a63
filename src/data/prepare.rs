//! From files of documents to a folder of tokens: [`Folder`].
//!
//! One thread reads, all cores encode, one writes; documents keep their order, so the folder has the
//! same bytes whatever the number of threads. Only chunks on their way are in memory. Shards are closed
//! at a document, those of both sides together; then `unfinished.json` says how far the preparation
//! came, and one that was killed goes on there. The manifest is written last.

mod inputs;
mod items;
mod lines;
mod options;
#[cfg(feature = "text")]
mod parquet;
mod shards;

pub use options::Options;

use super::folder::{FORMAT, Folder, MANIFEST, Manifest, STATE, Side, digest};
use super::tokenizer::{TOKENIZER_CONFIG_FILE, Tokenizer};
use crate::error::{Error, Result};
use crate::report::files::{UNFINISHED, replace};
use crate::report::lock::{FolderLock, LOCK_FILE};
use crate::report::progress::Progress;
use inputs::Input;
use items::Item;
use serde_json::{Value, json};
use shards::{Encoded, Place, State, Writer};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

/// Bytes of text that are encoded in one piece, at least.
const CHUNK: usize = 1 << 17;

/// What a preparation came to.
#[derive(Debug)]
pub struct Summary {
    /// That of the finished folder.
    pub manifest: Manifest,
    /// Files whose rest, or the rest of a row group of theirs, could not be read.
    pub cut: Vec<PathBuf>,
    /// Documents whose text decoding does not give back, of those that were decoded.
    pub altered: u64,
    /// Bytes of text that this process encoded, and how long it took.
    pub bytes: u64,
    /// How long this process took for them.
    pub seconds: f64,
}

/// Prepares a folder of tokens, or goes on where a killed preparation was.
///
/// # Errors
/// Inputs that cannot be read or have no text column, another tokenizer or other options than those
/// that the folder was begun with, no document, a full disk. Shards that are closed stay.
pub fn run(options: &Options) -> Result<Summary> {
    options.validate()?;
    let tokenizer = options.open_tokenizer()?;
    let (inputs, left_out) = inputs::list_all(options)?;
    // Every file is opened before the first is read: a bad one is told at once.
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
        progress.note(&format!("goes on behind {shards} finished shards in {out}"));
    }
    let mut writer = Writer::new(options, state, &progress);
    let place = writer.place();
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
    let (bytes, altered) = (writer.encoded(), writer.altered());
    let cut = writer.cut();
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

/// What a preparation that was killed left in the folder, if it began as `state`.
fn unfinished(out: &Path, state: &State) -> Result<Option<State>> {
    let state_file = out.join(STATE);
    if !state_file.exists() {
        return Ok(None);
    }
    let text = fs::read(&state_file).map_err(|e| Error::io("read", &state_file, e))?;
    let found: State = serde_json::from_slice(&text).map_err(|e| {
        let help = "remove the folder and begin again";
        Error::file(&state_file, "what a preparation wrote", e.to_string(), help)
    })?;
    if found.plan == state.plan {
        return Ok(Some(found));
    }
    Err(Error::file(
        out,
        "the inputs and options that the preparation there began with",
        different(&found.plan, &state.plan),
        "put them back, or choose another --out",
    ))
}

/// Refuses a folder with more in it than shards that were not finished.
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
        true => "a folder of tokens that is finished",
        false => "a folder with something in it",
    };
    let help = "choose another --out, or remove what is there";
    Err(Error::file(out, "a new or an empty folder", got, help))
}

/// Opens or makes the folder: where to begin.
fn begin(options: &Options, tokenizer: &Tokenizer, inputs: &[Input]) -> Result<State> {
    let out = &options.out;
    let after = options.behind_document(tokenizer);
    let before: Vec<i32> = tokenizer.bos().into_iter().collect();
    let fraction = match options.validation.is_empty() {
        true => options.validation_fraction,
        false => 0.0,
    };
    let files = tokenizer.files();
    let config = files
        .iter()
        .find(|(name, _)| *name == TOKENIZER_CONFIG_FILE);
    let state = State {
        plan: json!({
            "tokenizer": tokenizer.fingerprint(),
            "before": before,
            "after": after,
            "validation_fraction": fraction,
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
            tokenizer_config: config.map_or(String::new(), |(_, text)| digest(text)),
            vocab_size: tokenizer.vocab_size(),
            before,
            after,
            token_bytes: if tokenizer.vocab_size() <= 1 << 16 {
                2
            } else {
                4
            },
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
        // It was killed just before its end, which is done again.
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

/// The keys of two plans that differ.
fn different(a: &Value, b: &Value) -> String {
    let keys = a.as_object().into_iter().flat_map(|a| a.keys());
    let others: Vec<&str> = keys
        .filter(|k| a[*k] != b[*k])
        .map(String::as_str)
        .collect();
    format!("other {}", others.join(", "))
}

/// Whether document `n`, counted from 0, is held out: as many of the first as the share says.
fn held_out(n: u64, fraction: f64) -> bool {
    let before = |n: u64| (n as f64 * fraction + 0.5).floor();
    before(n + 1) > before(n)
}

/// A document on its way to be encoded.
struct Pending {
    item: Item,
    side: Side,
    /// Number of its input.
    input: usize,
    /// Where reading goes on behind it.
    place: Place,
    /// Bytes of all inputs read so far.
    consumed: u64,
}

/// Reads the inputs from `place` on, and sends on what becomes of each chunk, in order.
fn read(
    options: &Options,
    tokenizer: &Tokenizer,
    inputs: &[Input],
    mut place: Place,
    send: SyncSender<Receiver<Vec<Encoded>>>,
) -> Result<()> {
    let held_out_here = options.validation.is_empty();
    let mut chunk = Vec::new();
    let mut size = 0;
    let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
    rayon::in_place_scope(|jobs| {
        // False when nobody takes it: the writer failed.
        let put = |chunk: Vec<Pending>| {
            let (done, result) = sync_channel(1);
            let names = &names;
            jobs.spawn(move |_| {
                let encode = |p| encode(options, tokenizer, names, p);
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
                    let side = match input.validation {
                        true => Side::Validation,
                        false if !held_out_here => Side::Train,
                        false if held_out(place.seen, options.validation_fraction) => {
                            Side::Validation
                        }
                        false => Side::Train,
                    };
                    place.rows = place.rows.saturating_add(item.rows());
                    place.seen = place.seen.saturating_add(item.rows());
                    size += match &item {
                        Item::Document { text, .. } => text.len() + 64,
                        _ => 64,
                    };
                    let consumed = consumed_before + documents.consumed();
                    chunk.push(Pending {
                        item,
                        side,
                        input: i,
                        place,
                        consumed,
                    });
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

/// One document's tokens as they stand in a shard.
fn encode(options: &Options, tokenizer: &Tokenizer, names: &[&str], pending: Pending) -> Encoded {
    let Pending {
        item,
        side,
        input,
        place,
        consumed,
    } = pending;
    let what = match item {
        Item::Document { text, source } => match tokens(options, tokenizer, &text) {
            Ok((count, tokens, altered)) => shards::What::Document {
                side,
                altered,
                source: source.unwrap_or_else(|| names[input].to_string()),
                bytes: text.len() as u64,
                count,
                tokens,
            },
            Err(e) => shards::What::Unreadable {
                rows: 1,
                what: e.to_string(),
                rest: false,
            },
        },
        Item::Empty => shards::What::Empty,
        Item::Unreadable { rows, what, rest } => shards::What::Unreadable { rows, what, rest },
    };
    Encoded {
        what,
        input,
        place,
        consumed,
    }
}

/// The number of a document's tokens, they themselves, and whether they were asked to decode to its
/// text but do not.
fn tokens(options: &Options, tokenizer: &Tokenizer, text: &str) -> Result<(u64, Vec<u8>, bool)> {
    let own = tokenizer.encode(text)?;
    let altered = options.round_trip && tokenizer.decode(&own)? != text;
    let before: Vec<i32> = tokenizer.bos().into_iter().collect();
    let all = [before, own, options.behind_document(tokenizer)].concat();
    let bytes = match tokenizer.vocab_size() <= 1 << 16 {
        true => all.iter().flat_map(|t| (*t as u16).to_le_bytes()).collect(),
        false => all.iter().flat_map(|t| (*t as u32).to_le_bytes()).collect(),
    };
    Ok((all.len() as u64, bytes, altered))
}

/// Writes what comes, until nothing does.
fn write(writer: &mut Writer, chunks: &Receiver<Receiver<Vec<Encoded>>>) -> Result<()> {
    for chunk in chunks {
        // A chunk whose encoding panicked has no result; the panic is told where it was.
        for encoded in chunk.recv().unwrap_or_default() {
            writer.take(encoded)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::held_out;

    #[test]
    fn documents_are_held_out_in_their_share_evenly() {
        for (fraction, expected) in [(0.0, 0), (0.005, 5), (0.25, 250), (0.9, 900)] {
            let held: Vec<u64> = (0..1000).filter(|n| held_out(*n, fraction)).collect();
            assert_eq!(held.len(), expected);
            let gaps = held.windows(2).map(|w| (w[1] - w[0]) as f64);
            assert!(
                gaps.into_iter()
                    .all(|gap| (gap - 1.0 / fraction).abs() <= 1.0)
            );
        }
    }
}
