//! Ensures that only one process at a time writes to a folder. The process holds an operating-system lock on a file in the
//! folder; the lock ends with the process, also after a crash.

use super::records::now;
use super::stderr_line;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The locked file, which also stores the holder of the lock. A process that is killed leaves the file behind.
pub(crate) const LOCK_FILE: &str = ".lock";

/// The holder of a lock.
#[derive(Serialize, Deserialize)]
struct Holder {
    host: String,
    process: u32,
    since: String,
}

/// A lock on a folder; it is released when the value is dropped.
pub(crate) struct FolderLock {
    path: PathBuf,
    /// `None` if the file system does not support locks.
    file: Option<File>,
}

impl FolderLock {
    /// Creates `folder` and locks it. If the file system does not support locks, prints a warning and continues without
    /// one.
    ///
    /// # Errors
    /// When another process holds the lock, or the folder or file cannot be written.
    pub fn take(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let path = folder.join(LOCK_FILE);
        loop {
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).read(true).write(true);
            let mut file = options
                .open(&path)
                .map_err(|e| Error::io("open", &path, e))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(held(folder, &mut file)),
                Err(TryLockError::Error(e)) => {
                    stderr_line(&format!(
                        "warning: {} cannot be locked ({e}): start no second process that writes to it",
                        folder.display()
                    ));
                    return Ok(FolderLock { path, file: None });
                }
            }
            // The previous holder has removed the file, perhaps after it was opened here.
            let number = |m: fs::Metadata| m.ino();
            if fs::metadata(&path).map(number).ok() != file.metadata().map(number).ok() {
                continue;
            }
            let holder = Holder {
                host: host(),
                process: std::process::id(),
                since: now(),
            };
            // A process that does not get the lock reads this file. The lock is valid even if the file cannot be written.
            let text = serde_json::to_string(&holder).unwrap_or_default();
            let _ = file
                .set_len(0)
                .and_then(|()| file.write_all(text.as_bytes()));
            return Ok(FolderLock {
                path,
                file: Some(file),
            });
        }
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn held(folder: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let _ = file.rewind().and_then(|()| file.read_to_string(&mut text));
    let by = match serde_json::from_str::<Holder>(&text) {
        Ok(Holder {
            host,
            process,
            since,
        }) => {
            format!("process {process} on {host} has written to it since {since}")
        }
        Err(_) => "another process writes to it".into(),
    };
    let help = "wait for it, or stop it, or choose another folder";
    Error::file(folder, "a folder that no other process writes to", by, help)
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "this host".into(),
        name => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_locked_once_and_the_error_names_the_holder_until_release() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("run");
        let first = FolderLock::take(&folder).unwrap();
        assert!(folder.join(LOCK_FILE).exists());
        let Err(e) = FolderLock::take(&folder) else {
            panic!("locked twice");
        };
        let expected = format!("process {} on ", std::process::id());
        assert!(e.to_string().contains(&expected), "{e}");
        drop(first);
        assert!(!folder.join(LOCK_FILE).exists());
        // The file that a killed process leaves behind does not lock the folder.
        fs::write(folder.join(LOCK_FILE), "{}").unwrap();
        FolderLock::take(&folder).unwrap();
    }
}
