//! What a kernel costs: its floating-point operations on tensor cores and the bytes it must move, from its sizes. The
//! formulas are those of the headers in `kernels/`; the tests hold the simulator's counters against them.

use crate::kernels::cost::padded_experts;
pub use crate::kernels::cost::{
    Cost, H200_BYTES_PER_SECOND as BYTES_PER_SECOND, H200_FLOPS_PER_SECOND as FLOPS_PER_SECOND,
    Sizes,
};

/// `kernels/dispatch.cu` with a list of choices.
pub fn dispatch_choices(s: &Sizes) -> Cost {
    Cost::new(0, 12 * s.tokens * s.slots + 8 * s.rows)
}

/// `kernels/grouped_swiglu.cu`, forward.
pub fn grouped_swiglu_forward(s: &Sizes) -> Cost {
    let Sizes {
        rows,
        hidden,
        ffn,
        experts,
        ..
    } = *s;
    Cost::new(
        4 * rows * ffn * hidden,
        2 * rows * (hidden + 3 * ffn) + 4 * experts * ffn * hidden,
    )
}

/// `kernels/grouped_swiglu.cu`, backward, with `dot_columns` partial dots a row.
pub fn grouped_swiglu_backward(s: &Sizes, dot_columns: usize) -> Cost {
    let Sizes {
        rows,
        hidden,
        ffn,
        experts,
        ..
    } = *s;
    Cost::new(
        2 * rows * ffn * hidden,
        2 * rows * (hidden + 5 * ffn) + 2 * experts * ffn * hidden + 4 * rows * (dot_columns + 2),
    )
}

/// `kernels/grouped_down.cu`, with or without the column sums of which the experts' means are made.
pub fn grouped_down_forward(s: &Sizes, column_sums: bool) -> Cost {
    let forward = grouped_gemm(s.rows, s.experts, s.hidden, s.ffn);
    let sums = 4 * s.hidden * (s.rows / 64 + s.experts) + 8 * s.rows;
    forward + Cost::new(0, if column_sums { sums } else { 0 })
}

/// `kernels/grouped_gemm.cu`, forward or input gradient: `rows` times W [groups, n, k] in bf16.
pub fn grouped_gemm(rows: usize, groups: usize, n: usize, k: usize) -> Cost {
    Cost::new(2 * rows * n * k, 2 * (rows * k + groups * n * k + rows * n))
}

/// `kernels/grouped_gemm.cu`, gradient of W [groups, n, k] in f32.
pub fn grouped_gemm_weight_gradient(
    rows: usize,
    groups: usize,
    n: usize,
    k: usize,
    accumulate: bool,
) -> Cost {
    let weights = if accumulate { 8 } else { 4 } * groups * n * k;
    Cost::new(2 * rows * n * k, 2 * rows * (n + k) + weights)
}

/// `kernels/expert_mean.cu`: at most; an expert's last block of 64 rows may be short.
pub fn expert_sums(s: &Sizes) -> Cost {
    let lines = s.rows / 64 + s.experts;
    Cost::new(
        0,
        4 * s.hidden * (lines + s.experts) + 8 * s.rows + 16 * s.experts,
    )
}

/// `kernels/expert_mean.cu`: every expert has rows.
pub fn expert_mean_update(s: &Sizes) -> Cost {
    Cost::new(0, 12 * s.experts * s.hidden)
}

/// `kernels/combine.cu` with a list of choices.
pub fn combine(s: &Sizes, gates: bool, vectors: bool, accumulate: bool) -> Cost {
    let mut bytes = 2 * s.hidden * (s.rows + s.tokens) + 4 * s.slots * s.tokens;
    if accumulate {
        bytes += 2 * s.hidden * s.tokens;
    }
    if gates {
        bytes += 4 * s.slots * s.tokens;
    }
    if !vectors {
        return Cost::new(0, bytes + if gates { 4 * s.rows } else { 0 });
    }
    let flops = 6
        * s.tokens.next_multiple_of(64)
        * padded_experts(s.experts)
        * s.hidden.next_multiple_of(128);
    Cost::new(flops, bytes + 4 * s.experts * (s.tokens + s.hidden))
}

/// `kernels/gate_gradient.cu` with a list of choices and `dot_columns` partial dots a row.
pub fn gate_gradient(s: &Sizes, vectors: bool, dot_columns: usize) -> Cost {
    let bytes = 4 * s.tokens * (s.experts + 2 * s.slots) + 4 * s.rows * dot_columns;
    if !vectors {
        return Cost::new(0, bytes);
    }
    let experts = match s.experts {
        0..=16 => 16,
        17..=32 => 32,
        e => e.next_multiple_of(64),
    };
    let flops = 4 * s.tokens.next_multiple_of(128) * experts * s.hidden.next_multiple_of(64);
    Cost::new(
        flops,
        bytes + 2 * s.tokens * s.hidden + 4 * s.experts * s.hidden,
    )
}

/// The sizes of an attention layer's kernels.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSizes {
    /// B.
    pub sequences: usize,
    /// S.
    pub sequence: usize,
    /// H.
    pub heads: usize,
    pub key_value_heads: usize,
    /// d, of a head.
    pub width: usize,
}

/// `kernels/attention.cu`, without document boundaries.
pub fn attention_forward(s: &AttentionSizes) -> Cost {
    let (lines, tiles) = (s.sequences * s.heads, s.sequence.div_ceil(128));
    let flops = 4 * 128 * 128 * s.width * lines * tiles * (tiles + 1) / 2;
    let rows = s.sequences * s.sequence;
    let bytes = 4 * rows * (s.heads + s.key_value_heads) * s.width + 4 * rows * s.heads;
    Cost::new(flops, bytes)
}

/// `kernels/attention_backward.cu`, without document boundaries: its three kernels.
pub fn attention_backward(s: &AttentionSizes) -> Cost {
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

/// `kernels/rope.cu`, forward or back.
pub fn rope(
    tokens: usize,
    sequence: usize,
    heads: usize,
    key_value_heads: usize,
    width: usize,
) -> Cost {
    let row = (heads + 2 * key_value_heads) * width;
    Cost::new(0, 4 * tokens * row + 4 * sequence * width)
}

/// `kernels/qkv_rope.cu`, of so many columns of queries, keys and values.
pub fn qkv_rope_forward(tokens: usize, columns: usize, hidden: usize) -> Cost {
    let elements = tokens * hidden + columns * hidden + tokens * columns;
    Cost::new(2 * tokens * columns * hidden, 2 * elements)
}
