//! One process at a time writes to a folder: whoever does holds a lock of the operating system on a file in it, which ends with
//! the process however it ends.

use super::records::now;
use super::stderr_line;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

/// The file that is locked. It stays, and says who held the lock last.
pub(crate) const LOCK_FILE: &str = ".lock";

/// Who holds a lock.
#[derive(Serialize, Deserialize)]
struct Holder {
    host: String,
    process: u32,
    since: String,
}

/// A lock on a folder, held until it is dropped.
pub(crate) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Creates `folder` and locks it. None, with a warning, where the file system has no locks.
    ///
    /// # Errors
    /// When another process holds the lock, or the disk refuses.
    pub fn take(folder: &Path) -> Result<Option<Self>> {
        fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let path = folder.join(LOCK_FILE);
        let mut options = OpenOptions::new();
        let opened = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path);
        let mut file = opened.map_err(|e| Error::io("open", &path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(folder, &mut file)),
            Err(TryLockError::Error(e)) => {
                let folder = folder.display();
                stderr_line(&format!(
                    "warning: {folder} cannot be locked ({e}): start no second process that writes to it"
                ));
                return Ok(None);
            }
        }
        let holder = Holder {
            host: host(),
            process: std::process::id(),
            since: now(),
        };
        // Whoever is refused reads it. Where it cannot be written the lock still holds.
        let text = serde_json::to_string(&holder).unwrap_or_default();
        let _ = file
            .set_len(0)
            .and_then(|()| file.write_all(text.as_bytes()));
        Ok(Some(FolderLock { _file: file }))
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
    fn a_folder_is_locked_once_and_its_holder_named_until_it_lets_go() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("run");
        let first = FolderLock::take(&folder).unwrap();
        assert!(first.is_some());
        let Err(e) = FolderLock::take(&folder) else {
            panic!("locked twice");
        };
        let expected = format!("process {} on ", std::process::id());
        assert!(e.to_string().contains(&expected), "{e}");
        drop(first);
        assert!(FolderLock::take(&folder).unwrap().is_some());
    }
}
