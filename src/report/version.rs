//! The version of the program, for the files of a run.

use std::sync::OnceLock;

static COMMIT: OnceLock<&str> = OnceLock::new();

/// Sets the commit from which the program was built; empty if there is none. The binary calls it, not the library, so that
/// after a new commit only the binary has to be rebuilt.
pub fn set_commit(commit: &'static str) {
    let _ = COMMIT.set(commit);
}

/// Returns the program's version, such as `routegrad 0.1.0, commit 0b735df4006b`; without a commit only the package
/// version.
pub fn program() -> String {
    let version = concat!("routegrad ", env!("CARGO_PKG_VERSION"));
    match COMMIT.get().filter(|commit| !commit.is_empty()) {
        Some(commit) => format!("{version}, commit {commit}"),
        None => version.into(),
    }
}
