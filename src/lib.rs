//! Training sparse Mixture-of-Experts transformers with hand-written CUDA kernels and a small tape autograd.
//!
//! Modules stand in order: each imports only those above it.

pub mod report;

pub mod device;
pub mod dist;
pub mod tensor;

pub mod kernels;
pub mod tape;

pub mod config;
pub mod ops;
pub mod routers;

pub mod model;

pub mod data;
pub mod train;

pub mod study;
pub mod verify;

pub mod cli;

pub use report::error;
