//! The sharded optimizer in device memory (ZeRO-1): gradients are exchanged and added, and the weights that each rank
//! updated are sent to the others; between nodes in two levels, so that few bytes leave a node. The host does not wait
//! for the device, so this can be part of a captured step.

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

/// A transfer between some of the ranks; the transfers of all levels together connect all ranks.
struct Level {
    /// The ranks that exchange data, in rank order.
    group: Vec<usize>,
    /// For each rank of the group, the ranks whose shares it receives from the group.
    shares: Vec<Vec<usize>>,
    /// Position of this rank in the group.
    own: usize,
}

/// Returns the levels in which gradients are summed: within a node, then between nodes. The ranks of a node first sum the
/// shares that they send to other nodes, so that each share leaves a node once: the rank at place r of a node sums the
/// shares of the ranks at place r of every node. A level with a single rank is left out.
fn levels(ranks: &DeviceRanks) -> Vec<Level> {
    let (size, rank, per_node) = (ranks.size(), ranks.rank(), ranks.ranks_per_node());
    let (node, place) = (rank / per_node, rank % per_node);
    let at_place = |place: usize| (place..size).step_by(per_node).collect::<Vec<_>>();
    let within = Level {
        group: (node * per_node..(node + 1) * per_node).collect(),
        shares: (0..per_node).map(at_place).collect(),
        own: place,
    };
    let between = Level {
        group: at_place(place),
        shares: at_place(place).into_iter().map(|rank| vec![rank]).collect(),
        own: node,
    };
    let mut levels = vec![within, between];
    levels.retain(|level| level.group.len() > 1);
    levels
}

/// Sums the gradients of this rank's share over the ranks, in pairs ([`RankSums`]), so that the sums do not depend on the
/// number of ranks on a node. The gradients of other shares are unspecified afterwards. A copy on the device moves this
/// rank's own row: no rank sends data to itself.
///
/// # Errors
/// Returns an error when a gradient is not f32, a kernel fails, or a rank has left.
pub fn reduce(
    ranks: &DeviceRanks,
    shards: &Shards,
    parameters: &[Parameter],
    gradients: &mut Gradients,
) -> Result<()> {
    let levels = levels(ranks);
    if levels.is_empty() {
        // The sum of one row is that row.
        return Ok(());
    }
    for bucket in shards.buckets() {
        for i in bucket.clone() {
            let value = &parameters[i].value;
            // A rank without a gradient contributes zeros.
            let zeros = || Tensor::zeros(value.device(), DType::F32, value.shape());
            let gradient = gradients.get_or(i, zeros);
            gradient.expect_dtype("sum over ranks", "gradient", DType::F32)?;
        }
        for level in &levels {
            reduce_level(ranks, shards, level, bucket, gradients)?;
        }
    }
    Ok(())
}

/// Sums the gradients of a bucket over the ranks of `level`, for the shares that this rank receives.
fn reduce_level(
    ranks: &DeviceRanks,
    shards: &Shards,
    level: &Level,
    bucket: &Range<usize>,
    gradients: &mut Gradients,
) -> Result<()> {
    let stream = Stream::of(ranks.device())?;
    let of_share = |share: usize| bucket.clone().map(move |i| (i, shards.of(i, share)));
    let received = || {
        level.shares[level.own]
            .iter()
            .flat_map(|share| of_share(*share))
    };
    let width = |numbers: &Range<usize>| numbers.len().next_multiple_of(ALIGNED);
    let stride: usize = received().map(|(_, numbers)| width(&numbers)).sum();
    let stride = stride.max(ALIGNED);
    let mut rows = Tensor::unspecified(ranks.device(), DType::F32, [level.group.len(), stride]);
    let to = rows.span_mut();
    let mut parts = Vec::with_capacity(received().count() * level.group.len());
    for (row, (peer, shares)) in level.group.iter().zip(&level.shares).enumerate() {
        let mut at = row * stride;
        let sent = shares.iter().flat_map(|share| of_share(*share));
        for ((i, sent), (_, received)) in sent.zip(received()) {
            let Some(gradient) = gradients.get_mut(i) else {
                continue;
            };
            let send = part(&gradient.span_mut(), &sent, 4);
            let receive = part(&to, &(at..at + received.len()), 4);
            match row == level.own {
                true => receive.copy_from(&send)?,
                false => parts.push(Part {
                    peer: *peer,
                    send,
                    receive,
                }),
            }
            at += width(&received);
        }
    }
    ranks.exchange(parts)?;
    let mut at = 0;
    for (i, numbers) in received() {
        if let Some(gradient) = gradients.get_mut(i).filter(|_| !numbers.is_empty()) {
            let kernel = RankSums {
                out: gradient.output()?.from_element(numbers.start),
                rows: rows.input()?.from_element(at),
                ranks: level.group.len(),
                stride,
                elements: numbers.len(),
            };
            kernel.launch(&stream)?;
        }
        at += width(&numbers);
    }
    Ok(())
}

/// Copies to every rank the weights that the other ranks updated: between nodes first, then within each node.
///
/// # Errors
/// Returns an error when a rank has left.
pub fn gather_weights(
    ranks: &DeviceRanks,
    shards: &Shards,
    parameters: &mut [Parameter],
) -> Result<()> {
    let levels = levels(ranks);
    for bucket in shards.buckets() {
        for level in levels.iter().rev() {
            let mut parts = Vec::new();
            for i in bucket.clone() {
                let shared_out = parameters[i].value.lower_share().is_some();
                match parameters[i].value.places() {
                    Places::Whole(value) => gather_level(shards, level, i, value, &mut parts),
                    // Lower halves are not exchanged, unless every rank keeps all of them.
                    Places::Split([upper, lower]) => {
                        gather_level(shards, level, i, upper, &mut parts);
                        if !shared_out {
                            gather_level(shards, level, i, lower, &mut parts);
                        }
                    }
                }
            }
            ranks.exchange(parts)?;
        }
    }
    Ok(())
}

/// Adds the transfers of parameter `i`, whose weights are `tensor`, between the ranks of `level`.
fn gather_level(
    shards: &Shards,
    level: &Level,
    i: usize,
    tensor: &mut Tensor,
    parts: &mut Vec<Part>,
) {
    let (width, span) = (tensor.dtype().size(), tensor.span_mut());
    let own = &level.shares[level.own];
    for (row, (peer, shares)) in level.group.iter().zip(&level.shares).enumerate() {
        let shares = own.iter().zip(shares).filter(|_| row != level.own);
        parts.extend(shares.map(|(sent, received)| Part {
            peer: *peer,
            send: part(&span, &shards.of(i, *sent), width),
            receive: part(&span, &shards.of(i, *received), width),
        }));
    }
}

fn part(span: &Span, numbers: &Range<usize>, width: usize) -> Span {
    span.part(numbers.start * width..numbers.end * width)
}
