//! What a launcher says of an argument that it refuses.

use super::schedules::counted;
use routegrad::device::Device;
use routegrad::error::Result;
use routegrad::kernels::{In, Out, Stream};

pub const NULL: &str = "is a null pointer";
pub const MISALIGNED: &str = "is not 16-byte aligned";
pub const NOT_MULTIPLE: &str = "is not a multiple of 8";
pub const OUT_OF_RANGE: &str = "is outside what the kernel can do";
pub const OVERFLOW: &str = "makes a product of sizes overflow";

/// Where refused calls would go.
pub fn stream() -> Stream {
    Stream::of(Device::Sim).unwrap_or_else(|e| panic!("{e}"))
}

/// Memory of any length at an address, for calls that are refused.
pub fn input<'a, T>(address: usize) -> In<'a, T> {
    // SAFETY: a refused call touches no memory.
    unsafe { In::from_address(address, usize::MAX) }
}

/// [`input`] to be written.
pub fn output<'a, T>(address: usize) -> Out<'a, T> {
    // SAFETY: as above.
    unsafe { Out::from_address(address, usize::MAX) }
}

/// [`input`], left out where the address is 0.
pub fn optional<'a, T>(address: usize) -> Option<In<'a, T>> {
    (address != 0).then(|| input(address))
}

/// The call is refused for `argument`, and nothing is launched.
pub fn refused(call: impl FnOnce() -> Result<()>, why: &str, argument: &str) {
    let mut text = String::new();
    let counters = counted(|| text = call().expect_err(argument).to_string());
    assert!(
        text.contains(&format!("argument `{argument}` {why}")),
        "{argument} {why}: {text}"
    );
    assert_eq!(counters.launches, 0, "{argument}: something was launched");
}

/// `call` with one of its pointers wrong, the others `good`: each is refused when it is misaligned and, but for the
/// `optional` ones, when it is null.
pub fn refuses_pointers<const N: usize>(
    names: [&str; N],
    optional: &[&str],
    good: usize,
    call: impl Fn([usize; N]) -> Result<()>,
) {
    for (i, name) in names.into_iter().enumerate() {
        let with = |pointer| {
            let mut p = [good; N];
            p[i] = pointer;
            call(p)
        };
        if !optional.contains(&name) {
            refused(|| with(0), NULL, name);
        }
        refused(|| with(good + 8), MISALIGNED, name);
    }
}
