//! `kernels/attention_backward.cu`: the gradient of attention, from the outputs of forward and dout.
//!
//! `delta_r = ⟨dout_r, out_r⟩`; `P = exp(S / √d − log_sum_exp)`, `S = Q Kᵀ`; `dS = P ⊙ (dout Vᵀ − delta) / √d`; `dQ = dS K`;
//! `dK = dSᵀ Q` and `dV = Pᵀ dout`, summed over the query heads of a key head. Shapes are those of `attention.rs`.

use super::attention::AttentionSizes;
use super::cost::Cost;
use super::{In, Out, host_function, kernel};
use half::bf16;

kernel! {
    /// Computes dqkv, assigned. With cosines and sines, it is the gradient of qkv before their rotation (`rope.rs`).
    pub struct AttentionBackward = attention_backward {
        /// `[T, (H + 2 KV)·d]`.
        dqkv: Out<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
        /// [`workspace`] f32 elements.
        workspace: Out<'a, f32> => workspace(tokens, sequence, heads);
        /// `[T, H·d]`.
        dout: In<'a, bf16> [tokens * heads * head_width];
        /// `[T, (H + 2 KV)·d]`.
        qkv: In<'a, bf16> [tokens * (heads + 2 * key_value_heads) * head_width];
        /// `[T, H·d]`.
        out: In<'a, bf16> [tokens * heads * head_width];
        /// `[B, H, S]`.
        log_sum_exp: In<'a, f32> [tokens * heads];
        /// `[T]`.
        first_key: Option<In<'a, i32>> [tokens];
        /// `[S, d / 2]`.
        cosines: Option<In<'a, f32>> [sequence * (head_width / 2)];
        /// `[S, d / 2]`.
        sines: Option<In<'a, f32>> [sequence * (head_width / 2)];
        /// T, the number of tokens.
        tokens: usize;
        /// S, the number of tokens in a sequence.
        sequence: usize;
        /// H, the number of query heads.
        heads: usize;
        /// KV, the number of key heads, and of value heads.
        key_value_heads: usize;
        /// d, the width of a head.
        head_width: usize;
    }
}

host_function! {
    /// Number of f32 elements of the workspace.
    pub fn workspace = attention_backward_workspace(tokens: usize, sequence: usize, heads: usize) -> u64
}

impl AttentionBackward<'_> {
    /// The cost of the launch's three kernels, without document boundaries.
    pub fn cost(s: &AttentionSizes) -> Cost {
        let (lines, tiles) = (s.sequences * s.heads, s.sequence.div_ceil(128));
        let rows_of_keys = |tile: usize| s.sequence.next_multiple_of(64) - 128 * tile;
        let step = if s.width == 64 { 128 } else { 64 };
        let rows_of_queries = |tile: usize| s.sequence.min(128 * (tile + 1)).next_multiple_of(step);
        let products: usize = (0..tiles)
            .map(|tile| 4 * rows_of_keys(tile) + 3 * rows_of_queries(tile))
            .sum();
        let rows = s.sequences * s.sequence;
        let elements = rows * s.width * (7 * s.heads + 6 * s.key_value_heads);
        let statistics = 4 * lines * s.sequence + 24 * lines * 128 * tiles;
        Cost::new(
            2 * 128 * s.width * lines * products,
            2 * elements + statistics,
        )
    }
}
