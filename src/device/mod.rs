//! Where tensors live and operations run.
//!
//! `cpu` is the reference, written in Rust and generic over f32 and f64 ([`crate::tensor::cpu`] has its building
//! blocks). `sim` runs the kernels of `kernels/` on the SIMT simulator, in the arithmetic that they have on a GPU:
//! bf16 weights and activations, f32 sums, router and parameter gradients. `cuda` runs the same kernels on a GPU;
//! [`Memory`] describes how the host reads the results of kernels.

mod arena;
mod capability;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod copies;
pub mod counters;
// The library with which the benchmark compares; only for tests and benchmarks.
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod cublas;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod cublas_grouped;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
pub mod driver;
pub mod graph;
pub mod machine;
mod memory;
#[cfg(feature = "cuda")]
mod pinned;
mod side;
mod span;
pub mod timeline;

pub use arena::ALIGNMENT;
pub(crate) use capability::architectures;
pub use capability::{
    built_for, cuda_version, driver_of_kernels, require_capability, require_driver,
};
pub use memory::{Memory, rounded_bytes};
pub use side::{Sent, reserve, send, take_peak, with_free_ranges};
pub use span::Span;

use serde::{Deserialize, Serialize};
use std::fmt;

/// A place where tensors live and operations run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// Reference code on the host.
    #[default]
    Cpu,
    /// The CUDA kernels on the simulator, whose memory is separate from host memory, as on a GPU.
    Sim,
    /// The CUDA kernels on a GPU.
    Cuda,
}

/// Returns the stream on which kernels are launched: that of the open GPU, or null for the simulator, which has none.
pub fn stream() -> *mut std::ffi::c_void {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = cuda::opened() {
        return gpu.raw_stream();
    }
    std::ptr::null_mut()
}

/// Opens `device`, and binds its GPU's context to the calling thread.
///
/// # Errors
/// Returns an error when no usable GPU is present.
pub fn bind(device: Device) -> crate::error::Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda => cuda::gpu()?.stream().map(drop),
        _ => Ok(()),
    }
}

/// Makes this process use visible GPU number `number`, unless only one GPU is visible. Call this before the GPU is
/// opened.
pub fn choose_gpu(number: usize) {
    #[cfg(feature = "cuda")]
    cuda::choose(number);
    #[cfg(not(feature = "cuda"))]
    let _ = number;
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
