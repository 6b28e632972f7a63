//! Records of measurements on machines: one JSON object per line and one file per machine, `PREFIX-MACHINE.jsonl`. Files
//! can be merged: of two records with the same key, the later one is kept.

use crate::error::{Error, Result};
use crate::report::files::replace;
use crate::report::in_plain_words;
use serde::{Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A record, which is one line of such a file.
pub trait Entry: Serialize + DeserializeOwned {
    /// Prefix of the file names.
    const PREFIX: &'static str;
    /// Explanation of a line that is not a valid record, for errors.
    const BROKEN: &'static str;
    /// Type of the key that identifies the measured quantity.
    type Key: Ord;

    /// Returns the key of the record; a later record with the same key replaces it.
    fn key(&self) -> Self::Key;
    /// Returns the name of the machine on which it was measured.
    fn machine(&self) -> &str;
    /// Returns the time of the measurement, in the format of [`now`].
    fn date(&self) -> &str;
}

/// The records in a folder.
pub struct Records<R: Entry> {
    folder: PathBuf,
    by_key: BTreeMap<R::Key, R>,
}

impl<R: Entry> Records<R> {
    /// Reads all files with the prefix in `folder`; there are no records if the folder does not exist.
    ///
    /// # Errors
    /// When a file cannot be read, or a line is not a record.
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
            let own = name
                .strip_prefix(R::PREFIX)
                .is_some_and(|rest| rest.starts_with('-'));
            if own && name.ends_with(".jsonl") {
                records.read(&path)?;
            }
        }
        Ok(records)
    }

    /// Adds the records of a file; later records replace earlier ones with the same key. Nothing is written.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not a record.
    pub fn read(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        self.read_text(path, &text)
    }

    /// Adds the records of a text; `path` names it in errors.
    ///
    /// # Errors
    /// When a line is not a record.
    pub fn read_text(&mut self, path: &Path, text: &str) -> Result<()> {
        for (i, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let record: R = serde_json::from_str(line).map_err(|e| {
                Error::file(
                    path,
                    "one record a line",
                    format!("line {}: {}", i + 1, in_plain_words(&e.to_string())),
                    R::BROKEN,
                )
            })?;
            self.insert(record);
        }
        Ok(())
    }

    /// Adds a record, unless there is a later one with the same key.
    pub fn insert(&mut self, record: R) {
        let key = record.key();
        if self
            .by_key
            .get(&key)
            .is_none_or(|known| known.date() <= record.date())
        {
            self.by_key.insert(key, record);
        }
    }

    /// Returns the newest record with this key.
    pub fn get(&self, key: &R::Key) -> Option<&R> {
        self.by_key.get(key)
    }

    /// Returns all records, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = &R> {
        self.by_key.values()
    }

    /// Writes the file of one machine atomically.
    ///
    /// # Errors
    /// When the folder or file cannot be written.
    pub fn save(&self, machine: &str) -> Result<()> {
        std::fs::create_dir_all(&self.folder).map_err(|e| Error::io("create", &self.folder, e))?;
        let path = self.folder.join(file_name(R::PREFIX, machine));
        let mut text = String::new();
        for record in self.iter().filter(|record| record.machine() == machine) {
            let line = serde_json::to_string(record)
                .map_err(|e| Error::file(&path, "a record", e.to_string(), "a bug"))?;
            text.push_str(&line);
            text.push('\n');
        }
        replace(
            &self.folder,
            &file_name(R::PREFIX, machine),
            text.as_bytes(),
        )
    }

    /// Writes the files of all machines.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_all(&self) -> Result<()> {
        let machines: std::collections::BTreeSet<&str> =
            self.iter().map(|record| record.machine()).collect();
        machines
            .into_iter()
            .try_for_each(|machine| self.save(machine))
    }

    /// Adds the records of `files` to those in `folder`, writes them, and returns a message with the number of new
    /// records.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn merge(folder: &Path, files: &[PathBuf]) -> Result<String> {
        let mut records = Self::open(folder)?;
        let before = records.iter().count();
        files.iter().try_for_each(|file| records.read(file))?;
        records.save_all()?;
        let now = records.iter().count();
        Ok(format!("{now} records, {} of them new", now - before))
    }
}

/// Returns a file name such as "hardware-nvidia-h200.jsonl" for "NVIDIA H200".
fn file_name(prefix: &str, machine: &str) -> String {
    let words: Vec<String> = machine
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|w| !w.is_empty())
        .map(str::to_lowercase)
        .collect();
    format!("{prefix}-{}.jsonl", words.join("-"))
}

/// Returns the current time in UTC, such as 2026-01-31T23:59:59Z.
pub fn now() -> String {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    utc(seconds)
}

/// Converts seconds since 1970 to a UTC time. Days of the Gregorian calendar are counted in eras of 400 years that begin
/// on 1 March.
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

    #[test]
    fn dates_match_the_gregorian_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_798_761_599), "2026-12-31T23:59:59Z");
    }
}
