//! Files of tokens that are not as they were written.

use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

/// Compares the size of a file with what it must have; `None` is more than any file has.
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
        format!("{found}"),
    ))
}

pub(super) fn changed(path: &Path, expected: String, got: String) -> Error {
    let help = "the file was changed or cut off after it was prepared: prepare the text again";
    Error::file(path, expected, got, help)
}
