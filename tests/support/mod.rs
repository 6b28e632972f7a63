//! What the kernel tests share: buffers between guard bands, seeded random numbers, bf16, and ways to run a launcher on
//! the simulator under one schedule after another.
#![allow(dead_code)]

pub mod gemm;
pub mod guarded;
pub mod numbers;
pub mod schedules;
