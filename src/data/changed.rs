//! Errors for token files that changed after they were written.

use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

/// Checks that the size of a file is `bytes`; `None` stands for a number that is larger than any file.
pub(super) fn expect_size(path: &Path, bytes: Option<u64>) -> Result<()> {
    let found = fs::metadata(path)
        .map_err(|e| Error::io("read", path, e))?
        .len();
    if Some(found) == bytes {
        return Ok(());
    }
    let expected = bytes.map_or("more than a file holds".into(), |b| b.to_string());
    Err(changed(
        path,
        format!("{expected} bytes"),
        found.to_string(),
    ))
}

pub(super) fn changed(path: &Path, expected: impl Into<String>, got: impl Into<String>) -> Error {
    let help = "the file was changed or cut off after it was prepared: prepare the text again";
    Error::file(path, expected, got, help)
}
