//! Opens the models that commands take as arguments.

use crate::dist::{Collective, SingleRank, same_on_all};
use crate::error::Result;
use crate::report::stderr_line;
use crate::study::exchange::Saved;
use std::path::Path;

/// Opens the model at `path`; of a run, the newest complete checkpoint. Prints a warning for each damaged checkpoint.
pub(super) fn open_saved(path: &Path) -> Result<Saved> {
    open_saved_on(&SingleRank, path)
}

/// Opens the model at `path` as [`open_saved`] does, and compares the paths found: all ranks must open the same checkpoint.
pub(super) fn open_saved_on(dist: &dyn Collective, path: &Path) -> Result<Saved> {
    let (found, damaged) = Saved::open(path)?;
    for damaged in damaged.iter().filter(|_| dist.rank() == 0) {
        stderr_line(&format!("warning: skipped a damaged checkpoint: {damaged}"));
    }
    let own = found.path().display().to_string();
    let both = |a: &str, b: &str| format!("the models {a} and {b}");
    let help = "name one of the run's checkpoints, in a folder that all hosts share";
    same_on_all(dist, &own, both, help)?;
    Ok(found)
}
