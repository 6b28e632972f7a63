//! Where the tasks of the hardware check run.

use crate::device::Device;
use std::path::PathBuf;

/// Where records are kept.
pub const FOLDER: &str = "benches/results";

/// Where tasks run.
#[derive(Clone, Debug)]
pub struct Place {
    /// A GPU, or the simulator.
    pub device: Device,
    /// Folder of the records.
    pub out: PathBuf,
    /// Every task of a whole step does something wrong on purpose, which it must tell.
    pub planted: bool,
}

/// The GPU that this process can use; or one sentence that says why there is none.
#[cfg(feature = "cuda")]
pub fn gpu_name() -> Result<String, String> {
    // Closed at once: the tasks open it in their own processes.
    crate::device::cuda::Gpu::open().map(|gpu| gpu.name.clone())
}

/// The same in a build that can use none.
#[cfg(not(feature = "cuda"))]
pub fn gpu_name() -> Result<String, String> {
    Err("this build has no cuda device: build with --features cuda".into())
}

/// The number of GPUs.
#[cfg(feature = "cuda")]
pub fn gpu_count() -> Result<usize, String> {
    crate::device::cuda::Gpu::count()
}

/// The same in a build that can use none.
#[cfg(not(feature = "cuda"))]
pub fn gpu_count() -> Result<usize, String> {
    gpu_name().map(|_| 0)
}

/// A GPU's name for records. Where a Hopper GPU runs the kernels for GPUs without wgmma (`ROUTEGRAD_ARCHS=90`), the name says so:
/// what is proven of those is not of the others.
pub fn with_kernels(gpu: String) -> String {
    match crate::device::built_for().eq(["90"]) {
        true => gpu + " mma.sync",
        false => gpu,
    }
}

/// The machine that the records are of; or one sentence that says why there is none.
pub fn machine_name(device: Device) -> Result<String, String> {
    match device {
        Device::Sim => Ok("simulator".into()),
        _ => gpu_name().map(with_kernels),
    }
}
