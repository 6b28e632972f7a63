//! Files that are there whole or not at all: written under another name, synced, renamed.

pub(crate) mod fault;

use crate::error::{Error, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Begins the names of what is being written or removed; never of what is finished.
pub(crate) const UNFINISHED: &str = ".unfinished-";

/// Writes a value as JSON, not synced yet.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = json(path, value)?;
    File::create(path)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .map_err(|e| Error::io("write", path, e))
}

/// What [`write_json`] writes to the file at `path`.
pub(crate) fn json(path: &Path, value: &impl Serialize) -> Result<String> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| {
        Error::file(
            path,
            "values that JSON can hold",
            e.to_string(),
            "report this as a bug",
        )
    })?;
    text.push('\n');
    Ok(text)
}

/// Forces a file or a folder to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::io("sync", path, e))?;
    fault::point();
    Ok(())
}

/// Puts a file of this content into `folder`, in place of one of its name.
pub(crate) fn replace(folder: &Path, name: &str, content: &[u8]) -> Result<()> {
    let temporary = folder.join(format!("{UNFINISHED}{name}"));
    fault::disk()
        .and_then(|()| fs::write(&temporary, content))
        .map_err(|e| Error::io("write", &temporary, e))?;
    fault::point();
    sync(&temporary)?;
    rename(folder, name)
}

/// Gives `name` to what was written to `folder` and synced under [`UNFINISHED`]`name`.
pub(crate) fn rename(folder: &Path, name: &str) -> Result<()> {
    let temporary = folder.join(format!("{UNFINISHED}{name}"));
    fs::rename(&temporary, folder.join(name)).map_err(|e| Error::io("rename", &temporary, e))?;
    fault::point();
    sync(folder)
}
