//! Rust declarations of kernels/routegrad.h, made by bindgen under the feature `bindgen`. Without it the committed copy in
//! src/kernels/bindings.rs serves; `scripts/update-bindings --check` compares the two.

#[cfg(not(feature = "bindgen"))]
pub fn generate() {}

#[cfg(feature = "bindgen")]
pub fn generate() {
    find_libclang();
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap()).join("bindings.rs");
    bindgen::Builder::default()
        .header("kernels/routegrad.h")
        .allowlist_item("(routegrad|ROUTEGRAD)_.*")
        .prepend_enum_name(false)
        .merge_extern_blocks(true)
        .derive_default(true)
        .raw_line(
            "// Made by bindgen from kernels/routegrad.h; scripts/update-bindings writes it anew.",
        )
        .disable_header_comment()
        // Not rustfmt, whose style depends on where it runs.
        .formatter(bindgen::Formatter::Prettyplease)
        .generate()
        .expect("bindgen cannot read kernels/routegrad.h")
        .write_to_file(&out)
        .expect("cannot write the bindings");
}

/// bindgen loads libclang at run time and panics without a hint when there is none.
#[cfg(feature = "bindgen")]
fn find_libclang() {
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    let own = std::path::Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
        .join(".toolkit/wheels/clang/native");
    if std::env::var_os("LIBCLANG_PATH").is_none() && own.is_dir() {
        // SAFETY: the build script has one thread.
        unsafe { std::env::set_var("LIBCLANG_PATH", own) };
    }
    if let Err(why) = clang_sys::load() {
        panic!(
            "the feature `bindgen` needs libclang: {why}\n\
             scripts/install-toolkit libclang puts one into .toolkit/, or set LIBCLANG_PATH"
        );
    }
}
