//! Training sparse Mixture-of-Experts transformers with hand-written CUDA kernels and a small tape autograd.

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod dtype;
pub mod error;
pub mod metrics;
pub mod plots;
pub mod random;
pub mod shape;
