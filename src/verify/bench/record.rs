//! The records of the benchmark: one JSON object per line in `bench-MACHINE.jsonl`. Peers in other languages write the
//! same format.

use crate::report::records::{self, Entry};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Name of our implementation in the records.
pub const OURS: &str = "routegrad";
/// Name of a strided batch of equal groups in cuBLASLt; a dense product is one group.
pub const CUBLAS: &str = "cuBLASLt";
/// Name of `cublasGemmGroupedBatchedEx`, for groups of any size.
pub const CUBLAS_GROUPED: &str = "cuBLAS grouped";

/// A measurement of one implementation of one case on one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// GPU model, or CPU model.
    pub machine: String,
    /// cuda, cpu or sim.
    pub device: String,
    /// Name of the case.
    pub case: String,
    /// Kernel or pass that the case measures.
    pub family: String,
    /// [`OURS`], or the peer's name.
    pub implementation: String,
    /// Version of the implementation: a commit, or a library's version.
    pub version: String,
    /// Identifier of the run; records with the same identifier were measured together.
    pub run: String,
    /// Time of the measurement, UTC.
    pub date: String,
    /// FLOPs of the mathematical definition, equal for every implementation.
    pub flops: f64,
    /// Minimum number of bytes that must be moved, equal for every implementation.
    pub bytes: f64,
    /// The result; `None` if it could not run: `detail` gives the reason.
    pub timing: Option<Measured>,
    /// Lower bound of the seconds from the ceilings of the same run; `None` without ceilings.
    #[serde(default)]
    pub floor_seconds: Option<f64>,
    /// Why it did not run, or a special condition of the run.
    pub detail: String,
    /// Release of the operating system's kernel.
    #[serde(default)]
    pub system: String,
    /// Version of the GPU's driver.
    #[serde(default)]
    pub driver: String,
    /// Output of nvidia-smi before the measurement; null without nvidia-smi.
    #[serde(default)]
    pub before: Value,
    /// Output of nvidia-smi after the measurement; null without nvidia-smi.
    #[serde(default)]
    pub after: Value,
}

/// The result of a measurement; times are medians.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Median seconds of the faster pass.
    pub seconds: f64,
    /// Median seconds of each pass.
    pub passes: Vec<f64>,
    /// Interquartile range of each pass divided by its median.
    pub spread: Vec<f64>,
    /// Number of samples per pass.
    pub samples: usize,
    /// Number of launches per sample.
    pub launches: usize,
    /// Number of sets of inputs, which are used in turn.
    pub sets: usize,
    /// Whether the launches were replayed from a graph.
    pub graph: bool,
}

impl Measured {
    /// Returns the median of the slower pass divided by that of the faster.
    pub fn repeat_ratio(&self) -> f64 {
        self.passes.iter().copied().fold(0.0, f64::max) / self.seconds
    }
}

impl Record {
    /// Returns the measured seconds; `None` if it did not run.
    pub fn seconds(&self) -> Option<f64> {
        Some(self.timing.as_ref()?.seconds)
    }

    /// Returns TFLOP/s; `None` if it did not run or has no FLOPs.
    pub fn tflops(&self) -> Option<f64> {
        (self.flops > 0.0).then_some(self.flops / self.seconds()? / 1e12)
    }

    /// TB/s.
    pub fn terabytes(&self) -> Option<f64> {
        Some(self.bytes / self.seconds()? / 1e12)
    }

    /// Returns the lower bound of the time divided by the measured time; 1 is the optimum.
    pub fn share_of_floor(&self) -> Option<f64> {
        Some(self.floor_seconds? / self.seconds()?)
    }
}

/// Formats a number with three significant digits, for GPU and CPU rates alike; returns a dash for `None`.
pub fn told(x: Option<f64>) -> String {
    match x {
        Some(x) if x >= 99.95 => format!("{x:.0}"),
        Some(x) if x >= 0.1 => format!("{x:.3}"),
        Some(x) => format!("{x:.5}"),
        None => "–".into(),
    }
}

/// All records in a folder.
pub type Records = records::Records<Record>;

impl Entry for Record {
    const PREFIX: &'static str = "bench";
    const BROKEN: &'static str = "remove the line; `routegrad bench` measures it again";
    /// Machine, device, case, implementation.
    type Key = [String; 4];

    fn key(&self) -> Self::Key {
        [
            &self.machine,
            &self.device,
            &self.case,
            &self.implementation,
        ]
        .map(String::clone)
    }
    fn machine(&self) -> &str {
        &self.machine
    }
    fn date(&self) -> &str {
        &self.date
    }
}

/// The records of one device of one machine.
pub struct View<'a>(pub Vec<&'a Record>);

impl<'a> View<'a> {
    /// Returns the record of a case and an implementation.
    pub fn of(&self, case: &str, implementation: &str) -> Option<&'a Record> {
        let mut all = self.0.iter();
        all.find(|r| r.case == case && r.implementation == implementation)
            .copied()
    }

    /// Returns our records that have a result.
    pub fn ours(&self) -> impl Iterator<Item = &'a Record> {
        let ours = |r: &&&Record| r.implementation == OURS && r.timing.is_some();
        self.0.iter().filter(ours).copied()
    }

    /// Returns our measured seconds for a case.
    pub fn seconds(&self, case: &str) -> Option<f64> {
        self.of(case, OURS)?.seconds()
    }

    /// Returns how many times as fast as the peer we are; `None` unless both were measured.
    pub fn ratio(&self, case: &str, peer: &str) -> Option<f64> {
        Some(self.of(case, peer)?.seconds()? / self.seconds(case)?)
    }

    /// Returns the names of all peers, sorted.
    pub fn peers(&self) -> Vec<&'a str> {
        let names = self.0.iter().map(|r| r.implementation.as_str());
        let names: std::collections::BTreeSet<&str> = names.filter(|name| *name != OURS).collect();
        names.into_iter().collect()
    }

    /// Returns whether the compared records come from different runs.
    pub fn mixes_runs(&self) -> bool {
        self.0.windows(2).any(|pair| pair[0].run != pair[1].run)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Returns a record that took this many seconds; a negative number stands for a case that could not run.
    pub fn record(case: &str, implementation: &str, seconds: f64) -> Record {
        Record {
            machine: "NVIDIA H200".into(),
            device: "cuda".into(),
            case: case.into(),
            family: case.split(' ').next().unwrap_or_default().into(),
            implementation: implementation.into(),
            version: "1".into(),
            run: "one".into(),
            date: "2026-01-01T00:00:00Z".into(),
            flops: 1e12,
            bytes: 1e9,
            timing: (seconds >= 0.0).then(|| Measured {
                seconds,
                passes: vec![seconds, 1.02 * seconds],
                spread: vec![0.01, 0.01],
                samples: 5,
                launches: 2,
                sets: 2,
                graph: true,
            }),
            floor_seconds: Some(1e-3),
            detail: String::new(),
            system: String::new(),
            driver: String::new(),
            before: Value::Null,
            after: Value::Null,
        }
    }

    #[test]
    fn rates_and_ratios_are_computed_from_the_medians() {
        let (ours, theirs) = (record("a", OURS, 2e-3), record("a", "peer", 3e-3));
        assert_eq!(ours.tflops(), Some(500.0));
        assert_eq!(ours.terabytes(), Some(0.5));
        assert_eq!(ours.share_of_floor(), Some(0.5));
        assert_eq!(ours.timing.as_ref().map(Measured::repeat_ratio), Some(1.02));
        let missing = record("a", "other", -1.0);
        let view = View(vec![&ours, &theirs, &missing]);
        assert_eq!(view.ratio("a", "peer"), Some(3e-3 / 2e-3));
        assert_eq!(
            (view.ratio("a", "other"), view.ratio("b", "peer")),
            (None, None)
        );
        assert_eq!(view.peers(), ["other", "peer"]);
    }

    #[test]
    fn a_record_of_a_peer_needs_only_the_fields_that_a_peer_knows() {
        let line = r#"{"machine":"m","device":"cpu","case":"add tiny","family":"add","implementation":"torch","version":"2",
            "run":"r","date":"d","flops":0,"bytes":8,"timing":null,"detail":"no such operation"}"#;
        let record: Record = serde_json::from_str(line).unwrap();
        assert_eq!((record.timing, record.before), (None, Value::Null));
    }
}
