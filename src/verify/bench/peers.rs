//! Names of the implementations with which the goals compare us, as in the records.

/// A strided batch of equal groups; a dense product is one group.
pub const CUBLAS: &str = "cuBLASLt";
/// `cublasGemmGroupedBatchedEx`, groups of any size.
pub const CUBLAS_GROUPED: &str = "cuBLAS grouped";

// Measured by benches/peers/run.py.
/// `torch._grouped_mm`, groups of any size.
pub const TORCH_GROUPED: &str = "torch._grouped_mm";
/// An MoE layer in PyTorch, compiled.
pub const TORCH_LAYER: &str = "torch layer, compiled";
/// Other operations in PyTorch, compiled.
pub const TORCH_COMPILED: &str = "torch, compiled";
/// Attention of cuDNN, called from PyTorch.
pub const CUDNN: &str = "torch, cuDNN attention";
/// The kernels of SonicMoE.
pub const SONIC: &str = "SonicMoE";
