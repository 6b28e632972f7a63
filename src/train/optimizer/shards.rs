//! The share of the optimizer on each rank (ZeRO-1, Rajbhandari et al., 1910.02054): a slice of consecutive blocks of
//! every parameter. A rank sums the gradients of its slices over all ranks, keeps their moments and updates their
//! weights, and then sends these weights to the other ranks.
//!
//! Slices begin at multiples of [`BLOCK`], so that partial sums of the gradient's norm and the draws of stochastic
//! rounding are the same as without sharding.

use super::{BLOCK, on_cpu, reference};
use crate::device::Memory;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::model::Parameter;
use crate::tape::Gradients;
use crate::tensor::Tensor;
use crate::tensor::cpu::vectorized;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of parameters that are transferred at a time.
pub const BUCKET: usize = 8 << 20;

/// The division of the elements of each parameter among the ranks.
pub struct Shards {
    rank: usize,
    size: usize,
    /// Whether the parameters are sharded, even if there is only one rank.
    shared_out: bool,
    /// Number of elements of each parameter.
    elements: Vec<usize>,
    /// Ranges of consecutive parameters that are transferred together.
    buckets: Vec<Range<usize>>,
    dtype: DType,
}

impl Shards {
    /// Returns the slices of rank `rank` of `size` ranks.
    pub fn new(parameters: &[Parameter], rank: usize, size: usize) -> Self {
        let dtype = parameters.first().map_or(DType::F32, |p| p.value.dtype());
        let elements: Vec<usize> = parameters.iter().map(|p| p.value.elements()).collect();
        let (mut buckets, mut first, mut bytes) = (Vec::new(), 0, 0);
        for (i, n) in elements.iter().enumerate() {
            bytes += n * dtype.size();
            if bytes >= BUCKET || i + 1 == elements.len() {
                buckets.push(first..i + 1);
                (first, bytes) = (i + 1, 0);
            }
        }
        Shards {
            rank,
            size,
            shared_out: size > 1,
            elements,
            buckets,
            dtype,
        }
    }

    /// Ranges of consecutive parameters that are transferred together.
    pub(super) fn buckets(&self) -> &[Range<usize>] {
        &self.buckets
    }

    /// Returns the number of blocks of `block` elements in the largest share of a rank; `block` must divide the block
    /// size of the slices.
    pub(super) fn most_blocks(&self, block: usize) -> usize {
        self.most(&(0..self.elements.len()), |n| n.div_ceil(block))
    }

    /// Returns the largest share of a rank of these parameters, where a share of n elements of one counts as `size` of n.
    fn most(&self, parameters: &Range<usize>, size: impl Fn(usize) -> usize) -> usize {
        let of_rank = |rank| {
            let sizes = parameters.clone().map(|i| size(self.of(i, rank).len()));
            sizes.sum()
        };
        (0..self.size).map(of_rank).max().unwrap_or(0)
    }

    /// Returns shares that use the sharded form even with one rank.
    pub fn shared_out(self) -> Self {
        Shards {
            shared_out: true,
            ..self
        }
    }

    /// Returns whether the optimizer is not sharded.
    pub fn is_whole(&self) -> bool {
        !self.shared_out
    }

    /// Returns the elements of parameter `parameter` that belong to `rank`.
    pub fn of(&self, parameter: usize, rank: usize) -> Range<usize> {
        let n = self.elements[parameter];
        let blocks = n.div_ceil(BLOCK);
        let start = |rank: usize| (rank * blocks / self.size * BLOCK).min(n);
        start(rank)..start(rank + 1)
    }

    /// Returns the elements of parameter `parameter` that belong to this rank.
    pub fn own(&self, parameter: usize) -> Range<usize> {
        self.of(parameter, self.rank)
    }

    /// Returns this rank's part of a complete tensor.
    ///
    /// # Errors
    /// Returns an error when the tensor is shorter.
    pub fn cut(&self, parameter: usize, whole: Tensor) -> Result<Tensor> {
        if self.is_whole() {
            return Ok(whole);
        }
        let own = self.own(parameter);
        let width = whole.dtype().size();
        let mut cut = Tensor::unspecified(whole.device(), whole.dtype(), [own.len()]);
        let bytes = whole.bytes().get(own.start * width..own.end * width);
        let bytes = bytes.ok_or_else(|| {
            let expected = format!("{} numbers", own.end);
            let got = format!("{} of them", whole.elements());
            let help = "this is a bug: please report it";
            Error::invalid("checkpoint", expected, got, help)
        })?;
        cut.bytes_mut().copy_from_slice(bytes);
        Ok(cut)
    }

    /// Returns the bytes of the largest share of a bucket, with `width` bytes per element.
    fn row(&self, bucket: &Range<usize>, width: usize) -> usize {
        (self.most(bucket, |n| n) * width).next_multiple_of(8)
    }

    /// Returns the parameters of a bucket, and for each the bytes of a rank's share in its tensor and in the rank's row.
    fn places(
        &self,
        bucket: &Range<usize>,
        rank: usize,
    ) -> impl Iterator<Item = (usize, [Range<usize>; 2])> {
        let mut at = 0;
        bucket.clone().map(move |i| {
            let part = bytes_of(&self.of(i, rank), self.dtype.size());
            let first = at;
            at += part.len();
            (i, [part, first..at])
        })
    }

    /// Sums the gradients of this rank's share over the ranks, in f64 and in rank order. The other gradients do not
    /// change.
    ///
    /// # Errors
    /// Returns an error when a dtype is not real, and the errors of [`Collective::exchange`].
    pub fn reduce(
        &self,
        dist: &dyn Collective,
        parameters: &[Parameter],
        gradients: &mut Gradients,
    ) -> Result<()> {
        for bucket in &self.buckets {
            let row = self.row(bucket, self.dtype.size());
            let new = || Memory::unspecified(row * self.size);
            let mut send = new();
            for i in bucket.clone() {
                // A rank without a gradient contributes zeros.
                let value = &parameters[i].value;
                let zeros = || Tensor::zeros(value.device(), value.dtype(), value.shape());
                gradients.get_or(i, zeros);
            }
            let to = send.bytes_mut().chunks_mut(row.max(1)).enumerate();
            for (rank, to) in to.filter(|(rank, _)| *rank != self.rank) {
                for (i, [part, place]) in self.places(bucket, rank) {
                    if let Some(gradient) = gradients.get(i) {
                        to[place].copy_from_slice(&gradient.bytes()[part]);
                    }
                }
            }
            let [_, received] = dist.exchange_owned(send, new())?;
            for (i, [part, place]) in self.places(bucket, self.rank) {
                if let Some(gradient) = gradients.get_mut(i) {
                    let rows = received.bytes().chunks(row.max(1));
                    let rows: Vec<&[u8]> = rows.map(|r| &r[place.clone()]).collect();
                    let own = &mut gradient.bytes_mut()[part];
                    add(self.dtype, &rows, self.rank, own)?;
                }
            }
        }
        Ok(())
    }

    /// Returns √(Σ g²) over all gradients. The gradients of each rank's share must already be summed over the ranks.
    ///
    /// # Errors
    /// Returns an error when a dtype is not real, and the errors of [`Collective::all_gather`].
    pub fn norm(&self, dist: &dyn Collective, gradients: &Gradients) -> Result<f64> {
        let blocks = |i: usize, rank: usize| self.of(i, rank).len().div_ceil(BLOCK);
        let all = 0..self.elements.len();
        let most = self.most_blocks(BLOCK);
        let mut partials = Vec::with_capacity(most);
        for i in all.clone() {
            let own = self.own(i);
            match gradients.get(i) {
                None => partials.extend(vec![0.0; blocks(i, self.rank)]),
                Some(g) => with_real!(g.dtype(), "gradient_norm", |T| {
                    partials.extend(reference::partial_squares(&g.slice::<T>()[own]));
                    Ok(())
                })?,
            }
        }
        partials.resize(most, 0.0);
        let gathered = dist.gather(&partials)?;
        let mut next: Vec<usize> = (0..self.size).map(|rank| rank * most).collect();
        let mut squares = 0.0;
        for i in all {
            // The blocks of a parameter are ordered by rank.
            let of_parameter = (0..self.size).flat_map(|rank| {
                let first = next[rank];
                next[rank] += blocks(i, rank);
                first..next[rank]
            });
            squares += of_parameter.map(|at| gathered[at]).sum::<f64>();
        }
        Ok(squares.sqrt())
    }

    /// Copies to every rank the weights that the other ranks updated.
    ///
    /// # Errors
    /// Returns an error when a parameter is not on the CPU, and the errors of [`Collective::all_gather`].
    pub fn gather_weights(
        &self,
        dist: &dyn Collective,
        parameters: &mut [Parameter],
    ) -> Result<()> {
        let whole = parameters.iter_mut().map(on_cpu);
        let mut whole = whole.collect::<Result<Vec<_>>>()?;
        for bucket in &self.buckets {
            let row = self.row(bucket, self.dtype.size());
            let mut own = Memory::unspecified(row);
            for (i, [part, place]) in self.places(bucket, self.rank) {
                own.bytes_mut()[place].copy_from_slice(&whole[i].bytes()[part]);
            }
            let [_, all] = dist.all_gather_owned(own, Memory::unspecified(row * self.size))?;
            let rows = all.bytes().chunks(row.max(1)).enumerate();
            for (rank, from) in rows.filter(|(rank, _)| *rank != self.rank) {
                for (i, [part, place]) in self.places(bucket, rank) {
                    whole[i].bytes_mut()[part].copy_from_slice(&from[place]);
                }
            }
        }
        Ok(())
    }

    /// Returns on rank 0 the complete tensor of which each rank has the part `own`, and `None` on the other ranks.
    /// Only one complete tensor exists at a time.
    ///
    /// # Errors
    /// The errors of [`Collective::all_gather`].
    pub fn collect(&self, dist: &dyn Collective, i: usize, own: &Tensor) -> Result<Option<Tensor>> {
        let (dtype, n) = (own.dtype(), self.elements[i]);
        let width = dtype.size();
        let row = self.row(&(i..i + 1), width);
        let (mut sent, mut all) = (vec![0; row], vec![0; row * self.size]);
        sent[..own.bytes().len()].copy_from_slice(own.bytes());
        dist.all_gather(&sent, &mut all)?;
        if self.rank != 0 {
            return Ok(None);
        }
        let mut whole = Tensor::unspecified(own.device(), dtype, [n]);
        for rank in 0..self.size {
            let part = bytes_of(&self.of(i, rank), width);
            let from = &all[rank * row..][..part.len()];
            whole.bytes_mut()[part].copy_from_slice(from);
        }
        Ok(Some(whole))
    }
}

fn bytes_of(numbers: &Range<usize>, width: usize) -> Range<usize> {
    numbers.start * width..numbers.end * width
}

/// Adds rows in f64, in order, and rounds the sums once; row `own` is in `total`.
fn add(dtype: DType, rows: &[&[u8]], own: usize, total: &mut [u8]) -> Result<()> {
    /// Number of sums on the stack.
    const PART: usize = 256;
    with_real!(dtype, "sum over ranks", |T| {
        let rows: Vec<&[T]> = rows.iter().map(|row| bytemuck::cast_slice(row)).collect();
        let total: &mut [T] = bytemuck::cast_slice_mut(total);
        let blocks = total.par_chunks_mut(BLOCK).enumerate();
        blocks.for_each(|(block, total)| {
            let rows: Vec<&[T]> = rows.iter().map(|row| &row[block * BLOCK..]).collect();
            vectorized(
                #[inline(always)]
                || {
                    for (part, total) in total.chunks_mut(PART).enumerate() {
                        let mut sums = [0.0; PART];
                        for (r, row) in rows.iter().enumerate() {
                            let row = if r == own {
                                &*total
                            } else {
                                &row[part * PART..]
                            };
                            let row = sums.iter_mut().zip(row);
                            match r {
                                0 => row.for_each(|(sum, x)| *sum = x.f64()),
                                _ => row.for_each(|(sum, x)| *sum += x.f64()),
                            }
                        }
                        let sums = total.iter_mut().zip(sums);
                        sums.for_each(|(total, sum)| *total = T::of(sum));
                    }
                },
            );
        });
        Ok(())
    })
}
