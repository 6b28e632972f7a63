//! Reads the documents of a task: JSON lines, plain or compressed with zstd or gzip.

use super::question::{Question, TASKS, Task, find};
use crate::data::read_text;
use crate::error::{Error, Result};
use crate::report::in_plain_words;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Number of characters of a document that an error shows.
const SHOWN: usize = 300;

/// A line of the file: the document's number and its fields.
#[derive(Deserialize)]
struct Line {
    doc_id: Value,
    doc: Value,
}

/// Reads the first `limit` questions of a task (all if 0) from `folder`, each with the number of its document.
///
/// # Errors
/// When the file is missing or damaged, or a line is not a document of this task; the error names the line.
pub fn read(folder: &Path, task: &Task, limit: usize) -> Result<Vec<(Value, Question)>> {
    let path = file(folder, task)?;
    let text = read_text(&path)?;
    let most = if limit == 0 { usize::MAX } else { limit };
    let mut found = Vec::new();
    let lines = text.lines().enumerate();
    for (number, line) in lines.filter(|(_, l)| !l.trim().is_empty()).take(most) {
        let bad = |got: String| {
            Error::file(
                &path,
                format!("a document of {} in line {}", task.name, number + 1),
                got,
                "write {\"doc_id\": 0, \"doc\": {…}} with the fields that docs/evaluation.md names, and the number of one of the answers as the right one",
            )
        };
        let line: Line =
            serde_json::from_str(line).map_err(|e| bad(in_plain_words(&e.to_string())))?;
        match task.question(&line.doc) {
            Some(question) => found.push((line.doc_id, question)),
            None => {
                let mut got = line.doc.to_string();
                if let Some((end, _)) = got.char_indices().nth(SHOWN) {
                    got.replace_range(end.., "…");
                }
                return Err(bad(got));
            }
        }
    }
    match found.is_empty() {
        true => Err(Error::file(
            &path,
            "documents",
            "none",
            "copy the file again",
        )),
        false => Ok(found),
    }
}

/// Returns the tasks with these names; for `all`, those whose documents are in `folder`.
///
/// # Errors
/// When a name is unknown, or for `all` the folder has no documents.
pub fn choose(names: &[String], folder: &Path) -> Result<Vec<&'static Task>> {
    if names == ["all"] {
        let there = TASKS.iter().filter(|t| file(folder, t).is_ok());
        let there: Vec<&Task> = there.collect();
        return match there.is_empty() {
            false => Ok(there),
            true => Err(Error::file(
                folder,
                "documents of benchmarks, such as hellaswag.jsonl or hellaswag.jsonl.zst",
                "none",
                "docs/evaluation.md lists the files and their content",
            )),
        };
    }
    let mut found: Vec<&'static Task> = Vec::new();
    // Empty names, as in `a, b,`, are skipped; a benchmark that is named twice counts once.
    let names = names.iter().map(|name| name.trim());
    for name in names.filter(|name| !name.is_empty()) {
        let task = find(name)?;
        if found.iter().all(|other| other.name != task.name) {
            found.push(task);
        }
    }
    match found.is_empty() {
        false => Ok(found),
        true => Err(Error::usage(
            "tasks",
            "names of benchmarks, or all",
            "none",
            "name at least one, such as piqa",
        )),
    }
}

/// Returns the file of a task in `folder`.
///
/// # Errors
/// When there is no such file.
pub(super) fn file(folder: &Path, task: &Task) -> Result<PathBuf> {
    let names = ["jsonl", "jsonl.zst", "jsonl.gz"].map(|e| format!("{}.{e}", task.file));
    let paths = names.iter().map(|n| folder.join(n));
    paths.into_iter().find(|p| p.is_file()).ok_or_else(|| {
        Error::file(
            folder,
            names.join(" or "),
            "none of them",
            "set --task-data to the folder of the tasks' documents, or leave this task out",
        )
    })
}
