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
    build.compile("routegrad_sim");
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
