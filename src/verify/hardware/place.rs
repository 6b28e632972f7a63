//! Where the tasks of the hardware check run.

use crate::device::Device;
use std::path::PathBuf;

/// Folder of the records.
pub const FOLDER: &str = "benches/results";

/// The device and folder of the tasks.
#[derive(Clone, Debug)]
pub struct Place {
    /// A GPU, or the simulator.
    pub device: Device,
    /// Folder of the records.
    pub out: PathBuf,
    /// Whether every task of complete steps plants a fault, which it must detect.
    pub planted: bool,
}

/// Returns the name of the GPU that this process can use, or a sentence with the reason why there is none.
pub fn gpu_name() -> Result<String, String> {
    // The GPU is closed again immediately: each task opens it in its own process.
    #[cfg(feature = "cuda")]
    let name = crate::device::cuda::Gpu::open().map(|gpu| gpu.name.clone());
    #[cfg(not(feature = "cuda"))]
    let name = Err("this build has no cuda device: build with --features cuda".into());
    name
}

/// Returns the number of GPUs.
pub fn gpu_count() -> Result<usize, String> {
    #[cfg(feature = "cuda")]
    let count = crate::device::cuda::Gpu::count();
    #[cfg(not(feature = "cuda"))]
    let count = gpu_name().map(|_| 0);
    count
}

/// Returns the GPU's name for records. If a Hopper GPU runs the kernels for GPUs without wgmma (`ROUTEGRAD_ARCHS=90`), the
/// name includes this, because a proof of these kernels is not a proof of the others.
pub fn with_kernels(gpu: String) -> String {
    match crate::device::built_for().eq(["90"]) {
        true => gpu + " mma.sync",
        false => gpu,
    }
}

/// Returns the name of the machine for records, or a sentence with the reason why there is none.
pub fn machine_name(device: Device) -> Result<String, String> {
    match device {
        Device::Sim => Ok("simulator".into()),
        _ => gpu_name().map(with_kernels),
    }
}
