//! Writes files atomically: under a temporary name, synced, then renamed. A file is either complete or absent.

pub(crate) mod fault;

use crate::error::{Error, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Prefix of the names of files that are being written or removed; no finished file has it.
pub(crate) const UNFINISHED: &str = ".unfinished-";

/// Writes a value as JSON without syncing the file.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = json(path, value)?;
    File::create(path)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .map_err(|e| Error::io("write", path, e))
}

/// Returns the text that [`write_json`] writes to the file at `path`.
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

/// Syncs a file or a folder to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|f| f.sync_all());
    match synced {
        // Some file systems (CIFS, FUSE) cannot sync folders and return an error.
        Err(e) if unsupported(&e) && path.is_dir() => {}
        other => other.map_err(|e| Error::io("sync", path, e))?,
    }
    fault::point();
    Ok(())
}

/// Returns whether the error means that the file system does not support the call: EINVAL, EOPNOTSUPP or ENOSYS.
fn unsupported(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, Unsupported};
    matches!(e.kind(), InvalidInput | Unsupported)
}

/// Writes and syncs a file in `folder`, and replaces an existing file with this name.
pub(crate) fn replace(folder: &Path, name: &str, content: &[u8]) -> Result<()> {
    let temporary = folder.join(format!("{UNFINISHED}{name}"));
    fault::disk()
        .and_then(|()| fs::write(&temporary, content))
        .map_err(|e| Error::io("write", &temporary, e))?;
    fault::point();
    sync(&temporary)?;
    rename(folder, name)
}

/// Writes a file at `path` atomically but does not sync it; for files that can be generated again.
///
/// # Errors
/// When the file cannot be written; an existing file at `path` is then unchanged.
pub(crate) fn publish(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!("{UNFINISHED}{name}"));
    fs::write(&temporary, content).map_err(|e| Error::io("write", &temporary, e))?;
    fs::rename(&temporary, path).map_err(|e| Error::io("rename", &temporary, e))
}

/// Renames the synced file or folder [`UNFINISHED`]`name` in `folder` to `name`.
pub(crate) fn rename(folder: &Path, name: &str) -> Result<()> {
    let temporary = folder.join(format!("{UNFINISHED}{name}"));
    fs::rename(&temporary, folder.join(name)).map_err(|e| Error::io("rename", &temporary, e))?;
    fault::point();
    sync(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_does_not_sync_folders_is_no_error_and_one_that_does_not_sync_files_is() {
        // Syncing a file or folder of /proc returns EINVAL.
        sync(Path::new("/proc/self")).unwrap();
        assert!(sync(Path::new("/proc/self/status")).is_err());
        assert!(sync(Path::new("/nonexistent")).is_err());
    }
}
