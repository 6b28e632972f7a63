//! A folder of tokens, as `routegrad data prepare` creates it.
//!
//! `manifest.json` describes the content: the tokenizer, the counts per source, and the sizes and BLAKE3 digests of each
//! shard. Shard `train-00000` has two files: `train-00000.bin` with the tokens of its documents, concatenated,
//! little-endian; and `train-00000.idx` with one [`Entry`] per document. Validation documents are in separate shards.
//! Unless each byte is a token, the folder also holds `tokenizer.json` and `tokenizer_config.json`.

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
/// File with the state of a preparation that has not finished.
pub(super) const STATE: &str = "unfinished.json";
/// Name and version of the file format; an incompatible format gets another number.
pub(super) const FORMAT: &str = "routegrad tokens 1";

/// Training or validation documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Documents for training.
    Train,
    /// Documents that are held out for validation.
    Validation,
}

impl Side {
    /// Both values, in the order of arrays that are indexed by side.
    pub const BOTH: [Side; 2] = [Side::Train, Side::Validation];

    pub(super) fn name(self) -> &'static str {
        match self {
            Side::Train => "train",
            Side::Validation => "validation",
        }
    }
}

/// Numbers of documents, tokens and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Number of documents.
    pub documents: u64,
    /// Number of tokens, including those before and after each document.
    pub tokens: u64,
    /// Number of bytes of the text in UTF-8.
    pub bytes: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: Counts) {
        self.documents += other.documents;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }
}

/// A shard: its name, its counts and the digests of its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// The files of the shard are `NAME.bin` and `NAME.idx`.
    pub name: String,
    /// Whether its documents are for training or validation.
    pub side: Side,
    /// Documents, tokens and bytes of the shard.
    pub counts: Counts,
    /// BLAKE3 digest of `NAME.bin`.
    pub tokens: String,
    /// BLAKE3 digest of `NAME.idx`.
    pub index: String,
}

/// The counts of one source: a value of the source column (FineWeb's `dump`), or a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceCounts {
    /// Value of the source column, or the file's name.
    pub name: String,
    /// Documents for training.
    pub train: Counts,
    /// Documents that are held out.
    pub validation: Counts,
}

/// The manifest of a folder of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name and version of the format.
    pub format: String,
    /// The tokenizer's [fingerprint](Tokenizer::fingerprint).
    pub tokenizer: String,
    /// BLAKE3 digest of `tokenizer_config.json`; empty if each byte is a token.
    pub tokenizer_config: String,
    /// Size of the vocabulary; every token id is smaller.
    pub vocab_size: usize,
    /// Tokens before each document.
    pub before: Vec<i32>,
    /// Tokens after each document.
    pub after: Vec<i32>,
    /// Bytes of one token in a shard: 2 or 4.
    pub token_bytes: u8,
    /// Counts per source, in the order of the sources' first documents.
    pub sources: Vec<SourceCounts>,
    /// Number of documents without text, which were left out.
    pub empty: u64,
    /// Number of documents that could not be read, which were left out.
    pub unreadable: u64,
    /// The shards, in the order in which they are read.
    pub shards: Vec<Shard>,
    /// BLAKE3 digest of the manifest's text with an empty checksum.
    pub checksum: String,
}

impl Manifest {
    /// Returns the sum of the counts of one side's shards.
    pub fn counts(&self, side: Side) -> Counts {
        let mut sum = Counts::default();
        let shards = self.shards.iter().filter(|s| s.side == side);
        shards.for_each(|s| sum.add(s.counts));
        sum
    }

    /// Sets the checksum, and returns the manifest as JSON, as it is written to the file.
    pub(super) fn seal(&mut self) -> String {
        // A manifest has only strings, lists and whole numbers, which JSON can represent.
        let text = |m: &Self| serde_json::to_string_pretty(m).unwrap_or_default() + "\n";
        self.checksum.clear();
        self.checksum = digest(text(self).as_bytes());
        text(self)
    }
}

/// One document in an index file.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Entry {
    /// Position in the shard, in tokens, at which the document ends; it begins where the previous document ends.
    pub end: u64,
    /// Number of bytes of its text.
    pub bytes: u64,
    /// Index of its source in the manifest's `sources`.
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
    /// Returns whether `path` is a folder of tokens, finished or unfinished.
    pub fn is(path: &Path) -> bool {
        path.join(MANIFEST).is_file() || path.join(STATE).is_file()
    }

    /// Reads the manifest and checks its checksum and the sizes of all files.
    ///
    /// # Errors
    /// When the preparation has not finished, the manifest is damaged or has another format, or a file is missing or has a
    /// wrong size.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(MANIFEST);
        if !file.exists() {
            let create = "create it with routegrad data prepare";
            let (got, help) = match (path.join(STATE).exists(), path.is_dir()) {
                (true, _) => (
                    "a folder whose preparation has not finished".into(),
                    "run the same `routegrad data prepare` command again: it continues where it stopped",
                ),
                (false, true) => (format!("a folder without {MANIFEST}"), create),
                (false, false) => ("no such folder".into(), create),
            };
            return Err(Error::file(path, "a folder of tokens", got, help));
        }
        let text = fs::read_to_string(&file).map_err(|e| Error::io("read", &file, e))?;
        let damaged =
            |e: serde_json::Error| changed(&file, "the manifest that was written", e.to_string());
        let value: serde_json::Value = serde_json::from_str(&text).map_err(damaged)?;
        if value["format"] != FORMAT {
            return Err(Error::file(
                &file,
                format!("the format \"{FORMAT}\""),
                value["format"].to_string(),
                "prepare the text again with this program",
            ));
        }
        let mut manifest: Manifest = serde_json::from_value(value).map_err(damaged)?;
        let expected = format!("a text of checksum {}", manifest.checksum);
        if manifest.seal() != text {
            return Err(changed(&file, expected, "another one"));
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
            return Err(changed(&path, "tokens of 2 or 4 bytes", width.to_string()));
        }
        for shard in &self.manifest.shards {
            let tokens = shard.counts.tokens.checked_mul(width);
            let index = (shard.counts.documents).checked_mul(size_of::<Entry>() as u64);
            expect_size(&self.file(shard, "bin"), tokens)?;
            expect_size(&self.file(shard, "idx"), index)?;
        }
        Ok(())
    }

    fn shards(&self, side: Side) -> impl Iterator<Item = &Shard> {
        self.manifest.shards.iter().filter(move |s| s.side == side)
    }

    fn file(&self, shard: &Shard, extension: &str) -> PathBuf {
        self.path.join(format!("{}.{extension}", shard.name))
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the total size of all token files in bytes.
    pub fn bytes(&self) -> u64 {
        let tokens: u64 = self.manifest.shards.iter().map(|s| s.counts.tokens).sum();
        tokens * u64::from(self.manifest.token_bytes)
    }

    /// Compares the digest of every file with the manifest.
    ///
    /// # Errors
    /// Returns an error for a file that cannot be read or whose digest differs.
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
            let read = File::open(path).and_then(|file| hash.update_reader(file).map(drop));
            read.map_err(|e| Error::io("read", path, e))?;
            expect_digest(path, expected, hash.finalize().to_hex().as_str())
        })?;
        let mut sides = Side::BOTH.into_iter();
        sides.try_for_each(|side| self.documents(side).map(drop))
    }

    /// Returns the names and contents of the tokenizer's files after a check of their digests; an empty list if each byte
    /// is a token.
    ///
    /// # Errors
    /// When a file is missing, or its digest differs.
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

    /// Returns the tokenizer of the folder.
    ///
    /// # Errors
    /// As [`tokenizer_files`](Self::tokenizer_files); also, in a build without the feature `text`, unless each byte is a
    /// token.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.tokenizer_files()?;
        match self.manifest.tokenizer.as_str() {
            BYTES => Ok(Tokenizer::bytes()),
            _ => Tokenizer::open(&self.path.join(TOKENIZER_FILE)),
        }
    }

    /// Returns the tokens of one side, as memory-mapped files.
    pub(super) fn tokens(&self, side: Side) -> Result<Tokens> {
        let mut tokens = Tokens::default();
        for shard in self.shards(side) {
            let n = shard.counts.tokens;
            if n > 0 {
                let path = self.file(shard, "bin");
                let store = Store::map(&path, n, self.manifest.token_bytes)?;
                tokens.push(Arc::new(store), 0..n as usize);
            }
        }
        Ok(tokens)
    }

    /// Returns the tokens of document `i` of one side, including the tokens before and after its text.
    ///
    /// # Errors
    /// When there is no such document, or its shard cannot be read.
    pub fn document(&self, side: Side, i: usize) -> Result<Vec<i32>> {
        let documents = self.documents(side)?;
        let Some(document) = documents.get(i) else {
            let expected = format!("a document below {}", documents.len());
            let got = i.to_string();
            return Err(Error::invalid("data", expected, got, "choose another"));
        };
        let begin = i.checked_sub(1).map_or(0, |i| documents[i].end);
        let mut tokens = Vec::new();
        self.tokens(side)?.copy(begin..document.end, &mut tokens);
        Ok(tokens)
    }

    /// Reads all tokens of one side into memory.
    ///
    /// # Errors
    /// When a shard cannot be read.
    pub fn side(&self, side: Side) -> Result<Vec<i32>> {
        let (tokens, mut all) = (self.tokens(side)?, Vec::new());
        tokens.copy(0..tokens.len(), &mut all);
        Ok(all)
    }

    /// Returns the documents of one side; the ends are positions in the concatenation of all its shards.
    ///
    /// # Errors
    /// When an index file cannot be read or is damaged.
    pub fn documents(&self, side: Side) -> Result<Vec<Entry>> {
        let mut documents = Vec::new();
        let mut before = 0;
        for shard in self.shards(side) {
            let path = self.file(shard, "idx");
            let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            expect_digest(&path, &shard.index, &digest(&bytes))?;
            let mut last = 0;
            for entry in bytes.chunks_exact(size_of::<Entry>()) {
                let mut entry: Entry = bytemuck::pod_read_unaligned(entry);
                let sources = self.manifest.sources.len() as u64;
                if entry.end < last || entry.source >= sources {
                    let got = format!("{entry:?}");
                    return Err(changed(&path, "documents in increasing order", got));
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
    Err(changed(path, format!("the digest {expected}"), got))
}
