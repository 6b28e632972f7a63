//! A folder of tokens, as `routegrad data prepare` makes it.
//!
//! `manifest.json` says what the folder holds: the tokenizer, counts by source, and of each shard the
//! sizes and BLAKE3 digests. Shard `train-00000` is two files: `train-00000.bin`, the tokens of its
//! documents, one behind the other, little-endian; and `train-00000.idx`, an [`Entry`] to a document.
//! Validation documents have shards of their own. Where a token is not a byte, `tokenizer.json` and
//! `tokenizer_config.json` stand beside them.

use super::changed::{changed, expect_size};
use super::tokenizer::{BYTES, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer};
use super::tokens::{Store, Tokens};
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) const MANIFEST: &str = "manifest.json";
/// What a preparation under way has done.
pub(super) const STATE: &str = "unfinished.json";
/// The format of this program; another one gets another number.
pub(super) const FORMAT: &str = "routegrad tokens 1";

/// Which documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Documents to train on.
    Train,
    /// Documents that are held out.
    Validation,
}

impl Side {
    /// Both, in the order of arrays over them.
    pub const BOTH: [Side; 2] = [Side::Train, Side::Validation];

    pub(super) fn name(self) -> &'static str {
        match self {
            Side::Train => "train",
            Side::Validation => "validation",
        }
    }
}

/// How much of something there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// How many documents.
    pub documents: u64,
    /// Tokens of them, those before and behind each included.
    pub tokens: u64,
    /// Of the text, in UTF-8.
    pub bytes: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: Counts) {
        self.documents += other.documents;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }
}

/// A shard: its name, what it holds and the digests of its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Its files are `NAME.bin` and `NAME.idx`.
    pub name: String,
    /// What its documents are for.
    pub side: Side,
    /// What it holds.
    pub counts: Counts,
    /// BLAKE3 of `NAME.bin`.
    pub tokens: String,
    /// BLAKE3 of `NAME.idx`.
    pub index: String,
}

/// Documents that came from one place: FineWeb's `dump`, else a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceCounts {
    /// Value of the source column, or the file's name.
    pub name: String,
    /// What there is to train on.
    pub train: Counts,
    /// What is held out.
    pub validation: Counts,
}

/// What a folder of tokens holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name and version of the format.
    pub format: String,
    /// [`Tokenizer::fingerprint`].
    pub tokenizer: String,
    /// BLAKE3 of `tokenizer_config.json`; empty where a token is a byte.
    pub tokenizer_config: String,
    /// Ids are below it.
    pub vocab_size: usize,
    /// Tokens before each document.
    pub before: Vec<i32>,
    /// Tokens behind each document.
    pub after: Vec<i32>,
    /// Bytes of one token in a shard: 2 or 4.
    pub token_bytes: u8,
    /// In the order of their first documents.
    pub sources: Vec<SourceCounts>,
    /// Documents without text, left out.
    pub empty: u64,
    /// Documents that could not be read, left out.
    pub unreadable: u64,
    /// In the order in which they are read.
    pub shards: Vec<Shard>,
    /// BLAKE3 of this text with an empty checksum.
    pub checksum: String,
}

impl Manifest {
    /// What the documents of one side come to.
    pub fn counts(&self, side: Side) -> Counts {
        let mut sum = Counts::default();
        let shards = self.shards.iter().filter(|s| s.side == side);
        shards.for_each(|s| sum.add(s.counts));
        sum
    }

    /// As it stands in its file, with the checksum.
    pub(super) fn text(&self) -> String {
        let with = |checksum: String| {
            let manifest = Manifest {
                checksum,
                ..self.clone()
            };
            // Strings and whole numbers, which JSON can hold.
            serde_json::to_string_pretty(&manifest).unwrap_or_default() + "\n"
        };
        with(digest(with(String::new()).as_bytes()))
    }
}

/// One document in an index.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Entry {
    /// Where its tokens end in the shard; they begin where those of the document before end.
    pub end: u64,
    /// Bytes of its text.
    pub bytes: u64,
    /// Number of its source in the manifest.
    pub source: u64,
}

pub(super) fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// An open folder of tokens.
pub struct Folder {
    path: PathBuf,
    manifest: Manifest,
}

impl Folder {
    /// Whether a path leads to such a folder, finished or not.
    pub fn is(path: &Path) -> bool {
        path.join(MANIFEST).is_file() || path.join(STATE).is_file()
    }

    /// Reads the manifest and checks its checksum and the sizes of all files.
    ///
    /// # Errors
    /// When the preparation was not finished, the manifest is damaged or of another format, or a file
    /// is missing or of another size.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(MANIFEST);
        if !file.exists() && path.join(STATE).exists() {
            return Err(Error::file(
                path,
                "a folder of tokens",
                "one whose preparation has not ended",
                "give the command routegrad data prepare again: it goes on where it was",
            ));
        }
        if !file.exists() {
            return Err(Error::file(
                path,
                "a folder of tokens",
                match path.is_dir() {
                    true => format!("a folder without {MANIFEST}"),
                    false => "no such folder".into(),
                },
                "make one: routegrad data prepare",
            ));
        }
        let text = fs::read_to_string(&file).map_err(|e| Error::io("read", &file, e))?;
        let value: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| changed(&file, "the manifest that was written".into(), e.to_string()))?;
        if value["format"] != FORMAT {
            return Err(Error::file(
                &file,
                format!("the format \"{FORMAT}\""),
                value["format"].to_string(),
                "prepare the text again with this program",
            ));
        }
        let manifest: Manifest = serde_json::from_value(value)
            .map_err(|e| changed(&file, "the manifest that was written".into(), e.to_string()))?;
        if manifest.text() != text {
            let expected = format!("a text of checksum {}", manifest.checksum);
            return Err(changed(&file, expected, "another one".into()));
        }
        let folder = Folder {
            path: path.to_path_buf(),
            manifest,
        };
        folder.check_sizes()?;
        Ok(folder)
    }

    fn check_sizes(&self) -> Result<()> {
        let width = u64::from(self.manifest.token_bytes);
        if !matches!(width, 2 | 4) {
            let path = self.path.join(MANIFEST);
            return Err(changed(
                &path,
                "tokens of 2 or 4 bytes".into(),
                width.to_string(),
            ));
        }
        for shard in &self.manifest.shards {
            let counts = shard.counts;
            expect_size(&self.file(shard, "bin"), counts.tokens.checked_mul(width))?;
            let entry = size_of::<Entry>() as u64;
            expect_size(
                &self.file(shard, "idx"),
                counts.documents.checked_mul(entry),
            )?;
        }
        Ok(())
    }

    fn file(&self, shard: &Shard, extension: &str) -> PathBuf {
        self.path.join(format!("{}.{extension}", shard.name))
    }

    /// What the folder says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        let tokens: u64 = self.manifest.shards.iter().map(|s| s.counts.tokens).sum();
        tokens * u64::from(self.manifest.token_bytes)
    }

    /// Compares every file with its digest.
    ///
    /// # Errors
    /// At the first that differs.
    pub fn verify(&self) -> Result<()> {
        self.tokenizer_files()?;
        let files = self.manifest.shards.iter().flat_map(|shard| {
            [
                (self.file(shard, "bin"), &shard.tokens),
                (self.file(shard, "idx"), &shard.index),
            ]
        });
        let files: Vec<_> = files.collect();
        files.par_iter().try_for_each(|(path, expected)| {
            let mut hash = blake3::Hasher::new();
            let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
            hash.update_reader(file)
                .map_err(|e| Error::io("read", path, e))?;
            expect_digest(path, expected, hash.finalize().to_hex().as_str())
        })?;
        Side::BOTH
            .iter()
            .try_for_each(|side| self.documents(*side).map(drop))
    }

    /// The files of the tokenizer, compared with their digests: names and contents. None for bytes.
    ///
    /// # Errors
    /// When they are missing, or others.
    pub fn tokenizer_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let manifest = &self.manifest;
        if manifest.tokenizer == BYTES {
            return Ok(Vec::new());
        }
        let mut files = Vec::new();
        for (name, expected) in [
            (TOKENIZER_FILE, &manifest.tokenizer),
            (TOKENIZER_CONFIG_FILE, &manifest.tokenizer_config),
        ] {
            let path = self.path.join(name);
            let content = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            expect_digest(&path, expected, &digest(&content))?;
            files.push((name, content));
        }
        Ok(files)
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// As [`tokenizer_files`](Self::tokenizer_files); in a program without the feature `text`, unless
    /// a token is a byte.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.tokenizer_files()?;
        match self.manifest.tokenizer.as_str() {
            BYTES => Ok(Tokenizer::bytes()),
            _ => Tokenizer::open(&self.path.join(TOKENIZER_FILE)),
        }
    }

    /// The tokens of one side, mapped.
    pub(super) fn tokens(&self, side: Side) -> Result<Tokens> {
        let mut tokens = Tokens::default();
        for shard in self.manifest.shards.iter().filter(|s| s.side == side) {
            let n = shard.counts.tokens;
            if n > 0 {
                let path = self.file(shard, "bin");
                let store = Store::map(&path, n, self.manifest.token_bytes)?;
                tokens.push(Arc::new(store), 0..n as usize);
            }
        }
        Ok(tokens)
    }

    /// The tokens of document `i` of one side, those around its text included.
    ///
    /// # Errors
    /// When there is no such document, or its shard cannot be read.
    pub fn document(&self, side: Side, i: usize) -> Result<Vec<i32>> {
        let documents = self.documents(side)?;
        let Some(document) = documents.get(i) else {
            return Err(Error::invalid(
                "data",
                format!("a document below {}", documents.len()),
                i.to_string(),
                "choose another",
            ));
        };
        let begin = i.checked_sub(1).map_or(0, |i| documents[i].end);
        let mut tokens = Vec::new();
        self.tokens(side)?.copy(begin..document.end, &mut tokens);
        Ok(tokens)
    }

    /// All tokens of one side, in memory.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn side(&self, side: Side) -> Result<Vec<i32>> {
        let (tokens, mut all) = (self.tokens(side)?, Vec::new());
        tokens.copy(0..tokens.len(), &mut all);
        Ok(all)
    }

    /// The documents of one side, their ends counted over its shards.
    ///
    /// # Errors
    /// When an index is not what was written.
    pub fn documents(&self, side: Side) -> Result<Vec<Entry>> {
        let mut documents = Vec::new();
        let mut before = 0;
        for shard in self.manifest.shards.iter().filter(|s| s.side == side) {
            let path = self.file(shard, "idx");
            let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            expect_digest(&path, &shard.index, &digest(&bytes))?;
            let mut last = 0;
            for entry in bytes.chunks_exact(size_of::<Entry>()) {
                let mut entry: Entry = bytemuck::pod_read_unaligned(entry);
                let whole = entry.end >= last && entry.source < self.manifest.sources.len() as u64;
                if !whole {
                    let expected = "documents one behind the other".to_string();
                    return Err(changed(&path, expected, format!("{entry:?}")));
                }
                last = entry.end;
                entry.end += before;
                documents.push(entry);
            }
            if last != shard.counts.tokens {
                let expected = format!("an end at {}", shard.counts.tokens);
                return Err(changed(&path, expected, last.to_string()));
            }
            before += last;
        }
        Ok(documents)
    }
}

fn expect_digest(path: &Path, expected: &str, got: &str) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    let expected = format!("the digest {expected}");
    Err(changed(path, expected, got.to_string()))
}
