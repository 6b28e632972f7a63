//! Which files make up a build of the kernels.

use std::path::{Path, PathBuf};

/// The kernels and the launcher table, compiled for every machine.
pub fn kernels() -> Vec<PathBuf> {
    let mut files = with_extension("kernels", "cu");
    files.extend(with_extension("kernels/common", "cu"));
    files
}

/// The simulator itself.
pub fn simulator() -> Vec<PathBuf> {
    with_extension("kernels/sim", "cpp")
}

fn with_extension(folder: impl AsRef<Path>, extension: &str) -> Vec<PathBuf> {
    let folder = folder.as_ref();
    let entries = std::fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("cannot list {}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}
