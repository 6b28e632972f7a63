//! The counts that keep the tree easy to enter stay within the limits of `scripts/structure`, and CONTRIBUTING.md names files
//! that are there.

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn counts_of_the_source_tree_stay_within_their_limits() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/structure");
    let output = match Command::new("python3").arg(script).output() {
        Ok(output) => output,
        Err(e) => {
            println!("skipped: python3 cannot be started: {e}");
            return;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("launchers named outside src/kernels/: 0"));
}

#[test]
fn the_files_that_contributing_names_are_there() {
    let text = fs::read_to_string("CONTRIBUTING.md").unwrap();
    let mut found = 0;
    for name in text.split('`').skip(1).step_by(2) {
        let is_path = [
            "src/",
            "tests/",
            "docs/",
            "examples/",
            "kernels/",
            "scripts/",
        ]
        .iter()
        .any(|folder| name.starts_with(folder));
        // NAME stands for that of a new kernel or router.
        if is_path && !name.contains("NAME") && !name.contains(' ') {
            assert!(Path::new(name).exists(), "CONTRIBUTING.md names {name}");
            found += 1;
        }
    }
    assert!(found > 20, "only {found} files were found");
}

#[test]
fn what_contributing_names_behind_a_file_is_defined_there() {
    let text = fs::read_to_string("CONTRIBUTING.md").unwrap();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    // `file` (`name`, `name`)
    let parts: Vec<&str> = text.split("` (`").collect();
    for pair in parts.windows(2) {
        let file = pair[0].rsplit('`').next().unwrap();
        let source = fs::read_to_string(file).unwrap_or_else(|e| panic!("{file}: {e}"));
        let words: Vec<&str> = source
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .collect();
        let names = pair[1].split(')').next().unwrap();
        for name in names.split('`').step_by(2).filter(|name| !name.is_empty()) {
            let defined = words
                .windows(2)
                .any(|w| ["fn", "struct", "trait", "const"].contains(&w[0]) && w[1] == name);
            assert!(defined, "CONTRIBUTING.md: {file} defines no `{name}`");
        }
    }
    assert!(
        parts.len() > 15,
        "only {} files with names were found",
        parts.len() - 1
    );
}
