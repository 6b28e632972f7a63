//! The sharded optimizer in device memory (ZeRO-1): gradients are exchanged and added in rank order, and the weights
//! that each rank updated are sent to the others. The host does not wait for the device, so this can be part of a
//! captured step.

use super::Shards;
use crate::device::Span;
use crate::dist::{DeviceRanks, Part};
use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::ranks::RankSums;
use crate::model::{Parameter, Places};
use crate::tape::Gradients;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use std::ops::Range;

/// Alignment, in elements, of the gradients in a received row, so that kernels can read complete vectors.
const ALIGNED: usize = 32;

/// Sums the gradients of this rank's share over the ranks, in rank order. The other gradients do not change. A copy on the
/// device moves this rank's own row: no rank sends data to itself.
///
/// # Errors
/// Returns an error when a gradient is not f32, a kernel fails, or a rank has left.
pub fn reduce(
    ranks: &DeviceRanks,
    shards: &Shards,
    parameters: &[Parameter],
    gradients: &mut Gradients,
) -> Result<()> {
    if ranks.size() == 1 {
        // The sum of one row is that row.
        return Ok(());
    }
    let stream = Stream::of(ranks.device())?;
    for bucket in shards.buckets() {
        let mut spans = Vec::with_capacity(bucket.len());
        for i in bucket.clone() {
            let value = &parameters[i].value;
            // A rank without a gradient contributes zeros.
            let zeros = || Tensor::zeros(value.device(), DType::F32, value.shape());
            let gradient = gradients.get_or(i, zeros);
            gradient.expect_dtype("sum over ranks", "gradient", DType::F32)?;
            spans.push(gradient.span_mut());
        }
        let own = |i: usize| shards.own(i).len().next_multiple_of(ALIGNED);
        let stride = bucket.clone().map(own).sum::<usize>().max(ALIGNED);
        let mut rows = Tensor::unspecified(ranks.device(), DType::F32, [ranks.size(), stride]);
        let to = rows.span_mut();
        let mut parts = Vec::with_capacity(bucket.len() * ranks.size());
        for peer in 0..ranks.size() {
            let mut at = peer * stride;
            for (i, span) in bucket.clone().zip(&spans) {
                let send = part(span, &shards.of(i, peer), 4);
                let receive = part(&to, &(at..at + shards.own(i).len()), 4);
                match peer == ranks.rank() {
                    true => receive.copy_from(&send)?,
                    false => parts.push(Part {
                        peer,
                        send,
                        receive,
                    }),
                }
                at += own(i);
            }
        }
        ranks.exchange(parts)?;
        let mut at = 0;
        for i in bucket.clone() {
            let numbers = shards.own(i);
            if let Some(gradient) = gradients.get_mut(i).filter(|_| !numbers.is_empty()) {
                let kernel = RankSums {
                    out: gradient.output()?.from_element(numbers.start),
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

/// Copies to every rank the weights that the other ranks updated.
///
/// # Errors
/// Returns an error when a rank has left.
pub fn gather_weights(
    ranks: &DeviceRanks,
    shards: &Shards,
    parameters: &mut [Parameter],
) -> Result<()> {
    if ranks.size() == 1 {
        return Ok(());
    }
    for bucket in shards.buckets() {
        let mut parts = Vec::new();
        for i in bucket.clone() {
            let mut add = |tensor: &mut Tensor| {
                let (width, span) = (tensor.dtype().size(), tensor.span_mut());
                for peer in (0..ranks.size()).filter(|peer| *peer != ranks.rank()) {
                    parts.push(Part {
                        peer,
                        send: part(&span, &shards.own(i), width),
                        receive: part(&span, &shards.of(i, peer), width),
                    });
                }
            };
            let shared_out = parameters[i].value.lower_share().is_some();
            match parameters[i].value.places() {
                Places::Whole(value) => add(value),
                // Lower halves are not exchanged, unless every rank keeps all of them.
                Places::Split([upper, lower]) => {
                    add(upper);
                    if !shared_out {
                        add(lower);
                    }
                }
            }
        }
        ranks.exchange(parts)?;
    }
    Ok(())
}

fn part(span: &Span, numbers: &Range<usize>, width: usize) -> Span {
    span.part(numbers.start * width..numbers.end * width)
}
