//! `hardware-check` and `status` on a machine without a usable GPU: what they list, why they cannot run, what a driver
//! would have to be; and the tasks of whole steps on the simulator, with and without something planted.

use crate::common::stand_in;
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
        "steady: tiny default  (needs",
        "repeats: 557m default 4 layers",
        "learns: small default",
        "connects: 557m default  (needs",
        "scales: 557m default, 2 ranks  (needs",
        "scales: 557m default, 8 ranks  (needs",
        "memcheck: dispatch_positive small  (needs compute-sanitizer)",
        "trains: 7.33b default  (needs 132.30 GiB of the device)",
        "resumes: 557m default  (needs 16.66 GiB of the device, 6.22 GiB of disk)",
        "timed: attention_forward 2048 x 64",
        "timed: attention_backward 8192 x 128 grouped 16 on 4",
        "timed: grouped_gemm_forward dense 4096",
        "timed: grouped_gemm_weight_gradient 7.33b 32c4 down",
        "bench: core set",
        "racecheck: grouped_gemm_forward small",
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
        error.contains("expected an NVIDIA GPU from Ampere on") && error.contains("scripts/bundle"),
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
            "too old: it supports CUDA 12.8, the kernels need 13.0",
        ),
        (13000, 0, (9, 0), "the CUDA driver finds no GPU"),
        (
            13000,
            1,
            (7, 5),
            "NVIDIA Stub has compute capability 7.5; the kernels need 8.0 or newer",
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
            && error.contains("3.00 GiB are free")
            && error.contains("micro_batch"),
        "{error}"
    );
    assert!(!out.exists(), "a run began");
}

/// The records that a rehearsal on the simulator left, by task.
fn rehearsed(arguments: &[&str]) -> (Output, Vec<serde_json::Value>) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let mut all = vec!["hardware-check", "--device", "sim", "--out", out];
    all.extend(arguments);
    let mut command = Command::new(env!("CARGO_BIN_EXE_routegrad"));
    command.args(all).env("ROUTEGRAD_NCCL", stand_in());
    let output = command.output().expect("the program starts");
    let file = folder.path().join("hardware-simulator.jsonl");
    let records = std::fs::read_to_string(file).unwrap_or_default();
    let records = records
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    (output, records.collect())
}

/// What is asked of whole steps, in the order of the records.
const STEP_TASKS: [&str; 9] = [
    "bench: small set",
    "connects: tiny default",
    "learns: tiny default",
    "repeats: tiny default",
    "resumes: tiny default",
    "scales: tiny default, 2 ranks",
    "steady: tiny default",
    "steady: tiny default eager",
    "trains: tiny default",
];

#[test]
#[ignore = "slow"]
fn every_task_of_whole_steps_passes_on_the_simulator_and_records_what_it_saw() {
    let (output, records) = rehearsed(&[]);
    assert!(output.status.success(), "{}", text(&output.stdout));
    let tasks: Vec<&str> = records
        .iter()
        .map(|r| r["task"].as_str().unwrap())
        .collect();
    assert_eq!(tasks, STEP_TASKS);
    for record in &records {
        assert_eq!(record["ending"], "passed", "{record}");
        assert_eq!(record["gpu"], "simulator");
    }
    let [
        bench,
        connects,
        learns,
        repeats,
        resumes,
        scales,
        steady,
        eager,
        trains,
    ] = [0, 1, 2, 3, 4, 5, 6, 7, 8].map(|i| &records[i]["measured"]);
    assert_eq!(bench["cases"], 1);
    assert_eq!(connects["library"], "NCCL 2.32.3");
    assert_eq!(scales["ranks"], 2);
    assert_eq!(learns["losses"].as_array().map(Vec::len), Some(6));
    assert!(learns["relative_difference"].as_f64().unwrap().abs() < 0.01);
    assert!(repeats["arrays"].as_u64() > Some(50));
    let seconds = |record: &serde_json::Value, key: &str| record[key].as_f64().unwrap();
    // The simulator's steps are slow, and the checkpoint is small.
    assert!((0.0..1.0).contains(&seconds(resumes, "share_of_time_blocked")));
    assert!(seconds(&resumes["saved"], "bytes") > 1e6);
    for step in [&steady["step"], &eager["step"]] {
        assert_eq!((&step["reads"], &step["waits"]), (&0.into(), &0.into()));
    }
    assert_eq!(steady["step"]["replays"], 1);
    assert!(eager["step"]["launches"].as_u64() > Some(100));
    assert_eq!(
        trains["seconds_of_each_step"].as_array().map(Vec::len),
        Some(2)
    );
    let rate = seconds(trains, "tokens_per_step") / seconds(trains, "tokens_per_second");
    assert!(rate > 0.0 && seconds(trains, "share_of_peak") < 1e-3);
}

#[test]
#[ignore = "slow"]
fn what_is_planted_in_a_task_of_whole_steps_is_told_as_failure() {
    let (output, records) = rehearsed(&["--plant"]);
    assert_eq!(output.status.code(), Some(1));
    let told: Vec<&[&str]> = vec![
        &["the bench ended with"],
        &["with NCCL's calls differs from one without, first in losses and norm of step 1"],
        &["not within 1%: mean loss"],
        &["differ in", "first in loss and gradient norm of step 1"],
        &["expected a complete checkpoint, got 1 damaged"],
        &["two runs on 2 ranks differ, first in losses of step 1"],
        &[
            "reads: 2",
            "the memory is not within 3% of the plan",
            "a refused step changed: model.layers.0",
        ],
        &[
            "reads: 2",
            "the memory is not within 3% of the plan",
            "a refused step changed: model.layers.0",
        ],
        &["the memory is not within 3% of the plan"],
    ];
    assert_eq!(records.len(), told.len());
    for ((record, name), told) in records.iter().zip(STEP_TASKS).zip(told) {
        assert_eq!(
            (&record["task"], &record["ending"]),
            (&name.into(), &"failed".into())
        );
        let detail = record["detail"].as_str().unwrap();
        for text in told {
            assert!(detail.contains(text), "{name}: {detail}");
        }
    }
}

#[test]
fn without_nccl_its_task_is_skipped_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let all = ["hardware-check", "--device", "sim", "--out", out];
    let output = routegrad(&[&all[..], &["--only", "connects"]].concat(), None);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(
        said.contains("not here") && said.contains("name one in ROUTEGRAD_NCCL"),
        "{said}"
    );
}
