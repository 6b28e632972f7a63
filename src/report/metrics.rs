//! `metrics.jsonl`: one JSON object per optimizer step, appended when the step ends.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The results of one optimizer step. Losses are in nats per token; losses that are not finite are null. Only `seconds`,
/// `tokens_per_second` and `saved` differ between two equal runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number of steps done, including this one.
    pub step: u64,
    /// Number of tokens trained on so far.
    pub tokens: u64,
    /// Cross-entropy of the step's tokens.
    pub loss: Option<f64>,
    /// Auxiliary loss, multiplied by its coefficient.
    pub auxiliary_loss: Option<f64>,
    /// z-loss, multiplied by its coefficient.
    pub z_loss: Option<f64>,
    /// Norm of the gradient of all parameters before clipping.
    pub gradient_norm: Option<f64>,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// False if the step was skipped because of a non-finite value.
    pub applied: bool,
    /// Number of rows routed to each expert, for each MoE layer: `[L_moe][E]`.
    pub load: Vec<Vec<u64>>,
    /// Mean entropy of the router's probabilities in nats, for each MoE layer: `[L_moe]`.
    pub router_entropy: Vec<Option<f64>>,
    /// Share of (token, expert) pairs that were not chosen; mean over the MoE layers.
    #[serde(default)]
    pub sparsity: Option<f64>,
    /// State of the router other than matrices, by name, for each MoE layer, after the step: the bias of `lossfree`
    /// `[L_moe][E]`, λ of `remoe` `[L_moe][1]`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub router_state: BTreeMap<String, Vec<Vec<f64>>>,
    /// Cross-entropy of the validation sequences, for steps with an evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Benchmark scores, for steps with scores: for each task `acc`, `improvement` and, if the task has them, `acc_norm`
    /// and `perplexity`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, BTreeMap<String, f64>>,
    /// Validation loss of each source of the text, if there are several.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub validation_by_source: BTreeMap<String, f64>,
    /// Time of the step in seconds, without evaluation and saving.
    pub seconds: f64,
    /// Tokens of the step divided by its seconds.
    pub tokens_per_second: f64,
    /// The checkpoints that were finished after the previous record.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub saved: Vec<Saved>,
}

/// The cost of saving a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Number of steps done before it.
    pub step: u64,
    /// Size of its arrays in bytes.
    pub bytes: u64,
    /// Whether training continued during the save.
    pub background: bool,
    /// Seconds for which training waited: for the previous save, for the copy, or for the write if it was not in the
    /// background.
    pub blocked_seconds: f64,
    /// Seconds from the start of the first file to the final rename.
    pub write_seconds: f64,
}

/// The log of a run, open for appending.
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log at `path`, or creates it, and removes everything after `step`: records of steps that a resumed run
    /// repeats, and a line that a crash left incomplete.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let io = |e| Error::io("open", path, e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let (mut end, mut number) = (0, 0);
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        let parsed = |line: &[u8]| serde_json::from_slice::<Record>(line);
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io)?;
            number += 1;
            let whole = line.ends_with(b"\n");
            match parsed(&line) {
                Ok(record) if whole && record.step <= step => end += read as u64,
                Err(_) if whole => {
                    // The end of a log that was cut off, unless records follow: these must not be lost.
                    let mut rest = reader.split(b'\n').map_while(std::io::Result::ok);
                    let Some(next) = rest.position(|line| parsed(&line).is_ok()) else {
                        break;
                    };
                    return Err(Error::file(
                        path,
                        "a record on every line",
                        format!(
                            "none on line {number}, and one on line {}",
                            number + 1 + next
                        ),
                        "correct or remove the line",
                    ));
                }
                _ => break,
            }
        }
        file.set_len(end).map_err(io)?;
        let mut log = Log {
            path: path.to_path_buf(),
            file,
        };
        log.file.seek(SeekFrom::Start(end)).map_err(io)?;
        Ok(log)
    }

    /// Appends one record. When this function returns, the operating system has the data.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_string(record).map_err(|e| {
            Error::file(
                &self.path,
                "a record",
                e.to_string(),
                "report this as a bug",
            )
        })?;
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .map_err(|e| Error::io("write", &self.path, e))
    }
}

/// Returns the records of a log, up to the first line that is not a record.
pub fn read(path: &Path) -> Result<impl Iterator<Item = Record>> {
    let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    Ok(BufReader::new(file)
        .lines()
        .map_while(|line| serde_json::from_str(&line.ok()?).ok()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(step: u64) -> Record {
        Record {
            step,
            tokens: step * 4096,
            loss: Some(5.0 / step as f64),
            auxiliary_loss: Some(0.01),
            z_loss: Some(0.0),
            gradient_norm: None,
            learning_rate: 1e-3,
            applied: true,
            load: vec![vec![3, 1]],
            router_entropy: vec![Some(0.5)],
            sparsity: Some(0.5),
            router_state: BTreeMap::from([("bias".into(), vec![vec![1e-3, -1e-3]])]),
            validation_loss: (step % 2 == 0).then_some(2.5),
            tasks: BTreeMap::new(),
            validation_by_source: BTreeMap::new(),
            seconds: 0.25,
            tokens_per_second: 16384.0,
            saved: Vec::new(),
        }
    }

    #[test]
    fn reopening_removes_later_steps_and_an_incomplete_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        for step in 1..=5 {
            log.append(&record(step)).unwrap();
        }
        drop(log);
        let whole = std::fs::read(&path).unwrap();
        for torn in ["", "{\"step\":6,\"lo", "{\"step\":3}", "\u{0}\u{0}"] {
            std::fs::write(&path, [&whole[..], torn.as_bytes()].concat()).unwrap();
            let mut log = Log::open(&path, 3).unwrap();
            log.append(&record(4)).unwrap();
            log.append(&record(5)).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        let read: Vec<Record> = read(&path).unwrap().collect();
        assert_eq!(read, (1..=5).map(record).collect::<Vec<_>>());
        Log::open(&path, 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn a_line_that_is_no_record_before_others_is_an_error_and_nothing_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        log.append(&record(1)).unwrap();
        log.file
            .write_all(b"{\"step\": 2, \"loss\": null}\n")
            .unwrap();
        log.append(&record(3)).unwrap();
        drop(log);
        let whole = std::fs::read(&path).unwrap();
        let error = Log::open(&path, 3).map(drop).unwrap_err().to_string();
        assert!(
            error.contains("none on line 2, and one on line 3"),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }
}
