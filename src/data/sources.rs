//! The text by source: the files of a folder, or the documents of one file in runs of equal number.
//! What no file name says, such as the year of a speech, is not known here.

use super::{DOCUMENT_END, in_vocabulary, text};
use crate::config::{DataConfig, ModelConfig};
use crate::error::{Error, Result};
use std::path::Path;

/// Most sources: more files than this are taken together in runs, as documents are.
const MOST: usize = 12;

/// A part of the text.
pub struct Source {
    /// Its file, or the places of its documents, from 1.
    pub name: String,
    text: Vec<u8>,
    sequence_length: usize,
}

impl Source {
    /// At most `most` windows of its text, [n, S + 1] row-major, evenly spread, and n. Windows share
    /// no predicted token.
    pub fn windows(&self, most: usize) -> (Vec<i32>, usize) {
        let s = self.sequence_length;
        let all = (self.text.len() - 1) / s;
        let n = most.min(all);
        let starts = (0..n).map(|k| k * all / n * s);
        let windows = starts.flat_map(|start| &self.text[start..=start + s]);
        (windows.map(|byte| i32::from(*byte)).collect(), n)
    }
}

/// The sources of `config.source`, documents held out included; and the names of those that are
/// shorter than one sequence and the byte after it, which are left out.
///
/// # Errors
/// As [`Corpus::load`](super::Corpus::load); and when nothing is left.
pub fn sources(config: &DataConfig, model: &ModelConfig) -> Result<(Vec<Source>, Vec<String>)> {
    let files = text::read_files(config)?;
    let mut groups: Vec<(String, Vec<String>)> = match files.len() {
        2..=MOST => {
            let named = files.into_iter().map(|(path, documents)| {
                let folder = Path::new(&config.source);
                let name = path.strip_prefix(folder).unwrap_or(&path);
                (name.display().to_string(), documents)
            });
            named.collect()
        }
        n => {
            let documents: Vec<String> = files.into_iter().flat_map(|f| f.1).collect();
            runs(
                documents,
                if n == 1 {
                    "documents"
                } else {
                    "documents of files"
                },
            )
        }
    };
    let mut short = Vec::new();
    let mut found = Vec::new();
    for (name, documents) in groups.drain(..) {
        let text = documents.join(DOCUMENT_END).into_bytes();
        if text.len() <= model.sequence_length {
            short.push(name);
            continue;
        }
        in_vocabulary(&name, &text, model.vocab_size)?;
        found.push(Source {
            name,
            text,
            sequence_length: model.sequence_length,
        });
    }
    if found.is_empty() {
        return Err(Error::invalid(
            "data",
            format!(
                "a source of more than {} bytes, one sequence and the byte after it",
                model.sequence_length
            ),
            format!("{} shorter ones", short.len()),
            "add text",
        ));
    }
    Ok((found, short))
}

/// At most [`MOST`] runs of documents that differ in number by at most one.
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
    use crate::config::{Config, Layers};
    use std::fs;

    fn of(source: &Path, length: usize) -> Result<(Vec<Source>, Vec<String>)> {
        let mut layers = Layers::preset("tiny");
        layers.set = vec![format!("model.sequence_length={length}")];
        let mut config = Config::load(&layers, &|_| Ok(())).unwrap();
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
        let (found, short) = of(folder.path(), 4).unwrap();
        let names: Vec<&str> = found.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            (names, short),
            (vec!["a.txt", "b.txt"], vec!["c.txt".into()])
        );
        // Nine bytes hold two windows of four tokens and the byte after the last.
        assert_eq!(found[1].windows(9), (vec![i32::from(b'b'); 10], 2));
        let first = b"aaaa\n".map(i32::from).to_vec();
        assert_eq!(found[0].windows(1), (first, 1));
        assert!(of(folder.path(), 100).is_err());
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
        let all: Vec<u8> = found
            .iter()
            .map(|s| s.text.clone())
            .collect::<Vec<_>>()
            .join(DOCUMENT_END.as_bytes());
        assert_eq!(all, documents.join(DOCUMENT_END).into_bytes());
    }
}
