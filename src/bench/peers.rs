//! Names of the implementations that we are held against, as they stand in the records.

/// A strided batch of equal groups, one group being dense.
pub const CUBLAS: &str = "cuBLASLt";
/// `cublasGemmGroupedBatchedEx`, groups of any size.
pub const CUBLAS_GROUPED: &str = "cuBLAS grouped";

// Measured by benches/peers/run.py.
pub const TORCH_GROUPED: &str = "torch._grouped_mm";
pub const TORCH_LAYER: &str = "torch layer, compiled";
pub const TORCH: &str = "torch";
pub const TORCH_COMPILED: &str = "torch, compiled";
pub const CUDNN: &str = "torch, cuDNN attention";
pub const FLASH: &str = "torch, flash attention";
pub const MOE_OPS: &str = "moe-ops (Triton)";
pub const SONIC: &str = "SonicMoE";
