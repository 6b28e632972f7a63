//! The files that documents are read from, in order, and what reading one of them gives.

use super::Options;
use super::items::{Counted, Documents};
use super::lines::{JsonLines, Separated};
use crate::data::frames::Frames;
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

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
