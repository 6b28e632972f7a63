//! The committed Rust declarations of kernels/routegrad.h are those that bindgen makes of it.

#[cfg(feature = "bindgen")]
#[test]
fn committed_bindings_equal_the_generated_ones() {
    let committed = include_str!("../../src/kernels/bindings.rs");
    let generated = include_str!(concat!(env!("OUT_DIR"), "/bindings.rs"));
    assert!(
        committed == generated,
        "kernels/routegrad.h changed: run scripts/update-bindings and commit the result"
    );
}
