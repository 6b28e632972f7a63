//! What must hold of the kernels' sources as text: where assembly and includes stand, sizes of files, rows of tables.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every source below kernels/, with its path from there.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap_or_else(|e| panic!("{e}")).path();
            if path.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_some_and(|e| ["cu", "cuh", "cpp", "hpp", "h"].iter().any(|x| e == *x))
            {
                let name = path
                    .strip_prefix(root())
                    .unwrap_or(&path)
                    .display()
                    .to_string();
                found.push((name, read(&path)));
            }
        }
    }
    assert!(found.len() > 20, "only {} sources found", found.len());
    found
}

/// The launchers of `routegrad.h`, from its list of X(name, parameters).
fn launchers() -> Vec<String> {
    let header = read(&root().join("routegrad.h"));
    let rows = header
        .split("#define")
        .filter(|part| part.trim_start().starts_with("ROUTEGRAD_"));
    let names: Vec<String> = rows
        .flat_map(|part| part.split("  X(").skip(1))
        .filter_map(|row| row.split(',').next())
        .map(str::to_owned)
        .collect();
    assert!(
        names.iter().any(|n| n == "unit_wgmma"),
        "the list was not found"
    );
    names
}

#[test]
fn inline_assembly_stands_in_the_ptx_headers_alone() {
    for (name, text) in sources() {
        let allowed = name.starts_with("common/ptx_") || name == "sim/fiber.cpp";
        let found = text
            .lines()
            .find(|l| l.contains("asm volatile") || l.contains("asm(") || l.contains("__asm"));
        assert!(
            allowed || found.is_none(),
            "{name}: {}",
            found.unwrap_or_default()
        );
    }
}

#[test]
fn kernels_include_only_common() {
    for (name, text) in sources()
        .into_iter()
        .filter(|(n, _)| n.ends_with(".cu") && !n.contains('/'))
    {
        for line in text.lines().filter(|l| l.starts_with("#include")) {
            assert!(line.contains("\"common/"), "{name}: {line}");
        }
    }
}

#[test]
fn files_stay_short() {
    for (name, text) in sources() {
        let lines = text.lines().count();
        assert!(
            lines <= 500,
            "{name} has {lines} lines; one concept a file, at most 500"
        );
    }
}

#[test]
fn every_launcher_has_a_row_in_the_readme() {
    let readme = read(&root().join("README.md"));
    let rows: Vec<&str> = readme
        .lines()
        .filter_map(|l| l.strip_prefix("| `")?.split('`').next())
        .collect();
    for name in launchers() {
        let has = rows.iter().any(|row| match row.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => *row == name,
        });
        assert!(has, "{name} has no row in kernels/README.md");
    }
}

#[test]
fn every_kernel_has_a_limit() {
    let limits = read(&root().join("limits.txt"));
    for (name, text) in sources()
        .into_iter()
        .filter(|(n, _)| n.ends_with(".cu") && n != "unit_faults.cu")
    {
        if text.contains("__global__") {
            assert!(
                limits.contains(&name),
                "{name} is not named in kernels/limits.txt"
            );
        }
    }
}
