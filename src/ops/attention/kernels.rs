//! The kernels of `kernels/attention.cu`, `kernels/attention_backward.cu` and `kernels/qkv_rope.cu`.

use crate::error::Result;
use crate::kernels::attention_backward::workspace;
use crate::kernels::launchers::TILE_AUTO;
use crate::kernels::{AttentionBackward, AttentionForward, QkvRopeForward, Stream};
use crate::ops::heads::Heads;
use crate::ops::rope::RopeTables;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;

/// `x Wᵀ [T, (H + 2 KV) hd]`, its queries and keys turned.
///
/// # Errors
/// When x or W is not bf16, or a size is not one of the kernel's.
pub fn project(
    x: &Tensor,
    w: &Tensor,
    tables: &RopeTables,
    heads: Heads,
    sequence: usize,
) -> Result<Tensor> {
    for (what, t) in [("x", x), ("weight", w)] {
        t.expect_dtype("attention", what, DType::Bf16)?;
    }
    let (device, tokens) = (x.device(), x.shape().rows());
    let [cosines, sines] = tables.on(device)?;
    let mut qkv = Tensor::unspecified(device, DType::Bf16, [tokens, heads.row_width()]);
    QkvRopeForward {
        out: qkv.output()?,
        x: x.input()?,
        w: w.input()?,
        cosines: cosines.input()?,
        sines: sines.input()?,
        tokens,
        sequence,
        heads: heads.query,
        key_value_heads: heads.key_value,
        head_width: heads.dim,
        hidden: x.shape().width(),
        tile: TILE_AUTO,
    }
    .launch(&Stream::of(device)?)?;
    Ok(qkv)
}

/// The output `[T, H hd]`, and log Σ exp of the scaled scores `[T / S, H, S]`, S = `sequence`. Row r of a
/// sequence sees the keys `first_key[r] … r`, numbers in its sequence that do not decrease (`[T]`, i32; none: 0).
///
/// # Errors
/// When qkv is not bf16, or a size is not one of the kernel's.
pub fn forward(
    qkv: &Tensor,
    first_key: Option<&Tensor>,
    heads: Heads,
    sequence: usize,
) -> Result<[Tensor; 2]> {
    qkv.expect_dtype("attention", "qkv", DType::Bf16)?;
    let (device, tokens) = (qkv.device(), qkv.shape()[0]);
    let mut out = Tensor::unspecified(device, DType::Bf16, [tokens, heads.query * heads.dim]);
    let mut lse = Tensor::unspecified(device, DType::F32, [tokens, heads.query]);
    AttentionForward {
        out: out.output()?,
        log_sum_exp: lse.output()?,
        qkv: qkv.input()?,
        first_key: first_key.map(Tensor::input).transpose()?,
        tokens,
        sequence,
        heads: heads.query,
        key_value_heads: heads.key_value,
        head_width: heads.dim,
    }
    .launch(&Stream::of(device)?)?;
    Ok([out, lse])
}

/// The gradient of qkv, from that of the output and what [`forward`] gave; with `tables` of what was turned to qkv.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    dout: &Tensor,
    qkv: &Tensor,
    [out, lse]: [&Tensor; 2],
    first_key: Option<&Tensor>,
    tables: Option<&RopeTables>,
    heads: Heads,
    sequence: usize,
) -> Result<Tensor> {
    dout.expect_dtype("attention", "the output's gradient", DType::Bf16)?;
    let (device, tokens) = (qkv.device(), qkv.shape()[0]);
    let stream = Stream::of(device)?;
    let floats = workspace(stream.launchers(), tokens, sequence, heads.query)?;
    let mut space = Tensor::unspecified(device, DType::F32, [floats]);
    let tables = tables.map(|tables| tables.on(device)).transpose()?;
    let table = |i: usize| tables.as_ref().map(|tables| tables[i].input()).transpose();
    let mut dqkv = Tensor::unspecified(device, DType::Bf16, qkv.shape());
    AttentionBackward {
        dqkv: dqkv.output()?,
        workspace: space.output()?,
        dout: dout.input()?,
        qkv: qkv.input()?,
        out: out.input()?,
        log_sum_exp: lse.input()?,
        first_key: first_key.map(Tensor::input).transpose()?,
        cosines: table(0)?,
        sines: table(1)?,
        tokens,
        sequence,
        heads: heads.query,
        key_value_heads: heads.key_value,
        head_width: heads.dim,
    }
    .launch(&stream)?;
    Ok(dqkv)
}
