//! The archive that `cargo package` makes has what a build needs, and nothing that a run or a build left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// crates.io takes archives of up to 10 MB; an archive is smaller than its files together.
const MOST_BYTES: u64 = 10 << 20;

#[test]
fn the_package_has_kernels_and_embedded_data_and_no_output() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["package", "--list", "--allow-dirty", "--offline"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let listed: BTreeSet<&str> = text.lines().collect();

    let mut needed = vec![
        "Cargo.lock".to_string(),
        "LICENSE".into(),
        "README.md".into(),
    ];
    for folder in [
        "kernels",
        "kernels/common",
        "kernels/sim",
        "data/embedded",
        "configs",
        "build",
    ] {
        let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        let files = entries.filter(|path| path.is_file());
        needed.extend(files.map(|path| path.to_str().unwrap().to_string()));
    }
    let kernels = needed.iter().filter(|file| file.ends_with(".cu")).count();
    assert!(kernels > 20, "only {kernels} kernels were found");
    for file in &needed {
        assert!(
            listed.contains(file.as_str()),
            "{file} is not in the package"
        );
    }

    for file in &listed {
        let output = ["runs/", "target/", ".toolkit/", "bundle/"];
        assert!(
            !output.iter().any(|o| file.starts_with(o)),
            "{file} is in the package"
        );
    }
    let size = |file: &&str| fs::metadata(Path::new(file)).map_or(0, |m| m.len());
    let bytes: u64 = listed.iter().map(size).sum();
    assert!(bytes < MOST_BYTES, "the package has {bytes} bytes");
}
