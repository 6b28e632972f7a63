//! The input files of a preparation, in order, and how to open them.

use super::Options;
use super::items::{Counted, Documents};
use super::lines::{JsonLines, Parts, Separated};
use crate::data::compressed::{self, decompressed, plain_name};
use crate::data::folder::{FORMAT, MANIFEST};
use crate::data::plain::PlainText;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// A file of documents.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub path: PathBuf,
    /// Name of the source for documents that do not name one.
    pub name: String,
    /// Whether all its documents are held out.
    pub validation: bool,
    pub bytes: u64,
    /// Time of the last modification in nanoseconds since 1970.
    pub nanoseconds: u128,
}

/// Endings of JSON lines files, which may be compressed.
const LINES: [&str; 2] = [".jsonl", ".json"];
const TEXT: &str = ".txt";

fn readable(path: &Path) -> bool {
    let name = plain_name(path);
    path.extension().is_some_and(|e| e == "parquet")
        || name.ends_with(TEXT)
        || LINES.iter().any(|ending| name.ends_with(ending))
}

/// Returns the supported file name endings, for messages.
fn endings() -> String {
    format!(
        ".parquet, {}, {TEXT}, and those of the last three compressed: {}",
        LINES.join(", "),
        compressed::ENDINGS.join(", ")
    )
}

/// Data formats that are not supported. If a folder has such files, an error is returned, because ignoring them would lose
/// documents.
const OTHER_FORMATS: &[&str] = &[
    ".bz2",
    ".xz",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".arrow",
    ".parquet.gz",
];

fn in_other_format(path: &Path) -> bool {
    let name = path.to_string_lossy().to_lowercase();
    OTHER_FORMATS.iter().any(|ending| name.ends_with(ending))
}

fn refuse_data_in_other_formats(folder: &Path) -> Result<()> {
    let files = super::super::text::files_under(folder, in_other_format)?;
    let Some(first) = files.first() else {
        return Ok(());
    };
    let (expected, first) = (format!("files that end in {}", endings()), first.display());
    let got = match files.len() {
        1 => format!("also {first}"),
        n => format!("{first} and {} more files of other formats", n - 1),
    };
    let help = "convert these files, or name each file to read";
    Err(Error::file(folder, expected, got, help))
}

/// Refuses the manifest of a folder of tokens: its JSON is no document.
fn refuse_tokens(file: &Path) -> Result<()> {
    if file.file_name() != Some(MANIFEST.as_ref()) {
        return Ok(());
    }
    let mut start = Vec::new();
    File::open(file)
        .and_then(|f| f.take(64).read_to_end(&mut start))
        .map_err(|e| Error::io("read", file, e))?;
    if !String::from_utf8_lossy(&start).contains(FORMAT) {
        return Ok(());
    }
    Err(Error::file(
        file,
        "a file of texts",
        "the manifest of tokens that `data prepare` made",
        "name the texts that they were made of, and choose an --out outside of the inputs",
    ))
}

/// Returns the files at `paths`: each file itself, and the files of each folder sorted by path.
pub(super) fn list(paths: &[PathBuf], validation: bool) -> Result<Vec<Input>> {
    let mut found = Vec::new();
    for path in paths {
        let meta = fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        if meta.is_dir() {
            let before = found.len();
            refuse_data_in_other_formats(path)?;
            for file in super::super::text::files_under(path, readable)? {
                refuse_tokens(&file)?;
                found.push(input(&file, path, validation)?);
            }
            if found.len() == before {
                let expected = format!("a folder with files that end in {}", endings());
                let help = "choose another folder, or name a file";
                return Err(Error::file(path, expected, "none", help));
            }
        } else if readable(path) {
            let folder = path.parent().unwrap_or(Path::new(""));
            found.push(input(path, folder, validation)?);
        } else {
            let expected = format!("a name that ends in {}", endings());
            let help = "rename the file, or convert it";
            return Err(Error::file(path, expected, "another one", help));
        }
    }
    Ok(found)
}

/// Returns the files for training and the files to hold out, each file once, and a message for each file that was left
/// out. A held-out file is not used for training, even if its folder is among the inputs.
pub(super) fn list_all(options: &Options) -> Result<(Vec<Input>, Vec<String>)> {
    let place =
        |input: &Input| fs::canonicalize(&input.path).unwrap_or_else(|_| input.path.clone());
    let (mut seen, mut all, mut left_out) = (BTreeMap::new(), Vec::new(), Vec::new());
    let mut held_out = list(&options.validation, true)?;
    let train = list(&options.inputs, false)?;
    held_out.retain(|input| seen.insert(place(input), true).is_none());
    for input in train {
        let path = input.path.display();
        match seen.get(&place(&input)) {
            Some(true) => left_out.push(format!("{path} is held out and is not used for training")),
            Some(false) => left_out.push(format!("{path} was named twice and is read once")),
            None => {
                seen.insert(place(&input), false);
                all.push(input);
            }
        }
    }
    all.extend(held_out);
    Ok((all, left_out))
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

/// Opens an input file.
///
/// # Errors
/// When its content does not match its file name, or the text column is missing.
pub(super) fn open(path: &Path, options: &Options) -> Result<Box<dyn Documents>> {
    if path.extension().is_some_and(|e| e == "parquet") {
        return open_parquet(path, options);
    }
    let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    let counted = Counted::default();
    let file = BufReader::with_capacity(1 << 18, counted.clone().of(file));
    let lines = !plain_name(path).ends_with(TEXT);
    let plain = PlainText::new(decompressed(path, file), !lines);
    let reader = Box::new(BufReader::with_capacity(1 << 18, plain));
    let parts = Parts::new(reader, counted);
    if lines {
        return Ok(Box::new(JsonLines::new(path, parts, options)?));
    }
    let separator = options.separator.clone();
    Ok(Box::new(Separated { parts, separator }))
}

#[cfg(feature = "text")]
fn open_parquet(path: &Path, options: &Options) -> Result<Box<dyn Documents>> {
    Ok(Box::new(super::parquet::Columns::open(path, options)?))
}

#[cfg(not(feature = "text"))]
fn open_parquet(path: &Path, _: &Options) -> Result<Box<dyn Documents>> {
    Err(crate::data::tokenizer::without_feature(path, "parquet"))
}
