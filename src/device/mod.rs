//! Where tensors live and operations run.
//!
//! `cpu` is the reference: plain Rust, generic over f32 and f64 ([`crate::tensor::cpu`] holds its tools).
//! `sim` runs the kernels of `kernels/` on the SIMT simulator, in the arithmetic that they have on a
//! GPU: bf16 weights and activations, f32 sums, router and parameter gradients. `cuda` runs the same
//! kernels on a GPU; [`Memory`] says how the host sees what they wrote.

mod arena;
#[allow(non_camel_case_types, non_upper_case_globals, clippy::type_complexity)]
#[rustfmt::skip]
pub mod bindings;
pub mod counters;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod graph;
pub mod launchers;
pub mod machine;
mod memory;
#[cfg(feature = "cuda")]
mod pinned;
mod side;
pub mod timeline;

pub use memory::{Memory, rounded_bytes};
pub use side::{Sent, reserve, send, take_peak, with_free_ranges};

use crate::error::{Error, Result};
use launchers::Launchers;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A place where tensors live and operations run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// Reference code on the host.
    #[default]
    Cpu,
    /// The CUDA kernels on the simulator, whose memory is apart from the host's as a GPU's is.
    Sim,
    /// The CUDA kernels on a GPU.
    Cuda,
}

impl Device {
    /// To be called once on a thread that will launch kernels: the simulator divides the blocks of a
    /// launch among all cores. What is computed does not depend on it.
    ///
    /// # Errors
    /// When the simulator cannot be loaded, or there is no GPU to use.
    pub fn prepare(self) -> Result<()> {
        if self != Device::Cpu {
            let launchers = self.launchers()?;
            if let Some(mut options) = launchers.options() {
                options.threads = rayon::current_num_threads() as i32;
                launchers.set_options(&options)?;
            }
        }
        Ok(())
    }

    /// The kernels of this device.
    ///
    /// # Errors
    /// On the CPU, which has none, and when the simulator cannot be loaded.
    pub fn launchers(self) -> Result<&'static Launchers> {
        match self {
            Device::Sim => launchers::sim(),
            #[cfg(feature = "cuda")]
            Device::Cuda => Ok(cuda::gpu()?.launchers()),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => Err(Error::invalid(
                "device cuda",
                "a build with it",
                "one without",
                "build with --features cuda",
            )),
            Device::Cpu => Err(Error::invalid(
                "kernels",
                "tensors on a device with kernels",
                "tensors on cpu",
                "a bug: the operation should have taken its reference",
            )),
        }
    }
}

/// The stream that kernels are launched on: the GPU's where one is open; the simulator has none.
pub fn stream() -> bindings::routegrad_stream {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = cuda::opened() {
        return gpu.raw_stream();
    }
    std::ptr::null_mut()
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Device::Cpu => "cpu",
            Device::Sim => "sim",
            Device::Cuda => "cuda",
        })
    }
}
