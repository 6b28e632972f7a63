//! The kernels of `kernels/attention.cu`, `kernels/attention_backward.cu` and `kernels/qkv_rope.cu`.

use crate::device::stream;
use crate::error::Result;
use crate::kernels::launchers::TILE_AUTO;
use crate::ops::heads::Heads;
use crate::ops::rope::RopeTables;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::{launch, query};
use std::ptr::null;

/// Sequence, heads, key and value heads, and their width, as the kernels take them.
fn sizes(heads: Heads, sequence: usize) -> (i32, i32, i32, i32) {
    let Heads {
        query,
        key_value,
        dim,
    } = heads;
    let [s, h, kv, d] = [sequence, query, key_value, dim].map(|n| n as i32);
    (s, h, kv, d)
}

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
    let (sequence, query, key_value, dim) = sizes(heads, sequence);
    // SAFETY: the tensors have the shapes that qkv_rope.cu's header names.
    unsafe {
        launch!(
            device.launchers()?,
            qkv_rope_forward(
                qkv.pointer_mut(),
                x.pointer(),
                w.pointer(),
                cosines.pointer(),
                sines.pointer(),
                tokens as i64,
                sequence,
                query,
                key_value,
                dim,
                x.shape().width() as i32,
                TILE_AUTO,
                stream(),
            )
        )?;
    }
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
    let (sequence, query, key_value, dim) = sizes(heads, sequence);
    // SAFETY: the tensors have the shapes that attention.cu's header names.
    unsafe {
        launch!(
            device.launchers()?,
            attention_forward(
                out.pointer_mut(),
                lse.pointer_mut(),
                qkv.pointer(),
                first_key.map_or(null(), Tensor::pointer),
                tokens as i64,
                sequence,
                query,
                key_value,
                dim,
                stream(),
            )
        )?;
    }
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
    let (device, launchers) = (qkv.device(), qkv.device().launchers()?);
    let tokens = qkv.shape()[0] as i64;
    let (sequence, query, key_value, dim) = sizes(heads, sequence);
    let mut floats = 0u64;
    // SAFETY: it writes one number.
    unsafe {
        query!(
            launchers,
            attention_backward_workspace(&mut floats, tokens, sequence, query)
        )?;
    }
    let mut workspace = Tensor::unspecified(device, DType::F32, [floats as usize]);
    let tables = tables.map(|tables| tables.on(device)).transpose()?;
    let table = |i: usize| tables.as_ref().map_or(null(), |tables| tables[i].pointer());
    let mut dqkv = Tensor::unspecified(device, DType::Bf16, qkv.shape());
    // SAFETY: the tensors have the shapes that attention_backward.cu's header names.
    unsafe {
        launch!(
            launchers,
            attention_backward(
                dqkv.pointer_mut(),
                workspace.pointer_mut(),
                dout.pointer(),
                qkv.pointer(),
                out.pointer(),
                lse.pointer(),
                first_key.map_or(null(), Tensor::pointer),
                table(0),
                table(1),
                tokens,
                sequence,
                query,
                key_value,
                dim,
                stream(),
            )
        )?;
    }
    Ok(dqkv)
}
