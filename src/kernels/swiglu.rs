//! `kernels/swiglu.cu`: the activation of dense layers (Shazeer, arXiv 2002.05202), `a = silu(gate) ⊙ up` with
//! `silu(z) = z σ(z)`; h `[R, 2F]` holds gate in its first F columns, then up.

use super::cost::Cost;
use super::{In, Out, kernel};
use half::bf16;

kernel! {
    /// `a = silu(gate) ⊙ up`, assigned.
    pub struct SwigluForward = swiglu_forward {
        /// `[R, F]`.
        a: Out<'a, bf16> [rows * ffn];
        /// `[R, 2F]`.
        h: In<'a, bf16> [2 * rows * ffn];
        /// R, the number of rows.
        rows: usize;
        /// F, the inner width of the feed-forward network.
        ffn: usize;
    }
}

impl SwigluForward<'_> {
    /// The cost for this many rows.
    pub fn cost(rows: usize, ffn: usize) -> Cost {
        Cost::new(0, 6 * rows * ffn)
    }
}

kernel! {
    /// `dgate = da ⊙ up ⊙ σ (1 + gate (1 − σ))`, `dup = da ⊙ gate σ`, assigned.
    pub struct SwigluBackward = swiglu_backward {
        /// `[R, 2F]`.
        dh: Out<'a, bf16> [2 * rows * ffn];
        /// `[R, F]`.
        da: In<'a, bf16> [rows * ffn];
        /// `[R, 2F]`.
        h: In<'a, bf16> [2 * rows * ffn];
        /// R, the number of rows.
        rows: usize;
        /// F, the inner width of the feed-forward network.
        ffn: usize;
    }
}

impl SwigluBackward<'_> {
    /// The cost for this many rows.
    pub fn cost(rows: usize, ffn: usize) -> Cost {
        Cost::new(0, 10 * rows * ffn)
    }
}
