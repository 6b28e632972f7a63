//! The program as a user runs it, on a model and a text small enough for tests.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A model whose steps take a few milliseconds: two layers, one of them MoE with four experts, two
/// micro-batches a step.
pub const MICRO: &[&str] = &[
    "model.hidden=16",
    "model.layers=2",
    "model.heads=2",
    "model.num_experts=4",
    "model.sequence_length=16",
    "train.sequences_per_step=4",
    "train.micro_batch=2",
    "train.eval_sequences=8",
    "train.eval_interval=25",
    "train.checkpoint_interval=10",
];

/// A temporary folder with a text to learn.
pub struct Place {
    pub folder: tempfile::TempDir,
    pub text: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text.txt");
        let documents: Vec<String> = (0..40)
            .map(|d| {
                let words = (0..60).map(|w| format!("word{} ", (d * 7 + w * w) % 97));
                words.collect::<String>()
            })
            .collect();
        fs::write(&text, documents.join("\n\n\n")).unwrap();
        Place { folder, text }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `train` of the micro model into `out`, with further arguments.
    pub fn train(&self, out: &str, arguments: &[&str]) -> Command {
        let mut command = program();
        command.arg("train").arg("--out").arg(self.path(out));
        command.arg("--data").arg(&self.text);
        for set in MICRO {
            command.args(["--set", set]);
        }
        command.args(arguments);
        command
    }

    /// `ablate` of the micro model into `out`: two routers, two seeds, and further arguments.
    pub fn ablate(&self, out: &str, steps: u64, arguments: &[&str]) -> Command {
        let mut command = program();
        command.arg("ablate").arg("--out").arg(self.path(out));
        command.arg("--data").arg(&self.text);
        for set in MICRO {
            command.args(["--set", set]);
        }
        command.args(["--router", "topk,default", "--seed", "0,1"]);
        command
            .args(["--steps", &steps.to_string()])
            .args(arguments);
        command
    }

    /// `train --resume` of the run in `out`.
    pub fn resume(&self, out: &str) -> Command {
        let mut command = program();
        command
            .args(["train", "--resume", "--out"])
            .arg(self.path(out));
        command
    }
}

pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_routegrad"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs to success; standard output and error.
pub fn succeed(command: &mut Command) -> (String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let (out, err) = (text(&stdout), text(&stderr));
    assert!(status.success(), "{command:?} gave {status}\n{out}{err}");
    (out, err)
}

/// Runs to a clean failure, exit code 1 or 2 and an error of one line; that line.
pub fn fail(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let (out, err) = (text(&stdout), text(&stderr));
    assert!(
        matches!(status.code(), Some(1 | 2)),
        "{command:?} gave {status}\n{out}{err}"
    );
    assert!(!err.contains("panicked"), "{err}");
    let line = err.lines().last().unwrap_or_default().to_string();
    assert!(line.starts_with("error: "), "{err}");
    line
}

/// Lines in the log of the run at `out`: steps done.
pub fn steps_logged(out: &Path) -> usize {
    let log = fs::read(out.join("metrics.jsonl")).unwrap_or_default();
    log.iter().filter(|b| **b == b'\n').count()
}

/// Waits until the run has logged `steps` steps; false if it ended before.
pub fn wait_for_step(child: &mut Child, out: &Path, steps: usize) -> bool {
    let begun = Instant::now();
    while steps_logged(out) < steps {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "no step {steps} in two minutes"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// The library that stands in for NCCL, compiled by the host's compiler.
pub fn stand_in() -> &'static Path {
    static LIBRARY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libnccl.so.2");
        let source = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/processes/nccl/stand_in.c"
        );
        let mut compiler = Command::new("cc");
        compiler
            .args(["-std=c11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"])
            .args([source, "-o"])
            .arg(&library);
        succeed(&mut compiler);
        (folder, library)
    });
    path
}

/// The log without what the clock says.
pub fn metrics(out: &Path) -> Vec<serde_json::Value> {
    let log = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = log.lines().map(|line| {
        let mut record: serde_json::Value = serde_json::from_str(line).unwrap();
        let fields = record.as_object_mut().unwrap();
        assert!(fields.remove("seconds").is_some());
        assert!(fields.remove("tokens_per_second").is_some());
        fields.remove("saved");
        record
    });
    lines.collect()
}

/// The two runs ended in the same bytes: weights, optimizer, router state, log and pictures.
pub fn assert_same_end(a: &Path, b: &Path, step: u64) {
    for file in [
        "config.json",
        "model.safetensors",
        "trainer.safetensors",
        "trainer.json",
    ] {
        let read = |run: &Path| fs::read(run.join(format!("checkpoints/step-{step}")).join(file));
        assert!(
            read(a).unwrap() == read(b).unwrap(),
            "{file} of {a:?} and {b:?} differ"
        );
    }
    assert_eq!(metrics(a), metrics(b));
    for file in ["loss.svg", "load.svg"] {
        assert!(
            fs::read(a.join(file)).unwrap() == fs::read(b.join(file)).unwrap(),
            "{file}"
        );
    }
}

/// Names and contents of the files of a folder, sorted by name.
pub fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let read = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        (name, fs::read(entry.path()).unwrap())
    };
    let mut files: Vec<_> = entries.map(read).collect();
    files.sort();
    files
}

/// The files of an ablation's report without what the clock says.
pub fn ablation_report(out: &Path) -> BTreeMap<String, String> {
    let files = fs::read_dir(out).unwrap().map(|e| e.unwrap().path());
    let files = files.filter(|p| p.is_file()).map(|p| {
        let name = p.file_name().unwrap().to_str().unwrap().to_owned();
        let mut text = fs::read_to_string(&p).unwrap();
        if name == "report.html" {
            let timing = text.find("<h2 id=\"timing\"").expect("a section of times");
            text.truncate(timing);
        }
        (name, text)
    });
    files.filter(|(name, _)| name != "timing.csv").collect()
}
