//! The kernels of `kernels/attention.cu`, `kernels/attention_backward.cu` and `kernels/qkv_rope.cu`.

use crate::error::Result;
use crate::kernels::attention_backward::workspace;
use crate::kernels::launchers::TILE_AUTO;
use crate::kernels::{AttentionBackward, AttentionForward, QkvRopeForward, Stream};
use crate::ops::heads::Heads;
use crate::ops::rope::RopeTables;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;

/// Returns `x Wᵀ [T, (H + 2 KV) hd]` with its queries and keys rotated (RoPE).
///
/// # Errors
/// Returns an error when x or W is not bf16, or the kernel does not support a size.
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

/// Returns the output `[T, H hd]` and log Σ exp of the scaled scores `[T / S, H, S]`, S = `sequence`. Row r of a
/// sequence attends to the keys `first_key[r] … r`. `first_key [T]` (i32) holds indices within the sequence that do
/// not decrease; without it the first key is 0.
///
/// # Errors
/// Returns an error when qkv is not bf16, or the kernel does not support a size.
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

/// Returns the gradient of qkv from the gradient of the output and the results of [`forward`]. With `tables`, it is
/// the gradient of the values before rotation.
///
/// # Errors
/// The same errors as [`forward`].
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
