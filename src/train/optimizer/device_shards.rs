//! The optimizer's shares in device memory (ZeRO-1): gradients are exchanged and added up in rank order, and the weights that
//! each rank updated go to the others. Nothing here waits for the device, so that a captured step repeats it.

use super::Shards;
use crate::dist::{DeviceRanks, Part};
use crate::error::Result;
use crate::kernels::ranks::RankSums;
use crate::kernels::{Out, Stream};
use crate::model::{Parameter, Places};
use crate::tape::Gradients;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use std::ops::Range;

/// Numbers between two gradients of a received row, for whole vectors.
const ALIGNED: usize = 32;

/// Sums the gradients of this rank's numbers over the ranks, in rank order; the others stay as they are.
///
/// # Errors
/// When a gradient is not f32, a kernel fails, or a rank has left.
pub fn reduce(
    ranks: &DeviceRanks,
    shards: &Shards,
    parameters: &[Parameter],
    gradients: &mut Gradients,
) -> Result<()> {
    let stream = Stream::of(ranks.device())?;
    for bucket in shards.buckets() {
        let mut starts = Vec::with_capacity(parameters.len());
        for i in bucket.clone() {
            let value = &parameters[i].value;
            // A rank without a gradient counts with zeros.
            let gradient = gradients.get_or(i, || {
                Tensor::zeros(value.device(), DType::F32, value.shape())
            });
            gradient.expect_dtype("sum over ranks", "gradient", DType::F32)?;
            starts.push(gradient.pointer_mut::<f32>() as usize);
        }
        let own = |i: usize| shards.own(i).len().next_multiple_of(ALIGNED);
        let row = bucket.clone().map(own).sum::<usize>();
        let mut rows =
            Tensor::unspecified(ranks.device(), DType::F32, [ranks.size(), row.max(ALIGNED)]);
        let stride = rows.shape().width();
        let to = rows.pointer_mut::<f32>() as usize;
        let mut parts = Vec::with_capacity(bucket.len() * ranks.size());
        for peer in 0..ranks.size() {
            let mut at = peer * stride;
            for (i, start) in bucket.clone().zip(&starts) {
                let received = at..at + shards.own(i).len();
                parts.push(Part {
                    peer,
                    send: bytes(*start, &shards.of(i, peer), 4),
                    receive: bytes(to, &received, 4),
                });
                at += own(i);
            }
        }
        // SAFETY: the ranges are those of gradients and of `rows`, whose memory goes to a later launch of the same stream at
        // the earliest.
        unsafe { ranks.exchange(parts) }?;
        let mut at = 0;
        for (i, start) in bucket.clone().zip(starts) {
            let numbers = shards.own(i);
            if !numbers.is_empty() {
                // SAFETY: the address is that of the gradient's numbers.
                let out = unsafe { Out::from_address(start + numbers.start * 4, numbers.len()) };
                let kernel = RankSums {
                    out,
                    rows: rows.input()?.from_element(at),
                    ranks: ranks.size(),
                    stride,
                    elements: numbers.len(),
                };
                kernel.launch(&stream)?;
            }
            at += own(i);
        }
    }
    Ok(())
}

/// Gives every rank the weights that the others updated.
///
/// # Errors
/// When a rank has left.
pub fn gather_weights(
    ranks: &DeviceRanks,
    shards: &Shards,
    parameters: &mut [Parameter],
) -> Result<()> {
    for bucket in shards.buckets() {
        let mut parts = Vec::new();
        for i in bucket.clone() {
            let mut add = |tensor: &mut Tensor| {
                let (width, start) = (tensor.dtype().size(), tensor.pointer_mut::<u8>() as usize);
                for peer in (0..ranks.size()).filter(|peer| *peer != ranks.rank()) {
                    parts.push(Part {
                        peer,
                        send: bytes(start, &shards.own(i), width),
                        receive: bytes(start, &shards.of(i, peer), width),
                    });
                }
            };
            let shared_out = parameters[i].value.lower_share().is_some();
            match parameters[i].value.places() {
                Places::Whole(value) => add(value),
                // Lower halves stay with their ranks, unless every rank has all.
                Places::Split([upper, lower]) => {
                    add(upper);
                    if !shared_out {
                        add(lower);
                    }
                }
            }
        }
        // SAFETY: the ranges are those of the parameters, and this rank's numbers are not received.
        unsafe { ranks.exchange(parts) }?;
    }
    Ok(())
}

fn bytes(start: usize, numbers: &Range<usize>, width: usize) -> Range<usize> {
    start + numbers.start * width..start + numbers.end * width
}
