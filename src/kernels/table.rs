//! Structs of `kernels/routegrad.h` that are stored in device memory: tables of parameters and states, the settings
//! and the outcome of a step. The host writes and reads them as bytes.

use super::bindings::{
    routegrad_draws, routegrad_parameter, routegrad_state, routegrad_step_outcome,
    routegrad_step_settings,
};

/// A struct of the C interface that kernels read.
///
/// # Safety
/// The type must be `repr(C)` without padding, and every bit pattern must be valid for each of its fields.
pub unsafe trait Row: Copy + 'static {}

macro_rules! rows {
    ($($type:ty: $bytes:literal),* $(,)?) => {
        $(
            // SAFETY: bindgen makes it `repr(C)`, and its size is the sum of the sizes of its fields.
            unsafe impl Row for $type {}
            const _: () = assert!(size_of::<$type>() == $bytes);
        )*
    };
}
rows! {
    routegrad_draws: 24,
    routegrad_parameter: 72,
    routegrad_state: 24,
    routegrad_step_outcome: 112,
    routegrad_step_settings: 48,
}

/// Returns the bytes of the rows.
pub fn bytes_of<R: Row>(rows: &[R]) -> &[u8] {
    // SAFETY: a row has no padding.
    unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), size_of_val(rows)) }
}

/// Returns the row with these bytes.
///
/// # Panics
/// Panics when there are fewer or more bytes.
pub fn row_of<R: Row>(bytes: &[u8]) -> R {
    assert_eq!(bytes.len(), size_of::<R>(), "bytes of a row");
    // SAFETY: a row may have any bits, and there are as many bytes.
    unsafe { bytes.as_ptr().cast::<R>().read_unaligned() }
}
