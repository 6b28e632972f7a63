//! What a kernel costs: its floating-point operations on tensor cores and the bytes it must move, from its sizes. The
//! formulas are those of the headers in `kernels/` and stand in the kernels' files; tests compare them with the
//! simulator's counters.

use crate::device::machine::{Chip, h200};
pub use crate::device::machine::{H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND};
use std::iter::Sum;
use std::ops::Add;

/// Tensor-core operations and global memory traffic, each byte counted once however often a cache serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations of the tensor cores, a multiplication and an addition counted as two.
    pub flops: f64,
    /// Bytes that are read from and written to global memory.
    pub bytes: f64,
}

impl Cost {
    pub(crate) fn new(flops: usize, bytes: usize) -> Self {
        Self {
            flops: flops as f64,
            bytes: bytes as f64,
        }
    }

    /// Lower bound of the seconds on one H200.
    pub fn floor(&self) -> f64 {
        self.floor_on(h200())
    }

    /// Lower bound of the seconds on a GPU.
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
    /// T.
    pub tokens: usize,
    /// D.
    pub hidden: usize,
    /// F, the width of one expert.
    pub ffn: usize,
    /// E.
    pub experts: usize,
    /// Slots of a token, K.
    pub slots: usize,
    /// R: slots that have a row.
    pub rows: usize,
}

/// Experts as the tiles of router and combine have them.
pub(crate) fn padded_experts(experts: usize) -> usize {
    match experts {
        0..=16 => 16,
        17..=32 => 32,
        33..=64 => 64,
        65..=128 => 128,
        _ => 256,
    }
}
