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

/// The arguments of a launcher before its stream, as the list of `routegrad.h` names them.
fn parameters(header: &str, launcher: &str) -> Vec<String> {
    let row = header
        .split_once(&format!("X({launcher},"))
        .and_then(|(_, row)| row.split_once('('))
        .and_then(|(_, row)| row.split_once(')'));
    let (list, _) = row.unwrap_or_else(|| panic!("{launcher} is not in routegrad.h"));
    let name = |parameter: &str| -> String {
        let mut words = parameter.split(|c: char| !c.is_alphanumeric() && c != '_');
        words.rfind(|word| !word.is_empty()).unwrap_or("").into()
    };
    let mut names: Vec<String> = list.split(',').map(name).collect();
    assert_eq!(names.pop().as_deref(), Some("stream"), "{launcher}");
    names
}

/// The launcher and the fields of each struct that `kernel!` declares in a file.
fn typed_calls(source: &str) -> Vec<(String, Vec<String>)> {
    let structs = source.split("    pub struct ").skip(1);
    let declared = structs.filter_map(|text| {
        let (head, body) = text.split_once('{')?;
        let (_, launcher) = head.split_once(" = ")?;
        let (body, _) = body.split_once("\n    }")?;
        let fields = body
            .lines()
            .map(str::trim)
            .filter(|line| !line.starts_with("//"))
            .filter_map(|line| Some(line.split_once(':')?.0.to_owned()));
        Some((launcher.trim().to_owned(), fields.collect()))
    });
    declared.collect()
}

/// A launch passes the fields by place: two of one type in the other order would be taken for one another.
#[test]
fn every_launcher_has_a_typed_call_whose_fields_are_its_arguments_in_order() {
    let header = read(&root().join("routegrad.h"));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels");
    let mut called = Vec::new();
    for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{e}")) {
        let path = entry.unwrap_or_else(|e| panic!("{e}")).path();
        for (launcher, fields) in typed_calls(&read(&path)) {
            let mut expected = parameters(&header, &launcher);
            for name in &mut expected {
                // Words that Rust keeps for itself.
                match name.as_str() {
                    "in" => *name = "input".into(),
                    "box" => *name = "place".into(),
                    _ => {}
                }
            }
            assert_eq!(fields, expected, "{launcher} in {}", path.display());
            called.push(launcher);
        }
    }
    for launcher in launchers() {
        let on_the_host = !header
            .split_once(&format!("X({launcher},"))
            .and_then(|(_, row)| row.split_once("))"))
            .is_some_and(|(row, _)| row.contains("stream"));
        let count = called.iter().filter(|name| **name == launcher).count();
        assert_eq!(
            count,
            usize::from(!on_the_host),
            "typed calls of {launcher}"
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
