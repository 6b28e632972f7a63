//! The models that commands are given.

use crate::error::Result;
use crate::report::stderr_line;
use crate::study::exchange::Saved;
use std::path::Path;

/// The model at `path`, of a run there the newest whole checkpoint; damaged ones are named.
pub(super) fn open_saved(path: &Path) -> Result<Saved> {
    let (found, damaged) = Saved::open(path)?;
    for damaged in damaged {
        stderr_line(&format!("warning: skipped a damaged checkpoint: {damaged}"));
    }
    Ok(found)
}
