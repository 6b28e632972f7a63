//! What proves and times the program: gradient checks, kernel checks, the hardware check and the benchmark.

pub mod bench;

pub mod device_check;
pub mod fault;
pub mod gradcheck;
pub mod hardware;
pub mod kernels;
