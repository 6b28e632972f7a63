//! Divides the text by source: the sources of a folder of tokens, the files of a folder of text, or runs of equal numbers
//! of documents of one file. Sources are known by file names only; other properties, such as the year of a speech, are not
//! known here.

use super::boundaries::{Boundaries, Text};
use super::limits::{DOCUMENT_END, in_vocabulary};
use super::part::Part;
use super::tokens::{Store, Tokens};
use super::{Folder, text};
use crate::config::{DataConfig, ModelConfig};
use crate::error::{Error, Result};
use crate::model::batch::Batch;
use std::collections::BTreeMap;
use std::path::Path;

/// Maximum number of sources. If there are more files, consecutive files form runs, as documents of one file do.
const MOST: usize = 12;

/// One source of the text.
pub struct Source {
    /// Name of its file, or the range of its documents, counted from 1.
    pub name: String,
    text: Text,
    sequence_length: usize,
}

impl Source {
    /// Returns at most `most` windows of its text, evenly spread. No two windows have a predicted token in common.
    pub fn windows(&self, most: usize) -> Batch {
        let s = self.sequence_length as u64;
        let all = ((self.text.len() - 1) / s) as usize;
        let (mut batch, n) = (Batch::default(), most.min(all));
        for k in 0..n {
            self.text.copy((k * all / n) as u64 * s, s, &mut batch);
        }
        batch
    }
}

/// Names of the sources that are left out.
#[derive(Default)]
pub struct LeftOut {
    /// Sources that are shorter than one sequence and the token after it.
    pub short: Vec<String>,
    /// Sources left out because there are too many; the largest are kept.
    pub smaller: Vec<String>,
}

/// Returns the sources of the text, and the names of those that are left out. Text includes the held-out documents;
/// folders of tokens contribute only the held-out documents.
///
/// # Errors
/// As [`Corpus::load`](super::Corpus::load); also when no source is left.
pub fn sources(config: &DataConfig, model: &ModelConfig) -> Result<(Vec<Source>, LeftOut)> {
    if config.sources().any(|s| Folder::is(Path::new(s))) {
        return of_folders(config, model);
    }
    let files = text::read_files(config)?;
    let groups: Vec<(String, Vec<String>)> = match files.len() {
        2..=MOST => {
            let named = files.into_iter().map(|(path, documents)| {
                let folder = Path::new(&config.source);
                let name = path.strip_prefix(folder).unwrap_or(&path);
                (name.display().to_string(), documents)
            });
            named.collect()
        }
        n => {
            let what = match n {
                1 => "documents",
                _ => "documents of files",
            };
            runs(files.into_iter().flat_map(|f| f.1).collect(), what)
        }
    };
    let mut left_out = LeftOut::default();
    let mut found = Vec::new();
    for (name, documents) in groups {
        let lengths = documents.iter().map(|d| d.len() + DOCUMENT_END.len());
        let boundaries = (config.document_boundaries).then(|| Boundaries::of_lengths(lengths));
        let text = documents.join(DOCUMENT_END).into_bytes();
        if text.len() <= model.sequence_length {
            left_out.short.push(name);
            continue;
        }
        in_vocabulary(&name, &text, model.vocab_size)?;
        found.push(Source {
            name,
            text: Text {
                tokens: Tokens::whole(Store::Bytes(text)),
                boundaries,
            },
            sequence_length: model.sequence_length,
        });
    }
    any(found, left_out, model)
}

fn any(
    found: Vec<Source>,
    left_out: LeftOut,
    model: &ModelConfig,
) -> Result<(Vec<Source>, LeftOut)> {
    if !found.is_empty() {
        return Ok((found, left_out));
    }
    let length = model.sequence_length;
    let expected =
        format!("a source of more than {length} tokens, one sequence and the token after it");
    let got = format!("{} shorter ones", left_out.short.len());
    Err(Error::invalid("data", expected, got, "add text"))
}

/// Returns the sources of folders of tokens: the [`MOST`] sources with the most held-out tokens.
fn of_folders(config: &DataConfig, model: &ModelConfig) -> Result<(Vec<Source>, LeftOut)> {
    // The tokens of each source, and the lengths of its documents.
    let mut by_name: BTreeMap<String, (Tokens, Vec<usize>)> = BTreeMap::new();
    for source in config.sources() {
        let part = Part::load(source, config, model)?;
        let mut begin = 0;
        for document in &part.documents {
            let name = &part.sources[document.source as usize];
            let (text, lengths) = by_name.entry(name.clone()).or_default();
            text.append(&part.validation.tokens, begin..document.end);
            lengths.push((document.end - begin) as usize);
            begin = document.end;
        }
    }
    let length = model.sequence_length;
    let (long, short): (Vec<_>, Vec<_>) = by_name
        .into_iter()
        .partition(|(_, (text, _))| text.len() > length as u64);
    let sources = long.into_iter().map(|(name, (tokens, lengths))| {
        let boundaries = (config.document_boundaries).then(|| Boundaries::of_lengths(lengths));
        Source {
            name,
            text: Text { tokens, boundaries },
            sequence_length: length,
        }
    });
    let mut found: Vec<Source> = sources.collect();
    found.sort_by_key(|s| std::cmp::Reverse(s.text.len()));
    let smaller = found.split_off(MOST.min(found.len()));
    let left_out = LeftOut {
        short: short.into_iter().map(|s| s.0).collect(),
        smaller: smaller.into_iter().map(|s| s.name).collect(),
    };
    any(found, left_out, model)
}

/// Divides documents into at most [`MOST`] runs whose sizes differ by at most one.
fn runs(documents: Vec<String>, what: &str) -> Vec<(String, Vec<String>)> {
    let (n, parts) = (documents.len(), documents.len().min(MOST));
    let mut rest = documents.into_iter();
    let run = |i: usize| {
        let (from, to) = (i * n / parts, (i + 1) * n / parts);
        let name = match to - from {
            1 => format!("{what} {to}"),
            _ => format!("{what} {}–{to}", from + 1),
        };
        (name, rest.by_ref().take(to - from).collect())
    };
    (0..parts).map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use std::fs;

    fn of(source: &Path, length: usize) -> Result<(Vec<Source>, LeftOut)> {
        let mut config = Config::tiny(&[&format!("model.sequence_length={length}")]);
        config.data.source = source.display().to_string();
        sources(&config.data, &config.model)
    }

    #[test]
    fn the_files_of_a_folder_are_its_sources_and_short_ones_are_named() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("b.txt", "bbbbbbbbb"),
            ("a.txt", "aaaa\n\n\naa"),
            ("c.txt", "cc"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let (found, left_out) = of(folder.path(), 4).unwrap();
        let names: Vec<&str> = found.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            (names, left_out.short),
            (vec!["a.txt", "b.txt"], vec!["c.txt".into()])
        );
        // Nine bytes hold two windows of four tokens and the byte after the last.
        let windows = found[1].windows(9);
        assert_eq!(windows.tokens, vec![i32::from(b'b'); 10]);
        assert_eq!(windows.sequences, 2);
        let windows = found[0].windows(1);
        assert_eq!(windows.tokens, b"aaaa\n".map(i32::from));
        assert_eq!(windows.sequences, 1);
        assert!(of(folder.path(), 100).is_err());
    }

    #[test]
    fn with_document_boundaries_attention_begins_anew_in_each_document_of_a_source() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "aa\n\n\nbbbbbbbbbb").unwrap();
        let mut config = Config::tiny(&["model.sequence_length=8"]);
        config.data.source = folder.path().display().to_string();
        fs::write(folder.path().join("b.txt"), "cc\n\n\ndddddddddd").unwrap();
        let first_key = |config: &Config| {
            let (found, _) = sources(&config.data, &config.model).unwrap();
            found[1].windows(1).first_key
        };
        assert_eq!(first_key(&config), None);
        config.data.document_boundaries = true;
        let begin = 2 + DOCUMENT_END.len() as i32;
        let expected = (0..8).map(|at| if at < begin { 0 } else { begin });
        assert_eq!(first_key(&config), Some(expected.collect()));
    }

    #[test]
    fn the_documents_of_one_file_are_cut_in_runs_that_hold_each_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.txt");
        let documents: Vec<String> = (0..30).map(|i| format!("document {i} of thirty")).collect();
        fs::write(&path, documents.join(DOCUMENT_END)).unwrap();
        let (found, _) = of(&path, 4).unwrap();
        assert_eq!(found.len(), MOST);
        assert_eq!(
            (&*found[0].name, &*found[MOST - 1].name),
            ("documents 1–2", "documents 28–30")
        );
        let text = |source: &Source| -> Vec<u8> {
            let mut tokens = Vec::new();
            source.text.tokens.copy(0..source.text.len(), &mut tokens);
            tokens.iter().map(|t| *t as u8).collect()
        };
        let all: Vec<Vec<u8>> = found.iter().map(text).collect();
        let all = all.join(DOCUMENT_END.as_bytes());
        assert_eq!(all, documents.join(DOCUMENT_END).into_bytes());
    }
}
