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

/// A libcuda.so in the place of a driver.
#[cfg(all(feature = "cuda", routegrad_cuda))]
struct Stub {
    /// Of CUDA that it speaks: 13000 is 13.0.
    version: u32,
    gpus: u32,
    /// Compute capability of a GPU.
    capability: (u32, u32),
}

#[cfg(all(feature = "cuda", routegrad_cuda))]
impl Stub {
    /// Builds it in `folder`. Its GPUs have 80 GiB, of which 3 are free, and refuse every allocation.
    fn build(&self, folder: &Path) {
        let Stub {
            version,
            gpus,
            capability: (major, minor),
        } = self;
        let source = folder.join("driver.c");
        let code = format!(
            r#"#include <stdlib.h>
            #include <string.h>
            static void *current;
            int cuInit(unsigned f) {{ (void)f; return 0; }}
            int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}
            int cuDeviceGetCount(int *n) {{ *n = {gpus}; return 0; }}
            int cuDeviceGet(int *d, int i) {{ *d = i; return 0; }}
            int cuDeviceGetName(char *name, int n, int d) {{ (void)d; strncpy(name, "NVIDIA Stub", n); return 0; }}
            int cuDeviceGetAttribute(int *v, int a, int d) {{
              (void)d; *v = a == 75 ? {major} : a == 76 ? {minor} : 0; return 0;
            }}
            int cuDevicePrimaryCtxRetain(void **c, int d) {{ (void)d; *c = &current; return 0; }}
            int cuDevicePrimaryCtxRelease_v2(int d) {{ (void)d; return 0; }}
            int cuCtxGetCurrent(void **c) {{ *c = current; return 0; }}
            int cuCtxSetCurrent(void *c) {{ current = c; return 0; }}
            int cuStreamCreate(void **s, unsigned f) {{ (void)f; *s = &current; return 0; }}
            int cuStreamDestroy_v2(void *s) {{ (void)s; return 0; }}
            int cuStreamSynchronize(void *s) {{ (void)s; return 0; }}
            int cuMemHostAlloc(void **p, size_t n, unsigned f) {{ (void)f; *p = malloc(n); return 0; }}
            int cuMemAlloc_v2(unsigned long long *p, size_t n) {{ (void)p; (void)n; return 2; }}
            int cuMemGetInfo_v2(size_t *f, size_t *t) {{ *f = 3ul << 30; *t = 80ul << 30; return 0; }}
            int cuGetErrorName(int e, const char **s) {{ (void)e; *s = "CUDA_ERROR_OUT_OF_MEMORY"; return 0; }}
            int cuGetErrorString(int e, const char **s) {{ (void)e; *s = "out of memory"; return 0; }}
            "#
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
}

#[cfg(all(feature = "cuda", routegrad_cuda))]
#[test]
fn a_driver_that_is_too_old_has_no_gpu_or_another_gpu_is_named() {
    for (version, gpus, capability, reason) in [
        (
            12080,
            1,
            (9, 0),
            "too old: it speaks CUDA 12.8, the kernels need 13.0",
        ),
        (13000, 0, (9, 0), "the CUDA driver finds no GPU"),
        (
            13000,
            1,
            (8, 0),
            "NVIDIA Stub is not a Hopper GPU: its compute capability is 8.0",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let stub = Stub {
            version,
            gpus,
            capability,
        };
        stub.build(folder.path());
        let output = routegrad(&["hardware-check", "--list"], Some(folder.path()));
        assert!(
            text(&output.stdout).contains(reason),
            "{}",
            text(&output.stdout)
        );
    }
}

#[cfg(all(feature = "cuda", routegrad_cuda))]
#[test]
fn a_gpu_without_room_for_the_run_says_how_much_is_free_before_the_run_begins() {
    let folder = tempfile::tempdir().unwrap();
    let stub = Stub {
        version: 13000,
        gpus: 1,
        capability: (9, 0),
    };
    stub.build(folder.path());
    let out = folder.path().join("run");
    let output = routegrad(
        &["train", "--device", "cuda", "--out", out.to_str().unwrap()],
        Some(folder.path()),
    );
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("allocate")
            && error.contains("3.0 GiB are free")
            && error.contains("micro_batch"),
        "{error}"
    );
    assert!(!out.exists(), "a run began");
}
