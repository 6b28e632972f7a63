//! Writes the shards of a preparation.

use super::Options;
use super::items::Item;
use crate::data::folder::{
    Counts, Entry, MANIFEST, Manifest, STATE, Shard, Side, SourceCounts, digest,
};
use crate::error::{Error, Result};
use crate::report::files::{UNFINISHED, fault, rename, replace, sync};
use crate::report::progress::Progress;
use indicatif::HumanBytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Number of unreadable documents that are reported one by one.
const TOLD: u64 = 20;

/// The position at which reading continues: an input, the number of its rows that are done, and the number of rows of all
/// inputs that are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Place {
    pub input: usize,
    pub rows: u64,
    pub seen: u64,
}

/// The state of a preparation.
#[derive(Serialize, Deserialize)]
pub(super) struct State {
    /// The inputs and options. A preparation with another plan cannot continue this one.
    pub plan: Value,
    /// The manifest of the closed shards.
    pub manifest: Manifest,
    pub place: Place,
    /// Indices of the inputs of which the rest, or the rest of a row group, could not be read.
    #[serde(default)]
    pub cut: BTreeSet<usize>,
}

/// Where an item is from, and the side of its document.
#[derive(Clone, Copy)]
pub(super) struct Position {
    pub side: Side,
    /// Index of its input.
    pub input: usize,
    /// Where reading continues after the item.
    pub place: Place,
    /// Bytes of all inputs that have been read so far.
    pub consumed: u64,
}

/// A document in the format of a shard.
pub(super) struct Encoded {
    pub source: String,
    pub counts: Counts,
    pub tokens: Vec<u8>,
    /// Whether the decoded tokens differ from the text.
    pub altered: bool,
}

/// Writes the state of the preparation to the folder.
pub(super) fn save(folder: &Path, state: &State) -> Result<()> {
    let text = serde_json::to_vec_pretty(state);
    let text = text.map_err(|e| Error::io("write", folder.join(STATE), e.into()))?;
    replace(folder, STATE, &text)
}

/// Removes the files of shards that were not closed. It ignores errors, since the caller returns the error that stopped
/// the preparation.
pub(super) fn remove_unfinished(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Writes encoded documents, in order, to the shards of their side.
pub(super) struct Writer<'a> {
    options: &'a Options,
    progress: &'a Progress,
    state: State,
    /// The position at which reading continues.
    pub place: Place,
    /// Number of the open shards.
    number: usize,
    open: [Option<OpenShard>; 2],
    /// Indices of the sources, by name.
    sources: HashMap<String, usize>,
    /// Number of bytes of text that this process has written.
    pub encoded: u64,
    /// Number of documents whose decoded tokens differ from the text.
    pub altered: u64,
    tokens: u64,
    told: u64,
}

impl<'a> Writer<'a> {
    /// Continues from `state`.
    pub fn new(options: &'a Options, state: State, progress: &'a Progress) -> Self {
        let names = state.manifest.sources.iter().map(|s| s.name.clone());
        let numbers = state.manifest.shards.iter().filter_map(|s| {
            let (_, number) = s.name.rsplit_once('-')?;
            number.parse::<usize>().ok()
        });
        Writer {
            options,
            progress,
            place: state.place,
            number: numbers.max().map_or(0, |n| n + 1),
            open: [None, None],
            sources: names.zip(0..).collect(),
            encoded: 0,
            altered: 0,
            tokens: 0,
            told: 0,
            state,
        }
    }

    /// Returns the files of which the rest, or the rest of a row group, could not be read.
    pub fn cut(&self) -> Vec<PathBuf> {
        self.state.cut.iter().map(|i| self.path_of(*i)).collect()
    }

    /// Writes the next item.
    pub fn take(&mut self, item: Item<Encoded>, at: Position) -> Result<()> {
        match item {
            Item::Document(document) => {
                let counts = document.counts;
                let source = self.source(document.source, at.side, counts);
                let open = &mut self.open[at.side as usize];
                let shard = match open {
                    Some(shard) => shard,
                    None => {
                        let name = format!("{}-{:05}", at.side.name(), self.number);
                        open.insert(OpenShard::create(&self.options.out, name)?)
                    }
                };
                shard.write(&document.tokens, counts, source)?;
                self.encoded += counts.bytes;
                self.altered += u64::from(document.altered);
                self.tokens += counts.tokens;
            }
            Item::Empty => self.state.manifest.empty += 1,
            Item::Unreadable { rows, what, rest } => {
                self.unreadable(at.input, rows, &what, at.place)?;
                if rest {
                    self.state.cut.insert(at.input);
                }
            }
        }
        self.place = at.place;
        let (read, tokens) = (HumanBytes(at.consumed), self.tokens as f64 / 1e6);
        let text = format!("{read} read, {tokens:.1} M tokens");
        self.progress.at(at.consumed, &text);
        let open: u64 = self.open.iter().flatten().map(|s| s.counts.tokens).sum();
        if open >= self.options.shard_tokens {
            self.close()?;
            self.state.place = self.place;
            save(&self.options.out, &self.state)?;
        }
        Ok(())
    }

    /// Adds a document of `side` to its source and returns the index of the source.
    fn source(&mut self, name: String, side: Side, counts: Counts) -> u64 {
        let sources = &mut self.state.manifest.sources;
        let i = *self.sources.entry(name).or_insert_with_key(|name| {
            sources.push(SourceCounts {
                name: name.clone(),
                train: Counts::default(),
                validation: Counts::default(),
            });
            sources.len() - 1
        });
        match side {
            Side::Train => sources[i].train.add(counts),
            Side::Validation => sources[i].validation.add(counts),
        }
        i as u64
    }

    /// Leaves out documents that cannot be read, or, with `strict`, returns an error.
    fn unreadable(&mut self, input: usize, rows: u64, what: &str, place: Place) -> Result<()> {
        let path = self.path_of(input);
        // Documents are counted from 1.
        let (first, last) = (place.rows - rows + 1, place.rows);
        let which = match rows {
            1 => format!("document {first}"),
            _ => format!("documents {first} to {last}"),
        };
        if self.options.strict {
            return Err(Error::file(
                path,
                "documents that can be read",
                format!("{which}: {what}"),
                "correct the file, or remove --strict to leave these documents out",
            ));
        }
        let unreadable = &mut self.state.manifest.unreadable;
        *unreadable = unreadable.saturating_add(rows);
        self.told += 1;
        if self.told <= TOLD {
            let file = path.display();
            let warning = format!("warning: left out {which} of {file}: {what}");
            self.progress.note(&warning);
        }
        if self.told == TOLD {
            self.progress
                .note("warning: further unreadable documents are only counted");
        }
        Ok(())
    }

    fn path_of(&self, input: usize) -> PathBuf {
        let name = &self.state.plan["inputs"][input][0];
        name.as_str().unwrap_or_default().into()
    }

    /// Closes the open shards of both sides.
    fn close(&mut self) -> Result<()> {
        for (side, open) in Side::BOTH.into_iter().zip(&mut self.open) {
            if let Some(shard) = open.take() {
                let shard = shard.close(&self.options.out, side)?;
                self.state.manifest.shards.push(shard);
            }
        }
        self.number += 1;
        Ok(())
    }

    /// Closes the last shards and writes the manifest.
    ///
    /// # Errors
    /// When there is no document to train on, or a file cannot be written.
    pub fn finish(mut self) -> Result<Manifest> {
        let out = &self.options.out.clone();
        self.close()?;
        let mut manifest = self.state.manifest;
        if manifest.counts(Side::Train).documents == 0 {
            return Err(Error::invalid(
                "data prepare",
                "at least one document to train on",
                format!(
                    "{} held out, {} without text, {} that could not be read",
                    manifest.counts(Side::Validation).documents,
                    manifest.empty,
                    manifest.unreadable
                ),
                "check the inputs, --text-column and --validation-fraction",
            ));
        }
        replace(out, MANIFEST, manifest.seal().as_bytes())?;
        let state = out.join(STATE);
        fs::remove_file(&state).map_err(|e| Error::io("remove", &state, e))?;
        sync(out)?;
        Ok(manifest)
    }
}

/// A shard that is being written.
struct OpenShard {
    name: String,
    path: PathBuf,
    file: BufWriter<File>,
    hash: blake3::Hasher,
    index: Vec<Entry>,
    counts: Counts,
}

impl OpenShard {
    fn create(folder: &Path, name: String) -> Result<Self> {
        let path = folder.join(format!("{UNFINISHED}{name}.bin"));
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(OpenShard {
            name,
            file: BufWriter::with_capacity(1 << 20, file),
            path,
            hash: blake3::Hasher::new(),
            index: Vec::new(),
            counts: Counts::default(),
        })
    }

    fn write(&mut self, tokens: &[u8], counts: Counts, source: u64) -> Result<()> {
        fault::disk()
            .and_then(|()| self.file.write_all(tokens))
            .map_err(|e| Error::io("write", &self.path, e))?;
        self.hash.update(tokens);
        self.counts.add(counts);
        self.index.push(Entry {
            end: self.counts.tokens,
            bytes: counts.bytes,
            source,
        });
        Ok(())
    }

    /// Syncs both files of the shard and gives them their final names.
    fn close(mut self, folder: &Path, side: Side) -> Result<Shard> {
        let io = |e| Error::io("write", &self.path, e);
        self.file.flush().map_err(io)?;
        fault::point();
        sync(&self.path)?;
        rename(folder, &format!("{}.bin", self.name))?;
        let index: &[u8] = bytemuck::cast_slice(&self.index);
        replace(folder, &format!("{}.idx", self.name), index)?;
        Ok(Shard {
            side,
            counts: self.counts,
            tokens: self.hash.finalize().to_hex().to_string(),
            index: digest(index),
            name: self.name,
        })
    }
}
