//! The GPU's build, with nvcc: taken from `NVCC`, `CUDA_HOME`, the PATH, or the folder that scripts/install-toolkit fills.
//! Without one the crate still builds, with the CPU and the simulator.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sources;

const OLDEST: (u32, u32) = (12, 8);
const INSTALL: &str = "scripts/install-toolkit puts one into .toolkit/";

pub fn compile() {
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // Cargo runs the script at every build while a watched file is missing; scripts/install-toolkit touches this one.
    if Path::new(".toolkit/nvcc.stamp").is_file() {
        println!("cargo::rerun-if-changed=.toolkit/nvcc.stamp");
    }
    match usable_nvcc() {
        Ok(nvcc) => build(&nvcc),
        Err(why) => println!("cargo::warning=built without the cuda device: {why}"),
    }
}

/// The compiler to use, or why there is none.
fn usable_nvcc() -> Result<PathBuf, String> {
    if std::env::var("NVCC").is_ok_and(|v| v == "none") {
        return Err("NVCC is set to none".into());
    }
    let nvcc = candidates()
        .into_iter()
        .find(|path| path.is_file())
        .ok_or(format!("no nvcc found; {INSTALL}"))?;
    let output = Command::new(&nvcc).arg("--version").output();
    let text = output.map_err(|e| format!("{} does not start: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    match release(&text) {
        Some(version) if version >= OLDEST => Ok(nvcc),
        Some((major, minor)) => Err(format!(
            "{} is {major}.{minor}, {}.{} or newer is needed; {INSTALL}",
            nvcc.display(),
            OLDEST.0,
            OLDEST.1
        )),
        None => Err(format!("{} does not tell its release", nvcc.display())),
    }
}

fn candidates() -> Vec<PathBuf> {
    let mut paths = Vec::new();
    if let Some(nvcc) = std::env::var_os("NVCC") {
        paths.push(PathBuf::from(nvcc));
    }
    if let Some(home) = std::env::var_os("CUDA_HOME") {
        paths.push(Path::new(&home).join("bin/nvcc"));
    }
    if let Some(path) = std::env::var_os("PATH") {
        paths.extend(std::env::split_paths(&path).map(|folder| folder.join("nvcc")));
    }
    paths.push(
        Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join(".toolkit/cuda/bin/nvcc"),
    );
    paths
}

/// (13, 0) of "Cuda compilation tools, release 13.0, V13.0.88".
fn release(text: &str) -> Option<(u32, u32)> {
    let rest = text.split("release ").nth(1)?;
    let (major, rest) = rest.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn build(nvcc: &Path) {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap());
    let jobs: Vec<(PathBuf, PathBuf)> = sources::kernels()
        .into_iter()
        .map(|source| {
            let object = out
                .join(source.file_name().unwrap())
                .with_extension("cuda.o");
            (source, object)
        })
        .collect();
    compile_all(nvcc, &jobs);
    cc::Build::new()
        .objects(jobs.iter().map(|(_, object)| object))
        .compile("routegrad_cuda");
    link_runtime(nvcc);
    println!("cargo::rustc-cfg=routegrad_cuda");
    let hashes: Vec<String> = jobs
        .iter()
        .map(|(source, object)| {
            format!(
                "{}={:016x}",
                source.file_stem().unwrap().to_string_lossy(),
                code_hash(object)
            )
        })
        .collect();
    println!("cargo::rustc-env=ROUTEGRAD_CODE={}", hashes.join(";"));
}

/// One nvcc a file, as many at once as Cargo was told to use.
fn compile_all(nvcc: &Path, jobs: &[(PathBuf, PathBuf)]) {
    let at_once = std::env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once.min(jobs.len()) {
            scope.spawn(|| {
                while let Some((source, object)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(text) = compile_one(nvcc, source, object) {
                        failures.lock().unwrap().push(text);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn compile_one(nvcc: &Path, source: &Path, object: &Path) -> Result<(), String> {
    let output = Command::new(nvcc)
        .args([
            "-std=c++20",
            "-O3",
            "-gencode",
            "arch=compute_90a,code=sm_90a",
        ])
        .args(["-Ikernels", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"])
        .arg(source)
        .arg("-o")
        .arg(object)
        .output()
        .map_err(|e| format!("{} does not start: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("nvcc cannot compile {}:\n{text}", source.display()))
}

/// FNV-1a of a compiled kernel file, launchers included: what records of GPU runs are tied to.
fn code_hash(object: &Path) -> u64 {
    let mut bytes =
        std::fs::read(object).unwrap_or_else(|e| panic!("cannot read {}: {e}", object.display()));
    // nvcc writes eight hexadecimal digits that depend on the folder or the process, not on the code, after these.
    for marker in [&b"_GLOBAL__N__"[..], b"_cu_", b"tmpxft_"] {
        for at in 0..bytes.len().saturating_sub(marker.len() + 8) {
            if bytes[at..].starts_with(marker) {
                bytes[at + marker.len()..at + marker.len() + 8].fill(b'0');
            }
        }
    }
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The static CUDA runtime: it finds the driver when the first call needs it, so the binary starts without one.
fn link_runtime(nvcc: &Path) {
    let home = nvcc
        .canonicalize()
        .ok()
        .and_then(|p| Some(p.parent()?.parent()?.to_path_buf()));
    for folder in ["lib64", "lib", "targets/x86_64-linux/lib"] {
        if let Some(path) = home.as_ref().map(|h| h.join(folder)).filter(|p| p.is_dir()) {
            println!("cargo::rustc-link-search=native={}", path.display());
        }
    }
    println!("cargo::rustc-link-lib=static=cudart_static");
    for library in ["dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib={library}");
    }
}
