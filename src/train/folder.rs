//! The folder of a run: the names of its files, and the files written before the first step.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::version;
use std::path::{Path, PathBuf};

/// The resolved configuration.
pub const CONFIG_FILE: &str = "config.toml";
/// The log: one JSON object per step.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The folder of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";

/// The folder of a run, and what the run writes to it.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Folder of the run.
    pub out: PathBuf,
    /// Whether to resume from the newest complete checkpoint in `out`.
    pub resume: bool,
    /// Whether to write checkpoints.
    pub checkpoints: bool,
    /// Whether to record a timeline of the last step's kernels, on a GPU.
    pub timeline: bool,
    /// Whether to show no progress.
    pub quiet: bool,
}

impl RunOptions {
    /// Options for a new run in `out` that writes checkpoints and shows its progress.
    pub fn new(out: impl Into<PathBuf>) -> Self {
        RunOptions {
            out: out.into(),
            resume: false,
            checkpoints: true,
            timeline: false,
            quiet: false,
        }
    }

    /// Returns the options with resumption from the newest complete checkpoint, or from the start if there is none.
    pub fn resumed(self) -> Self {
        RunOptions {
            resume: true,
            ..self
        }
    }

    /// Returns the options without progress output.
    pub fn quiet(self) -> Self {
        RunOptions {
            quiet: true,
            ..self
        }
    }
}

/// Checks that a folder does not hold a run.
///
/// # Errors
/// Returns an error when the folder holds a run.
pub(crate) fn refuse_existing(out: &Path) -> Result<()> {
    let holds = [CONFIG_FILE, METRICS_FILE, CHECKPOINTS]
        .iter()
        .any(|f| out.join(f).exists());
    if !holds {
        return Ok(());
    }
    Err(Error::invalid(
        "train",
        "a new folder for the run",
        format!("{}, which holds a run", out.display()),
        "resume it with --resume, or choose another --name or --out",
    ))
}

/// Replaces the run's configuration atomically; its first line names the program.
///
/// # Errors
/// Returns an error when the file cannot be written.
pub(crate) fn write_config(out: &Path, config: &Config) -> Result<()> {
    let text = format!("# {}\n{}", version::program(), config.to_toml()?);
    publish(&out.join(CONFIG_FILE), text)
}
