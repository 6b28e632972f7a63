//! The simulator's build, with the C++ compiler. Always optimised: an unoptimised simulator is ten times slower.

use crate::sources;

pub fn compile() {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(3)
        .debug(false)
        .include("kernels")
        // The kernels end in .cu; for this compiler they are C++.
        .flags(["-x", "c++"])
        .flags(WARNINGS)
        // One object that exports the table alone, so that no other build can take over a symbol of it.
        .flag("-fvisibility=hidden")
        .files(sources::kernels())
        .files(sources::simulator());
    find_static_library(&build);
    build.compile("routegrad_sim");
}

/// A static C++ library (`CXXSTDLIB=static=stdc++`, as scripts/bundle asks for) lies where only the compiler knows.
fn find_static_library(build: &cc::Build) {
    println!("cargo::rerun-if-env-changed=CXXSTDLIB");
    if !std::env::var("CXXSTDLIB").is_ok_and(|name| name.starts_with("static=")) {
        return;
    }
    let output = build
        .get_compiler()
        .to_command()
        .arg("-print-file-name=libstdc++.a")
        .output();
    let path = output
        .ok()
        .and_then(|o| String::from_utf8(o.stdout).ok())
        .unwrap_or_default();
    if let Some(folder) = std::path::Path::new(path.trim()).parent() {
        println!("cargo::rustc-link-search=native={}", folder.display());
    }
}

/// Off: the note on passing 128-byte aligned structs, `#pragma unroll`, defaults left out of aggregates, and a false alarm
/// of GCC 12 in std::string.
const WARNINGS: [&str; 6] = [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
    "-Wno-restrict",
];
