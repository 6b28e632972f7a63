//! What a record is tied to: a digest of the code that its task ran. When that changes, the task is unproven and runs again.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// In place of a `.cu` file: a whole step, of all kernels and of `SOURCES`.
pub const STEP: &str = "a whole step";

/// Where it is decided what a step launches, trains on and saves, and what it is held against.
const SOURCES: [&str; 13] = [
    "configs",
    "src/config",
    "src/data",
    "src/device",
    "src/dist",
    "src/model",
    "src/ops",
    "src/routers",
    "src/study/plan",
    "src/tape",
    "src/tensor",
    "src/train",
    "benches/results/curves",
];

/// Tells the digest of `SOURCES` where they are not: scripts/bundle sets it.
pub const VARIABLE: &str = "ROUTEGRAD_SOURCES";

/// The digest of `source`, a `.cu` file's name or [`STEP`]; none in a build without nvcc, or where the sources are unknown.
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

/// The digest of `SOURCES`: told by the environment, or read in the folder of the project.
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

/// Of names and contents; none where one is missing.
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
        // A name that is neither shows when it is read.
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
