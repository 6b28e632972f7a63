//! Shards as they are written.

use super::Options;
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

/// Unreadable documents that are told one by one.
const TOLD: u64 = 20;

/// Where reading goes on: an input, the rows of it that are done, and those of all inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Place {
    pub input: usize,
    pub rows: u64,
    pub seen: u64,
}

/// How far a preparation came.
#[derive(Serialize, Deserialize)]
pub(super) struct State {
    /// What is prepared, and how: another preparation does not go on with this one.
    pub plan: Value,
    /// Of the shards that are closed.
    pub manifest: Manifest,
    pub place: Place,
    /// Numbers of the inputs whose rest, or the rest of a row group of theirs, could not be read.
    #[serde(default)]
    pub cut: BTreeSet<usize>,
}

/// What became of one item.
pub(super) struct Encoded {
    pub what: What,
    pub input: usize,
    /// Where reading goes on behind it.
    pub place: Place,
    /// Bytes of all inputs read so far.
    pub consumed: u64,
}

pub(super) enum What {
    Document {
        side: Side,
        source: String,
        /// Of the text.
        bytes: u64,
        /// Tokens.
        count: u64,
        /// As they stand in the shard.
        tokens: Vec<u8>,
        /// Whether they do not decode to the text.
        altered: bool,
    },
    Empty,
    Unreadable {
        rows: u64,
        what: String,
        rest: bool,
    },
}

/// Saves how far the preparation came.
pub(super) fn save(folder: &Path, state: &State) -> Result<()> {
    let text = serde_json::to_vec_pretty(state);
    let text = text.map_err(|e| Error::io("write", folder.join(STATE), e.into()))?;
    replace(folder, STATE, &text)
}

/// Gives back the space of shards that were not closed; the error that they had comes first.
pub(super) fn remove_unfinished(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Takes documents in order and writes them to the shards of their side.
pub(super) struct Writer<'a> {
    options: &'a Options,
    progress: &'a Progress,
    state: State,
    place: Place,
    /// Number of the next shards.
    number: usize,
    open: [Option<OpenShard>; 2],
    /// Numbers of the sources, by name.
    sources: HashMap<String, usize>,
    /// Of what was taken here.
    encoded: u64,
    altered: u64,
    tokens: u64,
    told: u64,
}

impl<'a> Writer<'a> {
    /// Goes on from `state`.
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

    /// Where reading goes on.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Bytes of text taken.
    pub fn encoded(&self) -> u64 {
        self.encoded
    }

    /// Documents taken whose tokens do not decode to their text.
    pub fn altered(&self) -> u64 {
        self.altered
    }

    /// Files whose rest, or the rest of a row group of theirs, could not be read.
    pub fn cut(&self) -> Vec<PathBuf> {
        self.state.cut.iter().map(|i| self.path_of(*i)).collect()
    }

    /// Takes the next document.
    pub fn take(&mut self, encoded: Encoded) -> Result<()> {
        match encoded.what {
            What::Document {
                side,
                source,
                bytes,
                count,
                tokens,
                altered,
            } => {
                let counts = Counts {
                    documents: 1,
                    tokens: count,
                    bytes,
                };
                let source = self.source(source, side, counts);
                let open = &mut self.open[side as usize];
                let shard = match open {
                    Some(shard) => shard,
                    None => {
                        let name = format!("{}-{:05}", side.name(), self.number);
                        open.insert(OpenShard::create(&self.options.out, name)?)
                    }
                };
                shard.write(&tokens, counts, source)?;
                self.encoded += bytes;
                self.altered += u64::from(altered);
                self.tokens += count;
            }
            What::Empty => self.state.manifest.empty += 1,
            What::Unreadable { rows, what, rest } => {
                self.unreadable(encoded.input, rows, &what, encoded.place)?;
                if rest {
                    self.state.cut.insert(encoded.input);
                }
            }
        }
        self.place = encoded.place;
        let (read, tokens) = (HumanBytes(encoded.consumed), self.tokens as f64 / 1e6);
        let text = format!("{read} read, {tokens:.1} M tokens");
        self.progress.at(encoded.consumed, &text);
        let open: u64 = self.open.iter().flatten().map(|s| s.counts.tokens).sum();
        if open >= self.options.shard_tokens {
            self.close()?;
            self.state.place = self.place;
            save(&self.options.out, &self.state)?;
        }
        Ok(())
    }

    /// The number of a source, to which a document of `side` is added.
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

    /// Leaves out what cannot be read, or fails with it.
    fn unreadable(&mut self, input: usize, rows: u64, what: &str, place: Place) -> Result<()> {
        let path = self.path_of(input);
        // Rows count from 1.
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
                "mend the file, or leave out --strict to leave them out",
            ));
        }
        let unreadable = &mut self.state.manifest.unreadable;
        *unreadable = unreadable.saturating_add(rows);
        self.told += 1;
        if self.told <= TOLD {
            let file = path.display();
            self.progress
                .note(&format!("warning: left out {which} of {file}: {what}"));
        }
        if self.told == TOLD {
            self.progress.note("warning: further ones are only counted");
        }
        Ok(())
    }

    fn path_of(&self, input: usize) -> PathBuf {
        let name = &self.state.plan["inputs"][input][0];
        name.as_str().unwrap_or_default().into()
    }

    /// Closes the shards of both sides.
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
    /// When there is no document to train on.
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
        let text = manifest.text();
        replace(out, MANIFEST, text.as_bytes())?;
        let state = out.join(STATE);
        fs::remove_file(&state).map_err(|e| Error::io("remove", &state, e))?;
        sync(out)?;
        manifest.checksum =
            serde_json::from_str::<Manifest>(&text).map_or(String::new(), |m| m.checksum);
        Ok(manifest)
    }
}

/// A shard that takes documents.
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

    /// Both files of the shard, synced and under their names.
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
