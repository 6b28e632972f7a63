//! The cost of a kernel, computed from its sizes: floating-point operations on tensor cores, and bytes that it must
//! move. The formulas are the same as in the headers of `kernels/`, and are in the kernels' files here. Tests compare
//! them with the simulator's counters.

use crate::device::machine::{Chip, h200};
pub use crate::device::machine::{H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND};
use std::iter::Sum;
use std::ops::Add;

/// Tensor-core operations and global memory traffic, each byte counted once, even if a cache serves it several times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations of the tensor cores, where a multiplication and an addition count as two.
    pub flops: f64,
    /// Bytes read from and written to global memory.
    pub bytes: f64,
}

impl Cost {
    pub(crate) fn new(flops: usize, bytes: usize) -> Self {
        Self {
            flops: flops as f64,
            bytes: bytes as f64,
        }
    }

    /// Returns a lower bound of the time on one H200, in seconds.
    pub fn floor(&self) -> f64 {
        self.floor_on(h200())
    }

    /// Returns a lower bound of the time on a GPU, in seconds.
    pub fn floor_on(&self, chip: &Chip) -> f64 {
        let (flops, bytes) = chip.ceilings();
        (self.flops / flops).max(self.bytes / bytes)
    }
}

impl Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), Add::add)
    }
}

/// The sizes of a MoE layer's kernels.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// T, the number of tokens.
    pub tokens: usize,
    /// D, the width of the model.
    pub hidden: usize,
    /// F, the width of one expert.
    pub ffn: usize,
    /// E, the number of experts.
    pub experts: usize,
    /// Number of slots of a token, K.
    pub slots: usize,
    /// R: slots that have a row.
    pub rows: usize,
}

/// Returns the number of experts, padded to the tiles of the router and combine kernels.
pub(crate) fn padded_experts(experts: usize) -> usize {
    match experts {
        0..=16 => 16,
        17..=32 => 32,
        33..=64 => 64,
        65..=128 => 128,
        _ => 256,
    }
}
