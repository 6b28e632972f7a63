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

/// Memory of any length, for calls that are refused; an optional one is left out at address 0.
pub trait Pointer: Sized {
    fn at(address: usize) -> Self;
    /// An address at which nothing is wrong: inputs and outputs do not overlap.
    fn good() -> Self;
}

static ROOM: [u128; 16] = [0; 16];

/// The address of the good inputs, or of the good outputs.
pub fn room(output: bool) -> usize {
    &raw const ROOM[if output { 8 } else { 0 }] as usize
}

impl<T> Pointer for In<'_, T> {
    fn at(address: usize) -> Self {
        // SAFETY: a refused call touches no memory.
        unsafe { In::from_address(address, usize::MAX) }
    }
    fn good() -> Self {
        Self::at(room(false))
    }
}

impl<T> Pointer for Out<'_, T> {
    fn at(address: usize) -> Self {
        // SAFETY: as above.
        unsafe { Out::from_address(address, usize::MAX) }
    }
    fn good() -> Self {
        Self::at(room(true))
    }
}

impl<P: Pointer> Pointer for Option<P> {
    fn at(address: usize) -> Self {
        (address != 0).then(|| P::at(address))
    }
    fn good() -> Self {
        Some(P::good())
    }
}

/// The call is refused for `argument`, and nothing is launched.
pub fn refused(call: impl FnOnce() -> Result<()>, why: &str, argument: &str) {
    let argument = if argument == "input" { "in" } else { argument };
    let mut text = String::new();
    let counters = counted(|| text = call().expect_err(argument).to_string());
    assert!(
        text.contains(&format!("argument `{argument}` {why}")),
        "{argument} {why}: {text}"
    );
    assert_eq!(counters.launches, 0, "{argument}: something was launched");
}

/// `call` with the pointer `name` is refused when it is null, and when it is misaligned. What its `mark` names is not tried.
pub fn refuses_pointer(name: &str, mark: &str, call: impl Fn(usize) -> Result<()>) {
    assert!(["", "optional", "unaligned"].contains(&mark), "{mark}");
    if mark != "optional" {
        refused(|| call(0), NULL, name);
    }
    if mark != "unaligned" {
        refused(|| call(room(false) + 8), MISALIGNED, name);
    }
}

/// Calls of a kernel that its launcher refuses, and nothing is launched: `refuses!(Kernel { pointers; other: fields } ...)`.
///
/// Each pointer is tried as null and misaligned; one that is `[optional]` may be null, one that is `[unaligned]` misaligned.
/// Behind them are, for each reason, the fields that are named in the refusal with their wrong values; other fields that
/// change with one stand before it in brackets.
macro_rules! refuses {
    (
        $Kernel:ident { $($pointer:ident $([$mark:ident])?),*; $($other:tt)* }
        $($why:ident { $($([$($also:ident: $value:expr),+])? $field:ident: $($wrong:expr),+);+ })*
    ) => {{
        use $crate::support::refusals::{self, Pointer};
        let good = $Kernel { $($pointer: Pointer::good(),)* $($other)* };
        $(
            let mark = stringify!($($mark)?);
            refusals::refuses_pointer(stringify!($pointer), mark, |address| {
                let call = $Kernel { $pointer: Pointer::at(address), ..good };
                call.launch(&refusals::stream())
            });
        )*
        $($(
            let base = $Kernel { $($($also: $value,)+)? ..good };
            $(
                let call = $Kernel { $field: $wrong, ..base };
                let why = refusals::$why;
                refusals::refused(|| call.launch(&refusals::stream()), why, stringify!($field));
            )+
        )+)*
    }};
}
pub(crate) use refuses;
