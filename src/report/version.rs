//! Which program this is, for the files of a run.

use std::sync::OnceLock;

static COMMIT: OnceLock<&str> = OnceLock::new();

/// Tells the commit that the program was built from; empty for none. The binary does, not the library, so that a new
/// commit links the binary anew and compiles nothing else.
pub fn set_commit(commit: &'static str) {
    let _ = COMMIT.set(commit);
}

/// As in `routegrad 0.1.0, commit 0b735df4006b`; without a commit the package's version alone.
pub fn program() -> String {
    let version = concat!("routegrad ", env!("CARGO_PKG_VERSION"));
    match COMMIT.get().filter(|commit| !commit.is_empty()) {
        Some(commit) => format!("{version}, commit {commit}"),
        None => version.into(),
    }
}
