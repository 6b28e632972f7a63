//! The folder of a run: names of its files, and what is written before the first step.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::version;
use std::path::{Path, PathBuf};

/// The resolved configuration.
pub const CONFIG_FILE: &str = "config.toml";
/// One JSON object per step.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The folder of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";

/// Where a run is kept, and what it writes there.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Folder of the run.
    pub out: PathBuf,
    /// Resume from the newest whole checkpoint in `out`.
    pub resume: bool,
    /// Whether to write checkpoints.
    pub checkpoints: bool,
    /// Whether to record a timeline of the last step's kernels, on a GPU.
    pub timeline: bool,
    /// Whether to show no progress.
    pub quiet: bool,
}

impl RunOptions {
    /// A new run in `out` that writes checkpoints and shows its progress.
    pub fn new(out: impl Into<PathBuf>) -> Self {
        RunOptions {
            out: out.into(),
            resume: false,
            checkpoints: true,
            timeline: false,
            quiet: false,
        }
    }

    /// The same, resumed from its newest whole checkpoint; from the start if there is none.
    pub fn resumed(self) -> Self {
        RunOptions {
            resume: true,
            ..self
        }
    }

    /// The same without progress.
    pub fn quiet(self) -> Self {
        RunOptions {
            quiet: true,
            ..self
        }
    }
}

/// Refuses a folder that holds a run.
///
/// # Errors
/// When it does.
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
        "go on with it by --resume, or choose another --name or --out",
    ))
}

/// Replaces the run's configuration atomically; its first line names the program.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn write_config(out: &Path, config: &Config) -> Result<()> {
    let text = format!("# {}\n{}", version::program(), config.to_toml()?);
    publish(&out.join(CONFIG_FILE), text)
}
