//! Starts this program, for a task or by one.

use super::place::Place;
use crate::error::{Error, Result};
use crate::report::metrics::Record;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Returns a command that runs this program.
///
/// # Errors
/// When its file is not known.
pub fn this_program() -> Result<Command> {
    let program = std::env::current_exe().map_err(|e| Error::io("find", "this program", e))?;
    Ok(Command::new(program))
}

/// Returns the command `train` of this program on the device of `place`, which prints nothing and writes to `out`.
///
/// # Errors
/// As [`this_program`].
pub fn train(place: &Place, out: &Path) -> Result<Command> {
    let mut command = this_program()?;
    command
        .args(["train", "--quiet", "--device", &place.device.to_string()])
        .arg("--out")
        .arg(out)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Ok(command)
}

/// Starts a process.
///
/// # Errors
/// When it cannot be started.
pub fn start(command: &mut Command) -> Result<Child> {
    let child = command.spawn();
    child.map_err(|e| Error::io("start", command.get_program(), e))
}

/// Returns the last `count` lines of an output, the last one first.
pub fn last_lines(text: &str, count: usize) -> String {
    let last: Vec<&str> = text.lines().rev().take(count).collect();
    last.join(" | ")
}

/// Parses a line of the log that `train` wrote.
///
/// # Errors
/// When it is not the record of a step.
pub fn step_record(log: &Path, line: &str) -> Result<Record> {
    serde_json::from_str(line)
        .map_err(|e| Error::file(log, "a step's record", e.to_string(), "a bug"))
}

/// A child process that is killed when the value is dropped.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder for the runs of a task, which is removed when the value is dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    /// Creates the folder. Its name depends on the kind of task and the folder of records, so that files that a killed
    /// task left behind are found and removed.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn new(kind: &str, records: &Path) -> Result<Self> {
        let whole = std::path::absolute(records).unwrap_or_else(|_| records.into());
        let name = blake3::hash(whole.to_string_lossy().as_bytes()).to_hex();
        let path = std::env::temp_dir().join(format!("routegrad-{kind}-{}", &name[..16]));
        drop(Folder(path.clone()));
        fs::create_dir_all(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        let _ = fs::remove_file(self.0.with_extension("stderr"));
    }
}
