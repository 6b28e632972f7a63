//! `metrics.jsonl`: one object an optimizer step, appended as the step ends.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What one optimizer step did. Losses are in nats per token; those that are not finite are null.
/// `seconds`, `tokens_per_second` and `saved` are the only fields that differ between two equal runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Cross-entropy of the step's tokens.
    pub loss: Option<f64>,
    /// Auxiliary loss, its coefficient included.
    pub auxiliary_loss: Option<f64>,
    /// z-loss, its coefficient included.
    pub z_loss: Option<f64>,
    /// Norm of the whole gradient before clipping.
    pub gradient_norm: Option<f64>,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// False if the step was left out because something in it was not finite.
    pub applied: bool,
    /// Rows routed to each expert, for each MoE layer: `[L_moe][E]`.
    pub load: Vec<Vec<u64>>,
    /// Mean entropy of the router's probabilities in nats, for each MoE layer: `[L_moe]`.
    pub router_entropy: Vec<Option<f64>>,
    /// Share of (token, expert) pairs that were not chosen, the mean over the MoE layers.
    #[serde(default)]
    pub sparsity: Option<f64>,
    /// What the router keeps beside matrices, by name, for each MoE layer, after the step: the bias
    /// of `lossfree` `[L_moe][E]`, λ of `remoe` `[L_moe][1]`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub router_state: BTreeMap<String, Vec<Vec<f64>>>,
    /// Cross-entropy of the validation sequences, at steps that evaluate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Benchmark scores, at steps that take them: of each task `acc`, `improvement` and, where it has them, `acc_norm`
    /// and `perplexity`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, BTreeMap<String, f64>>,
    /// The same by source of the text, where there are several.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub validation_by_source: BTreeMap<String, f64>,
    /// Time of the step, without evaluation and saving.
    pub seconds: f64,
    /// Tokens of the step divided by its seconds.
    pub tokens_per_second: f64,
    /// The checkpoints that were finished since the record before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub saved: Vec<Saved>,
}

/// What saving a checkpoint took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Steps done before it.
    pub step: u64,
    /// Of its arrays.
    pub bytes: u64,
    /// Whether training went on meanwhile.
    pub background: bool,
    /// For which training stood still: to wait for the save before, to copy, or to write where that was in the foreground.
    pub blocked_seconds: f64,
    /// From the first file to the checkpoint under its name.
    pub write_seconds: f64,
}

/// The file of a run, open for appending.
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log at `path`, or a new one, and cuts off what follows `step`: records of steps
    /// that a resumed run does again, and a line that a crash left unfinished.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let io = |e| Error::io("open", path, e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let mut end = 0;
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io)?;
            let whole = line.ends_with(b"\n");
            match serde_json::from_slice::<Record>(&line) {
                Ok(record) if whole && record.step <= step => end += read as u64,
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

    /// Appends one record; it is with the operating system when this returns.
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

/// The records of a log, up to the first line that is not one.
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
    fn reopening_cuts_later_steps_and_a_torn_line() {
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
}
