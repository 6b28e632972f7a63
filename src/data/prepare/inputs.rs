//! The files that documents are read from, in order, and what reading one of them gives.

use super::Options;
use super::lines::{JsonLines, Separated};
use crate::data::frames::Frames;
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What stands at one place of a file.
#[derive(Debug, PartialEq)]
pub(super) enum Item {
    Document {
        text: String,
        /// Where it came from, if the file says so.
        source: Option<String>,
    },
    /// A document without text.
    Empty,
    /// `rows` documents, and what is wrong with them.
    Unreadable { rows: u64, what: String },
}

impl Item {
    /// Places it takes in its file.
    pub fn rows(&self) -> u64 {
        match self {
            Item::Unreadable { rows, .. } => *rows,
            _ => 1,
        }
    }

    /// A document, or none where there is nothing but white space.
    pub fn of(text: String, source: Option<String>) -> Self {
        match text.trim().is_empty() {
            true => Item::Empty,
            false => Item::Document { text, source },
        }
    }
}

/// The documents of a file, in order.
pub(super) trait Documents: Send {
    fn next(&mut self) -> Option<Item>;

    /// Passes over `rows` places that were read before.
    fn skip(&mut self, rows: u64) {
        let mut passed = 0;
        while passed < rows {
            match self.next() {
                Some(item) => passed = item.rows().saturating_add(passed),
                None => return,
            }
        }
    }

    /// Bytes of the file that were read.
    fn consumed(&self) -> u64;
}

/// A file of documents.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub path: PathBuf,
    /// Its source, where its documents name none.
    pub name: String,
    /// Every document of it is held out.
    pub validation: bool,
    pub bytes: u64,
    /// Of its last change, since 1970.
    pub nanoseconds: u128,
}

const ENDINGS: &[&str] = &[".parquet", ".jsonl", ".jsonl.zst", ".txt", ".txt.zst"];

fn readable(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// The files at `paths`: each itself, or those of a folder in the order of their paths.
pub(super) fn list(paths: &[PathBuf], validation: bool) -> Result<Vec<Input>> {
    let mut found = Vec::new();
    for path in paths {
        let meta = fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        if meta.is_dir() {
            let before = found.len();
            for file in super::super::text::files_under(path, readable)? {
                found.push(input(&file, path, validation)?);
            }
            if found.len() == before {
                let expected = format!("a folder with files that end in {}", ENDINGS.join(", "));
                let help = "choose another folder, or name a file";
                return Err(Error::file(path, expected, "none", help));
            }
        } else if readable(path) {
            let folder = path.parent().unwrap_or(Path::new(""));
            found.push(input(path, folder, validation)?);
        } else {
            let expected = format!("a name that ends in {}", ENDINGS.join(", "));
            let help = "rename the file, or convert it";
            return Err(Error::file(path, expected, "another one", help));
        }
    }
    Ok(found)
}

fn input(path: &Path, folder: &Path, validation: bool) -> Result<Input> {
    let meta = fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
    let changed = meta.modified().map_err(|e| Error::io("read", path, e))?;
    let since = changed.duration_since(std::time::UNIX_EPOCH);
    let name = path.strip_prefix(folder).unwrap_or(path);
    Ok(Input {
        path: path.to_path_buf(),
        name: name.display().to_string(),
        validation,
        bytes: meta.len(),
        nanoseconds: since.map_or(0, |d| d.as_nanos()),
    })
}

/// Opens a file.
///
/// # Errors
/// When it is not what its name says, or lacks the column of the text.
pub(super) fn open(path: &Path, options: &Options) -> Result<Box<dyn Documents>> {
    let name = path.to_string_lossy();
    if name.ends_with(".parquet") {
        return open_parquet(path, options);
    }
    let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    let counted = Counted::default();
    let file = BufReader::with_capacity(1 << 18, counted.clone().of(file));
    let reader: Box<dyn BufRead + Send> = match name.ends_with(".zst") {
        true => Box::new(BufReader::with_capacity(1 << 18, Frames::new(file))),
        false => Box::new(file),
    };
    if name.trim_end_matches(".zst").ends_with(".jsonl") {
        return Ok(Box::new(JsonLines::new(path, reader, counted, options)?));
    }
    let separator = options.separator.clone();
    Ok(Box::new(Separated::new(reader, counted, separator)))
}

#[cfg(feature = "text")]
fn open_parquet(path: &Path, options: &Options) -> Result<Box<dyn Documents>> {
    Ok(Box::new(super::parquet::Columns::open(path, options)?))
}

#[cfg(not(feature = "text"))]
fn open_parquet(path: &Path, _: &Options) -> Result<Box<dyn Documents>> {
    Err(crate::data::tokenizer::without_feature(path, "parquet"))
}

/// Counts the bytes that are read.
#[derive(Clone, Default)]
pub(super) struct Counted(Arc<AtomicU64>);

impl Counted {
    fn of<R: Read>(self, inner: R) -> Counting<R> {
        Counting { inner, count: self }
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

struct Counting<R> {
    inner: R,
    count: Counted,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.0.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}
