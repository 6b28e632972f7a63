//! The order of the modules: each imports only those that `src/lib.rs` declares before it.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Names that follow `crate::` in code, not in comments.
fn used(code: &str) -> impl Iterator<Item = &str> {
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            &rest[..end.unwrap_or(rest.len())]
        })
}

#[test]
fn every_module_imports_only_those_declared_before_it() {
    let lib = fs::read_to_string("src/lib.rs").unwrap();
    let order: Vec<&str> = lib
        .lines()
        .filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    let place = |name: &str| order.iter().position(|m| *m == name);
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    let mut checked = 0;
    for path in files {
        let within = path.strip_prefix("src").unwrap();
        let first = within.iter().next().unwrap().to_string_lossy();
        let module = first.trim_end_matches(".rs");
        let name = path.file_stem().unwrap().to_string_lossy();
        if matches!(module, "lib" | "main") || name.ends_with("tests") {
            continue;
        }
        let own = place(module).unwrap_or_else(|| panic!("{path:?} is not in src/lib.rs"));
        let text = fs::read_to_string(&path).unwrap();
        // Tests may look anywhere.
        let code = text.split("#[cfg(test)]").next().unwrap();
        for other in used(code) {
            if let Some(theirs) = place(other) {
                assert!(
                    theirs <= own,
                    "{} imports {other}, which src/lib.rs declares after it",
                    path.display()
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 100, "only {checked} uses were found");
}
