//! Sums over ranks in device memory: every rank gathers the values of all ranks and adds them in pairs
//! (`kernels/ranks.cu`). The host does not wait, so these sums can be part of a captured step.

use crate::dist::DeviceRanks;
use crate::error::{Error, Result};
use crate::kernels::ranks::{RankFlags, RankSums, RankSumsF64, RankSumsI32};
use crate::kernels::{In, Stream};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use std::ops::Range;

/// Gathers the elements `numbers` of `own`, a tensor in device memory, from all ranks. Returns `[ranks, n]`.
///
/// # Errors
/// Returns an error when a rank has left, or the device's memory cannot be moved.
pub fn gathered(ranks: &DeviceRanks, own: &Tensor, numbers: Range<usize>) -> Result<Tensor> {
    let shape = [ranks.size(), numbers.len()];
    let mut all = Tensor::unspecified(ranks.device(), own.dtype(), shape);
    ranks.all_gather(own.span(numbers), all.span_mut())?;
    Ok(all)
}

/// Writes to `out` the sums over the ranks of the elements of `own`, which are f32, f64 or i32.
///
/// # Errors
/// The same errors as [`gathered`], and for another dtype.
pub fn sum_to(
    ranks: &DeviceRanks,
    out: &mut Tensor,
    own: &Tensor,
    numbers: Range<usize>,
) -> Result<()> {
    let rows = gathered(ranks, own, numbers)?;
    add_rows(ranks, out, &rows)
}

/// Replaces the elements of an f32, f64 or i32 tensor by their sums over the ranks.
///
/// # Errors
/// The same errors as [`sum_to`].
pub fn sum(ranks: &DeviceRanks, tensor: &mut Tensor) -> Result<()> {
    let rows = gathered(ranks, tensor, 0..tensor.elements())?;
    add_rows(ranks, tensor, &rows)
}

fn add_rows(ranks: &DeviceRanks, out: &mut Tensor, rows: &Tensor) -> Result<()> {
    let (elements, stream) = (out.elements(), Stream::of(ranks.device())?);
    macro_rules! add {
        ($kernel:ident) => {
            $kernel {
                out: out.output()?,
                rows: rows.input()?,
                ranks: ranks.size(),
                stride: elements,
                elements,
            }
            .launch(&stream)
        };
    }
    match out.dtype() {
        DType::F32 => add!(RankSums),
        DType::F64 => add!(RankSumsF64),
        DType::I32 => add!(RankSumsI32),
        other => Err(Error::invalid(
            "sum over ranks",
            "f32, f64 or i32 on a device with kernels",
            other.to_string(),
            "this is a bug: no kernel sums elements of this dtype",
        )),
    }
}

/// Combines the flags `[layers, 2]` of a step over all ranks.
///
/// # Errors
/// The same errors as [`gathered`].
pub fn agree_on_flags(ranks: &DeviceRanks, flags: &mut Tensor) -> Result<()> {
    let rows = gathered(ranks, flags, 0..flags.elements())?;
    let rows: In<'_, i32> = rows.input()?;
    let kernel = RankFlags {
        layers: flags.elements() / 2,
        flags: flags.output()?,
        rows,
        ranks: ranks.size(),
    };
    kernel.launch(&Stream::of(ranks.device())?)
}
