//! `kernels/unit.cu`, `kernels/unit_faults.cu`: single instructions as launchers, so that the simulator and hardware
//! can be compared, and kernels with deliberate faults that the simulator must detect. Lengths depend on layouts; the
//! kernel checks pass buffers of sufficient length.

use super::bindings::routegrad_unit_box;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `c [64, n] = a [64, 64] b [64, n]`.
    pub struct UnitWgmma = unit_wgmma {
        /// `[64, n]`.
        c: Out<'a, f32> [64 * n];
        /// `[64, 64]`.
        a: In<'a, bf16> [64 * 64];
        /// `[n, 64]`, or `[64, n]` with `b_mn_major`.
        b: In<'a, bf16> [64 * n];
        /// One of the compiled sizes: 16, 64, 96, 128, 176, 256.
        n: usize;
        a_mn_major: bool;
        b_mn_major: bool;
        a_in_registers: bool;
        /// The swizzle width: 1 is 128 bytes, 2 is 64 bytes, 3 is 32 bytes.
        swizzle: i32;
    }
}

kernel! {
    /// Copies the bytes of one box of a tensor as TMA stores them in shared memory.
    pub struct UnitTmaLoad = unit_tma_load {
        /// The elements of the box.
        out: Out<'a, bf16> [1];
        /// The elements of the complete tensor.
        tensor: In<'a, bf16> [1];
        /// The position and extents of the box, in host memory.
        place: &'a routegrad_unit_box;
    }
}

kernel! {
    /// The reverse: copies bytes of shared memory to one box of a tensor.
    pub struct UnitTmaStore = unit_tma_store {
        /// The elements of the complete tensor.
        tensor: Out<'a, bf16> [1];
        /// The elements of the box.
        input: In<'a, bf16> [1];
        /// The position and extents of the box, in host memory.
        place: &'a routegrad_unit_box;
    }
}

kernel! {
    /// Clusters of two blocks: each block loads half of the rows of every round by multicast, for the blocks in its
    /// mask.
    pub struct UnitMulticast = unit_multicast {
        /// `[2 clusters, rounds, 64, 64]`.
        out: Out<'a, bf16> [2 * clusters * rounds * 64 * 64];
        /// `[64 rounds, 64]`.
        tensor: In<'a, bf16> [64 * rounds * 64];
        rounds: usize;
        clusters: usize;
        mask0: i32;
        mask1: i32;
    }
}

kernel! {
    /// Rows of the input by index; those outside, and columns past `columns`, are 0.
    pub struct UnitGather = unit_gather {
        /// `[64, 64]`.
        out: Out<'a, bf16> [64 * 64];
        /// `[rows, 64]`.
        input: In<'a, bf16> [64];
        /// `[64]`, below the number of rows.
        index: In<'a, i32> [64];
        columns: usize;
        /// Whether each 8 x 8 matrix is transposed.
        transpose: bool;
        by_mbarrier: bool;
    }
}

kernel! {
    /// The softmax of each row, by warp shuffles, barriers and atomics.
    pub struct UnitSoftmax = unit_softmax {
        /// `[rows, columns]`.
        out: Out<'a, f32> [rows * columns];
        /// `[1]`, added to.
        warps_seen: Out<'a, i32> [1];
        /// `[rows, columns]`.
        input: In<'a, f32> [rows * columns];
        rows: usize;
        columns: usize;
    }
}

kernel! {
    /// A kernel with a fault; the CUDA build refuses to run it.
    pub struct UnitFault = unit_fault {
        /// `[512]`.
        out: Out<'a, i32> [512];
        /// Its number in `kernels/unit_faults.cu`.
        fault: i32;
    }
}
