//! Digests of the code that a task runs. A record contains the digest; if the code changes, the task counts as unproven
//! and runs again.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Used in place of the name of a `.cu` file for a complete step, which depends on all kernels and on `SOURCES`.
pub const STEP: &str = "a whole step";

/// The sources that determine what a step launches, which data it trains on, what it saves, and what it is compared with.
const SOURCES: [&str; 14] = [
    "configs",
    "src/config",
    "src/data",
    "src/device",
    "src/dist",
    "src/kernels",
    "src/model",
    "src/ops",
    "src/routers",
    "src/study/plan",
    "src/tape",
    "src/tensor",
    "src/train",
    "benches/results/curves",
];

/// Environment variable with the digest of `SOURCES` for machines without the sources; scripts/bundle sets it.
pub const VARIABLE: &str = "ROUTEGRAD_SOURCES";

/// Returns the digest of `source`, which is the name of a `.cu` file or [`STEP`]; `None` in a build without nvcc, or if
/// the sources are not known.
pub fn code(source: &str) -> Option<String> {
    let kernels = option_env!("ROUTEGRAD_CODE")?;
    if source == STEP {
        let all = format!("{kernels} {}", sources()?);
        return Some(short(&blake3::hash(all.as_bytes())));
    }
    let mut entries = kernels.split(';');
    let hash = entries.find_map(|entry| entry.strip_prefix(source)?.strip_prefix('='));
    hash.map(str::to_string)
}

/// Returns the digest of `SOURCES` from the environment, or computes it in the project's folder.
pub fn sources() -> Option<&'static str> {
    static FOUND: OnceLock<Option<String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let told = std::env::var(VARIABLE).ok().filter(|told| !told.is_empty());
        told.or_else(|| digest(Path::new(".")))
    });
    found.as_deref()
}

fn short(hash: &blake3::Hash) -> String {
    hash.to_hex()[..16].to_string()
}

/// Returns a digest of names and contents; `None` if a file is missing.
fn digest(root: &Path) -> Option<String> {
    let mut hash = blake3::Hasher::new();
    for source in SOURCES {
        let mut files = Vec::new();
        collect(&root.join(source), &mut files).ok()?;
        files.sort();
        for file in files {
            let name = file.strip_prefix(root).ok()?.to_string_lossy().into_owned();
            hash.update(name.as_bytes());
            hash.update(blake3::hash(&std::fs::read(&file).ok()?).as_bytes());
        }
    }
    Some(short(&hash.finalize()))
}

fn collect(path: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if !path.is_dir() {
        // A path that is neither a file nor a folder causes an error when it is read.
        found.push(path.to_path_buf());
        return Ok(());
    }
    for entry in std::fs::read_dir(path)? {
        collect(&entry?.path(), found)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_of_every_source_and_changes_with_one() {
        let found = digest(Path::new(".")).expect("a name in SOURCES is not in the project");
        assert_eq!(found.len(), 16);
        let copy = tempfile::tempdir().unwrap();
        for source in SOURCES {
            let mut files = Vec::new();
            collect(Path::new(source), &mut files).unwrap();
            for file in files {
                let to = copy.path().join(&file);
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(&file, to).unwrap();
            }
        }
        assert_eq!(digest(copy.path()).as_ref(), Some(&found));
        std::fs::write(copy.path().join("src/train/step.rs"), "another step").unwrap();
        assert!(digest(copy.path()).is_some_and(|other| other != found));
        std::fs::remove_dir_all(copy.path().join("src/train")).unwrap();
        assert_eq!(digest(copy.path()), None);
    }
}
