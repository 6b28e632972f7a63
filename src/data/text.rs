//! Reads documents from the embedded corpus, a file, or a folder: UTF-8, plain (`.txt`) or compressed (`.txt.zst`,
//! `.txt.gz`).

use super::compressed::{decompressed, plain_name};
use super::plain::plain;
use crate::config::DataConfig;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// State of the Union addresses; see `data/embedded/README.md`.
const EMBEDDED: &[u8] = include_bytes!("../../data/embedded/sotu.txt.zst");

/// Returns the documents of `config.source`, in order, without documents that are only white space.
pub(super) fn read(config: &DataConfig) -> Result<Vec<String>> {
    Ok(read_files(config)?.into_iter().flat_map(|f| f.1).collect())
}

/// Returns the files of `config.source`, in order, each with its documents.
pub(super) fn read_files(config: &DataConfig) -> Result<Vec<(PathBuf, Vec<String>)>> {
    if config.source == "embedded" {
        let name = PathBuf::from("embedded corpus.zst");
        let text = utf8(&name, decompress(&name, EMBEDDED)?)?;
        let documents = split(&text, &name, config)?;
        return Ok(vec![(name, documents)]);
    }
    let read = |path: PathBuf| {
        let documents = split(&read_text(&path)?, &path, config)?;
        Ok((path, documents))
    };
    let paths = files(Path::new(&config.source))?;
    paths.into_iter().map(read).collect()
}

/// Returns the file itself, or the text files in a folder and its subfolders sorted by path.
fn files(source: &Path) -> Result<Vec<PathBuf>> {
    let meta = fs::metadata(source).map_err(|e| Error::io("read", source, e))?;
    if !meta.is_dir() {
        return Ok(vec![source.to_path_buf()]);
    }
    let found = files_under(source, is_text)?;
    if found.is_empty() {
        return Err(Error::file(
            source,
            "a folder with .txt, .txt.zst or .txt.gz files",
            "none",
            "choose another folder, or name a file; other formats: routegrad data prepare",
        ));
    }
    Ok(found)
}

/// Returns the files in a folder and its subfolders for which `wanted` is true, sorted by path.
pub(super) fn files_under(source: &Path, wanted: fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![source.to_path_buf()];
    let mut seen: BTreeSet<PathBuf> = fs::canonicalize(source).into_iter().collect();
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(|e| Error::io("list", &folder, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("list", &folder, e))?;
            let path = entry.path();
            // Editors and operating systems keep hidden copies beside a file: `.ipynb_checkpoints`, `._name`.
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if path.is_dir() {
                // A symbolic link may lead back to a parent folder.
                if fs::canonicalize(&path).is_ok_and(|path| seen.insert(path)) {
                    folders.push(path);
                }
            } else if wanted(&path) && path.is_file() {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn is_text(path: &Path) -> bool {
    plain_name(path).ends_with(".txt")
}

/// Decompresses `bytes`, the content of the file at `path`; returns `bytes` if the file is not compressed.
fn decompress(path: &Path, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    decompressed(path, bytes)
        .read_to_end(&mut out)
        .map_err(|e| {
            let help = "copy or compress the file again";
            Error::file(path, "complete compressed data", e.to_string(), help)
        })?;
    Ok(out)
}

/// Returns the text of a file, decompressed if its name ends in `.zst` or `.gz`.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    utf8(path, decompress(path, &bytes)?).map(plain)
}

fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let place = e.utf8_error().valid_up_to();
        let got = format!("a byte that is not UTF-8 at offset {place}");
        let help = "convert the file, for example with iconv";
        Error::file(path, "UTF-8 text", got, help)
    })
}

fn split(text: &str, path: &Path, config: &DataConfig) -> Result<Vec<String>> {
    if text.trim().is_empty() {
        let help = "remove it, or name another file";
        return Err(Error::file(path, "text", "an empty file", help));
    }
    if config.document_separator.is_empty() {
        return Ok(vec![text.to_owned()]);
    }
    let parts = text.split(&config.document_separator);
    let parts = parts.filter(|d| !d.trim().is_empty());
    Ok(parts.map(str::to_owned).collect())
}
