//! Records of tasks on GPUs: one JSON object per line, one file per GPU model, in `benches/results/`.
//!
//! The key of a record consists of the GPU model, the task, and the hash of the kernel's compiled code, so that a changed
//! kernel counts as unproven. Files can be merged: of two records with the same key, the later one is kept.

use crate::report::records::{self, Entry};
use serde::{Deserialize, Serialize};

/// The outcome of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The results agree, or the timing succeeded.
    Passed,
    /// The result was wrong, or the GPU returned an error.
    Failed,
    /// The task did not end within its time limit and was killed.
    TimedOut,
    /// The machine lacks the tool or the memory that the task needs, or does not permit its use.
    Unavailable,
}

/// One task on one GPU with one build of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Model of the GPU.
    pub gpu: String,
    /// Name of the task.
    pub task: String,
    /// Hash of the kernel's compiled code.
    pub code: String,
    /// How the task ended.
    pub ending: Ending,
    /// What failed, or what was compared.
    pub detail: String,
    /// Measured values; the names contain the units.
    pub measured: serde_json::Value,
    /// Time of the record, UTC.
    pub date: String,
    /// Commit of the program.
    pub commit: String,
    /// Version of the GPU's driver.
    pub driver: String,
    /// Release of the operating system's kernel.
    pub system: String,
    /// Seconds the task took.
    pub seconds: f64,
    /// Output of nvidia-smi before the task; null without nvidia-smi.
    pub before: serde_json::Value,
    /// Output of nvidia-smi after the task; null without nvidia-smi.
    pub after: serde_json::Value,
}

/// The records in a folder.
pub type Records = records::Records<Record>;

/// GPU model, task and code.
pub type Key = (String, String, String);

impl Entry for Record {
    const PREFIX: &'static str = "hardware";
    const BROKEN: &'static str = "remove the line; its task runs again";
    type Key = Key;

    fn key(&self) -> Key {
        (self.gpu.clone(), self.task.clone(), self.code.clone())
    }
    fn machine(&self) -> &str {
        &self.gpu
    }
    fn date(&self) -> &str {
        &self.date
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::path::Path;

    /// Returns a record of a task that passed.
    pub fn record(task: &str, code: &str, date: &str) -> Record {
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
        let mut records = Records::open(Path::new("/nonexistent")).unwrap();
        records.insert(record("agrees", "old", "2026-01-01"));
        assert!(records.get(&record("agrees", "old", "").key()).is_some());
        assert!(records.get(&record("agrees", "new", "").key()).is_none());
    }

    #[test]
    fn files_merge_and_the_later_record_of_a_key_is_kept() {
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
    fn the_error_for_an_invalid_line_names_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("hardware-x.jsonl"), "\n{\"gpu\":1}\n").unwrap();
        let text = Records::open(folder.path()).err().unwrap().to_string();
        assert!(
            text.contains("hardware-x.jsonl") && text.contains("line 2"),
            "{text}"
        );
    }
}
