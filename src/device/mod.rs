//! Where tensors live and operations run.
//!
//! `cpu` is the reference: plain Rust, generic over f32 and f64 ([`crate::cpu`] holds its tools).
//! The kernels of `kernels/` will join as two further devices that share one table of launchers.

#[allow(non_camel_case_types, non_upper_case_globals, clippy::type_complexity)]
#[rustfmt::skip]
pub mod bindings;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod launchers;
mod memory;

pub use memory::Memory;

use std::fmt;

/// A place where tensors live and operations run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Reference code on the host.
    Cpu,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Device::Cpu => "cpu",
        })
    }
}
