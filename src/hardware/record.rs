//! What ran on which GPU: one JSON object a line, one file a GPU model, under `benches/results/`.
//!
//! A record is keyed by GPU model, task, and the hash of the kernel's compiled code, so that a changed kernel counts as
//! unproven. Files merge: of two records with one key the later stays.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// It agrees, or was timed.
    Passed,
    /// It gave a wrong result, or was refused by the GPU.
    Failed,
    /// It did not end within its time and was killed.
    TimedOut,
    /// The machine has no such instrument, or does not let it work.
    Unavailable,
}

/// One task on one GPU with one build of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub gpu: String,
    pub task: String,
    /// Hash of the kernel's compiled code.
    pub code: String,
    pub ending: Ending,
    /// What failed, or what was compared.
    pub detail: String,
    /// Numbers with their units in the names.
    pub measured: serde_json::Value,
    /// UTC.
    pub date: String,
    pub commit: String,
    pub driver: String,
    /// Release of the operating system's kernel.
    pub system: String,
    /// Seconds the task took.
    pub seconds: f64,
    pub before: serde_json::Value,
    pub after: serde_json::Value,
}

/// What makes a record the answer to a task.
pub type Key = (String, String, String);

impl Record {
    pub fn key(&self) -> Key {
        (self.gpu.clone(), self.task.clone(), self.code.clone())
    }
}

/// The records of a folder.
pub struct Records {
    folder: PathBuf,
    by_key: BTreeMap<Key, Record>,
}

impl Records {
    /// Reads every `hardware-*.jsonl` of `folder`; none where the folder does not exist.
    ///
    /// # Errors
    /// When a file cannot be read, or a line is no record.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut records = Self {
            folder: folder.to_path_buf(),
            by_key: BTreeMap::new(),
        };
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(records),
            Err(e) => return Err(Error::io("list", folder, e)),
        };
        for entry in entries {
            let path = entry.map_err(|e| Error::io("list", folder, e))?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if name.starts_with("hardware-") && name.ends_with(".jsonl") {
                records.read(&path)?;
            }
        }
        Ok(records)
    }

    /// Takes in the records of a file; later ones replace earlier ones of the same key. Nothing is written.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is no record.
    pub fn read(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        for (i, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let record: Record = serde_json::from_str(line).map_err(|e| {
                Error::file(
                    path,
                    "one record a line",
                    format!("line {}: {e}", i + 1),
                    "remove the line; its task runs again",
                )
            })?;
            self.insert(record);
        }
        Ok(())
    }

    /// Adds a record, unless one of the same key is later.
    pub fn insert(&mut self, record: Record) {
        let key = record.key();
        if self
            .by_key
            .get(&key)
            .is_none_or(|known| known.date <= record.date)
        {
            self.by_key.insert(key, record);
        }
    }

    pub fn get(&self, key: &Key) -> Option<&Record> {
        self.by_key.get(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Record> {
        self.by_key.values()
    }

    /// Writes the file of one GPU model, whole or not at all.
    ///
    /// # Errors
    /// When the folder or file cannot be written.
    pub fn save(&self, gpu: &str) -> Result<()> {
        std::fs::create_dir_all(&self.folder).map_err(|e| Error::io("create", &self.folder, e))?;
        let path = self.folder.join(file_name(gpu));
        let mut text = String::new();
        for record in self.iter().filter(|record| record.gpu == gpu) {
            let line = serde_json::to_string(record)
                .map_err(|e| Error::file(&path, "a record", e.to_string(), "a bug"))?;
            text.push_str(&line);
            text.push('\n');
        }
        let draft = path.with_extension("draft");
        std::fs::write(&draft, text).map_err(|e| Error::io("write", &draft, e))?;
        std::fs::rename(&draft, &path).map_err(|e| Error::io("rename", &draft, e))
    }

    /// Writes the file of every GPU model.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_all(&self) -> Result<()> {
        let gpus: std::collections::BTreeSet<&str> =
            self.iter().map(|record| record.gpu.as_str()).collect();
        gpus.into_iter().try_for_each(|gpu| self.save(gpu))
    }
}

/// "hardware-nvidia-h200.jsonl" of "NVIDIA H200".
fn file_name(gpu: &str) -> String {
    let words: Vec<String> = gpu
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|w| !w.is_empty())
        .map(str::to_lowercase)
        .collect();
    format!("hardware-{}.jsonl", words.join("-"))
}

/// The time now as 2026-01-31T23:59:59Z.
pub fn now() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    utc(seconds)
}

/// Days of the Gregorian calendar, counted in eras of 400 years that begin on 1 March.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (
        day - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = era * 400 + year + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(task: &str, code: &str, date: &str) -> Record {
        Record {
            gpu: "NVIDIA H200".into(),
            task: task.into(),
            code: code.into(),
            ending: Ending::Passed,
            detail: String::new(),
            measured: serde_json::Value::Null,
            date: date.into(),
            commit: "abc".into(),
            driver: "580".into(),
            system: "6.1".into(),
            seconds: 1.0,
            before: serde_json::Value::Null,
            after: serde_json::Value::Null,
        }
    }

    #[test]
    fn a_changed_kernel_is_unproven() {
        let mut records = Records {
            folder: PathBuf::new(),
            by_key: BTreeMap::new(),
        };
        records.insert(record("agrees", "old", "2026-01-01"));
        assert!(records.get(&record("agrees", "old", "").key()).is_some());
        assert!(records.get(&record("agrees", "new", "").key()).is_none());
    }

    #[test]
    fn files_merge_and_the_later_of_one_key_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (here, there) = (folder.path().join("here"), folder.path().join("there"));
        let mut first = Records::open(&here).unwrap();
        first.insert(record("a", "1", "2026-01-02"));
        first.insert(record("b", "1", "2026-01-02"));
        first.save_all().unwrap();
        let mut second = Records::open(&there).unwrap();
        second.insert(Record {
            ending: Ending::Failed,
            ..record("a", "1", "2026-01-01")
        });
        second.insert(Record {
            detail: "later".into(),
            ..record("b", "1", "2026-01-03")
        });
        second.insert(record("c", "1", "2026-01-01"));
        second.save_all().unwrap();

        let mut merged = Records::open(&here).unwrap();
        merged
            .read(&there.join("hardware-nvidia-h200.jsonl"))
            .unwrap();
        merged.save_all().unwrap();
        let merged: Vec<Record> = Records::open(&here).unwrap().iter().cloned().collect();
        assert_eq!(
            merged.iter().map(|r| r.task.as_str()).collect::<Vec<_>>(),
            ["a", "b", "c"]
        );
        assert_eq!(
            (merged[0].ending, merged[1].detail.as_str()),
            (Ending::Passed, "later")
        );
        assert_eq!(
            std::fs::read_dir(&here).unwrap().count(),
            1,
            "a draft was left"
        );
    }

    #[test]
    fn a_broken_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("hardware-x.jsonl"), "\n{\"gpu\":1}\n").unwrap();
        let text = Records::open(folder.path()).err().unwrap().to_string();
        assert!(
            text.contains("hardware-x.jsonl") && text.contains("line 2"),
            "{text}"
        );
    }

    #[test]
    fn dates_are_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_798_761_599), "2026-12-31T23:59:59Z");
    }
}
