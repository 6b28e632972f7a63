//! Training sparse Mixture-of-Experts transformers with hand-written CUDA kernels and a small tape autograd.
//!
//! Modules stand in the order of the floors: each uses only those above it.

pub mod error;

pub mod files;

pub mod batch;
pub mod dtype;
pub mod machine;
pub mod random;
pub mod records;
pub mod shape;
pub mod version;

pub mod device;
pub mod measure;

pub mod cpu;
pub mod dist;

pub mod tensor;

pub mod tape;

pub mod check;

pub mod ops;

pub mod config;

pub mod routers;

pub mod data;
pub mod metrics;

pub mod events;
pub mod model;
pub mod optim;
pub mod plots;
pub mod report;
pub mod step;

pub mod analyze;
pub mod checkpoint;
pub mod device_check;
pub mod eval;
pub mod export;
pub mod floors;
pub mod generate;
pub mod gradcheck;
pub mod tasks;
pub mod train;

pub mod ablate;
pub mod exchange;
pub mod plan;
pub mod training;

pub mod bench;

pub mod hardware;

pub mod cli;
