//! `hardware-check` and `status` on a machine without a usable GPU: what they list, why they cannot run, and what a driver
//! would have to be.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program away from any real driver, with `libraries` in front of the loader's path.
fn routegrad(arguments: &[&str], libraries: Option<&Path>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_routegrad"));
    command.args(arguments).env_remove("LD_LIBRARY_PATH");
    if let Some(folder) = libraries {
        command.env("LD_LIBRARY_PATH", folder);
    }
    command.output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether the machine has a driver of its own, which would answer instead.
fn has_driver() -> bool {
    Path::new("/dev/nvidiactl").exists()
}

#[test]
fn a_dry_run_lists_every_task_in_order_and_says_why_it_cannot_run() {
    if has_driver() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("records");
    let output = routegrad(
        &[
            "hardware-check",
            "--dry-run",
            "--out",
            out.to_str().unwrap(),
        ],
        None,
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    let listed = text(&output.stdout);
    let reason = match (cfg!(feature = "cuda"), cfg!(routegrad_cuda)) {
        (false, _) => "no GPU to use: this build has no cuda device",
        (true, false) => "no GPU to use: the kernels are not compiled in",
        (true, true) => "no GPU to use: no CUDA driver",
    };
    assert!(listed.starts_with(reason), "{listed}");
    let mut from = 0;
    for task in [
        "agrees: unit_wgmma every layout",
        "agrees: unit_tma_load",
        "agrees: unit_tma_store",
        "agrees: unit_multicast",
        "agrees: dispatch_choices small",
        "agrees: grouped_gemm_weight_gradient covering accumulated",
        "replays: grouped_gemm_forward small",
        "memcheck: dispatch_mask small",
        "racecheck: grouped_gemm_forward small",
        "timed: grouped_gemm_forward dense 4096",
        "timed: grouped_gemm_weight_gradient 7.33b 32c4 down",
    ] {
        let at = listed[from..].find(task);
        from += at.unwrap_or_else(|| panic!("{task} is missing, or out of order:\n{listed}"));
    }
    assert!(!out.exists(), "a dry run wrote records");
}

#[test]
fn without_a_gpu_it_fails_with_the_reason_and_writes_nothing() {
    if has_driver() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("records");
    let output = routegrad(&["hardware-check", "--out", out.to_str().unwrap()], None);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(
        error.contains("expected a Hopper GPU") && error.contains("scripts/bundle"),
        "{error}"
    );
    assert!(!out.exists());
}

#[test]
fn a_task_that_cannot_run_ends_as_failed_in_its_own_words() {
    if has_driver() {
        return;
    }
    let output = routegrad(
        &["hardware-check", "--one", "agrees: unit_wgmma every layout"],
        None,
    );
    let line = text(&output.stdout);
    assert!(line.contains(r#""ending":"failed""#), "{line}");
}

#[test]
fn the_status_table_claims_nothing_without_records() {
    let folder = tempfile::tempdir().unwrap();
    let output = routegrad(
        &["status", "--records", folder.path().to_str().unwrap()],
        None,
    );
    let table = text(&output.stdout);
    let rows: Vec<&str> = table
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    assert!(
        rows.len() >= 5 && rows.iter().all(|row| row.ends_with("| no | no |")),
        "{table}"
    );
}

/// A libcuda.so with so many GPUs that speaks CUDA `version` (13000 is 13.0).
#[cfg(all(feature = "cuda", routegrad_cuda))]
fn driver(folder: &Path, version: u32, gpus: u32) {
    let source = folder.join("driver.c");
    let code = format!(
        "int cuInit(unsigned f) {{ (void)f; return 0; }}\n\
         int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}\n\
         int cuDeviceGetCount(int *n) {{ *n = {gpus}; return 0; }}\n"
    );
    std::fs::write(&source, code).unwrap();
    let library = folder.join("libcuda.so");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&source)
        .status();
    assert!(
        built.is_ok_and(|status| status.success()),
        "cc builds no shared object"
    );
}

#[cfg(all(feature = "cuda", routegrad_cuda))]
#[test]
fn a_driver_that_is_too_old_or_has_no_gpu_is_named() {
    for (version, gpus, reason) in [
        (
            12080,
            1,
            "too old: it speaks CUDA 12.8, the kernels need 13.0",
        ),
        (13000, 0, "the CUDA driver finds no GPU"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        driver(folder.path(), version, gpus);
        let output = routegrad(&["hardware-check", "--list"], Some(folder.path()));
        assert!(
            text(&output.stdout).contains(reason),
            "{}",
            text(&output.stdout)
        );
    }
}
