//! The GPU's build, with nvcc: taken from `NVCC`, `CUDA_HOME`, the PATH, or the folder that scripts/install-toolkit fills.
//! Without one the crate still builds, with the CPU and the simulator.
//!
//! `ROUTEGRAD_ARCHS` lists the architectures to compile for, such as `80,90a`; `native` (the default) is this machine's GPU,
//! or `90a` where there is none; `all` is every one of [`ARCHS`]. `90` alone takes the kernels for Ampere on Hopper.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sources;

const OLDEST: (u32, u32) = (12, 8);
/// What the kernels compile for. 90a takes the kernels for Hopper (TMA and wgmma), the others those for Ampere and later
/// (cp.async and mma.sync).
const ARCHS: [&str; 6] = ["80", "86", "89", "90a", "100", "120"];
const HOPPER: &str = "90a";
/// Hopper with the kernels for Ampere: to prove and time them where there is no other GPU.
const HOPPER_AS_AMPERE: &str = "90";
const INSTALL: &str = "scripts/install-toolkit puts one into .toolkit/";

pub fn compile() {
    for variable in ["NVCC", "CUDA_HOME", "ROUTEGRAD_ARCHS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // Cargo runs the script at every build while a watched file is missing; scripts/install-toolkit touches this one.
    if Path::new(".toolkit/nvcc.stamp").is_file() {
        println!("cargo::rerun-if-changed=.toolkit/nvcc.stamp");
    }
    match usable_nvcc() {
        Ok((nvcc, release)) => build(&nvcc, release),
        Err(why) => println!("cargo::warning=built without the cuda device: {why}"),
    }
}

/// The first compiler that is new enough, with its release, or why there is none.
fn usable_nvcc() -> Result<(PathBuf, (u32, u32)), String> {
    if std::env::var("NVCC").is_ok_and(|v| v == "none") {
        return Err("NVCC is set to none".into());
    }
    let mut first_problem = None;
    for nvcc in candidates().into_iter().filter(|path| path.is_file()) {
        match release_of(&nvcc) {
            Ok(release) => return Ok((nvcc, release)),
            Err(why) => first_problem = first_problem.or(Some(why)),
        }
    }
    Err(first_problem.unwrap_or(format!("no nvcc found; {INSTALL}")))
}

/// The release of a compiler, or why it cannot be used.
fn release_of(nvcc: &Path) -> Result<(u32, u32), String> {
    let output = Command::new(nvcc).arg("--version").output();
    let text = output.map_err(|e| format!("{} does not start: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    match release(&text) {
        Some(version) if version >= OLDEST => Ok(version),
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

fn build(nvcc: &Path, (major, minor): (u32, u32)) {
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
    let archs = architectures();
    compile_all(nvcc, &archs, &jobs);
    cc::Build::new()
        .objects(jobs.iter().map(|(_, object)| object))
        .compile("routegrad_cuda");
    link_runtime(nvcc);
    println!("cargo::rustc-cfg=routegrad_cuda");
    println!("cargo::rustc-env=ROUTEGRAD_BUILT_FOR={}", archs.join(","));
    println!("cargo::rustc-env=ROUTEGRAD_BUILT_WITH={major}.{minor}");
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

/// The architectures that `ROUTEGRAD_ARCHS` names.
fn architectures() -> Vec<&'static str> {
    let wanted = std::env::var("ROUTEGRAD_ARCHS").unwrap_or_default();
    match wanted.trim() {
        "all" => ARCHS.to_vec(),
        "" | "native" => vec![native().unwrap_or(HOPPER)],
        HOPPER_AS_AMPERE => vec![HOPPER_AS_AMPERE],
        list => list
            .split([',', ' '])
            .filter(|name| !name.is_empty())
            .map(|name| {
                let known = ARCHS.into_iter().find(|arch| *arch == name);
                known.unwrap_or_else(|| {
                    panic!(
                        "ROUTEGRAD_ARCHS={list}: `{name}` is not an architecture; expected `native`, `all`, some of {}, \
                         separated by commas, or {HOPPER_AS_AMPERE} alone",
                        ARCHS.join(", ")
                    )
                })
            })
            .collect(),
    }
}

/// The architecture of the first GPU of this machine: the newest in [`ARCHS`] of its generation that it can run.
fn native() -> Option<&'static str> {
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=compute_cap", "--format=csv,noheader"])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (major, minor) = text.lines().next()?.trim().split_once('.')?;
    let found: u32 = format!("{major}{minor}").parse().ok()?;
    let number = |arch: &str| -> u32 { arch.trim_end_matches('a').parse().unwrap_or(0) };
    let runs = |arch: &&str| number(arch) / 10 == found / 10 && number(arch) <= found;
    let best = ARCHS
        .into_iter()
        .filter(runs)
        .max_by_key(|arch| number(arch));
    if best.is_none() {
        println!(
            "cargo::warning=compute capability {major}.{minor} has no kernels here; built for {HOPPER}"
        );
    }
    best
}

/// What nvcc needs to know of them.
fn architecture_flags(archs: &[&str]) -> Vec<String> {
    let mut flags: Vec<String> = archs
        .iter()
        .flat_map(|arch| {
            [
                "-gencode".to_string(),
                format!("arch=compute_{arch},code=sm_{arch}"),
            ]
        })
        .collect();
    let hopper = archs.contains(&HOPPER);
    let ampere = archs.iter().any(|arch| *arch != HOPPER);
    flags.push(format!("-DROUTEGRAD_FOR_HOPPER={}", i32::from(hopper)));
    flags.push(format!("-DROUTEGRAD_FOR_AMPERE={}", i32::from(ampere)));
    flags
}

/// One nvcc a file, as many at once as Cargo was told to use. What ptxas says stays beside each object, in `NAME.cuda.txt`,
/// for scripts/check-ptx.
fn compile_all(nvcc: &Path, archs: &[&str], jobs: &[(PathBuf, PathBuf)]) {
    let flags = architecture_flags(archs);
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
                    if let Err(text) = compile_one(nvcc, &flags, source, object) {
                        failures.lock().unwrap().push(text);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn compile_one(nvcc: &Path, flags: &[String], source: &Path, object: &Path) -> Result<(), String> {
    let output = Command::new(nvcc)
        .args(["-std=c++20", "-O3"])
        .args(flags)
        .args(["-Ikernels", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"])
        .arg(source)
        .arg("-o")
        .arg(object)
        .output()
        .map_err(|e| format!("{} does not start: {e}", nvcc.display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("nvcc cannot compile {}:\n{text}", source.display()));
    }
    let said = object.with_extension("txt");
    std::fs::write(&said, &output.stderr)
        .map_err(|e| format!("cannot write {}: {e}", said.display()))
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
