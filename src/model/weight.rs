//! The value of a parameter: in one tensor, or in two halves.
//!
//! Kernels read bf16 and the optimizer needs f32. A device with kernels keeps an f32 number w as `upper`, w rounded
//! to bf16 with ties away from zero, which operations read, and `lower`, an i16 with
//! `bits(w) = (upper << 16) + lower` modulo 2^32: The two take four bytes and are exact for every bit pattern. A rank
//! that updates a share of the elements needs the lower halves of that share only.

use crate::device::Device;
use crate::error::Result;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;
use half::bf16;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Number of elements that one thread converts at a time.
const BLOCK: usize = 1 << 16;

/// The value of a parameter.
#[derive(Clone)]
pub struct Weight(Form);

#[derive(Clone)]
enum Form {
    /// One tensor: f64 or f32 on the CPU, or f32 on any device if operations read the parameter in f32.
    Whole(Tensor),
    Split {
        upper: Tensor,
        /// The lower halves of the elements `own`, or of all elements.
        lower: Tensor,
        own: Option<Range<usize>>,
    },
}

/// Splits an f32 number into its upper and lower half.
fn split(w: f32) -> (bf16, i16) {
    let bits = w.to_bits();
    let upper = bits.wrapping_add(0x8000) >> 16;
    let lower = bits.wrapping_sub(upper << 16);
    (bf16::from_bits(upper as u16), lower as u16 as i16)
}

/// Joins two halves to the f32 number.
fn join(upper: bf16, lower: i16) -> f32 {
    let upper = u32::from(upper.to_bits()) << 16;
    f32::from_bits(upper.wrapping_add_signed(i32::from(lower)))
}

impl Weight {
    /// Wraps a value for operations on `device`, which read it in f32 if `exact`.
    pub fn new(value: Tensor, device: Device, exact: bool) -> Self {
        if device == Device::Cpu || exact {
            return Weight(Form::Whole(value.on(device)));
        }
        let new = |dtype| Tensor::unspecified(device, dtype, value.shape());
        let (mut upper, mut lower) = (new(DType::Bf16), new(DType::I16));
        let halves = upper.slice_mut::<bf16>().par_chunks_mut(BLOCK);
        let halves = halves.zip(lower.slice_mut::<i16>().par_chunks_mut(BLOCK));
        let numbers = value.slice::<f32>().par_chunks(BLOCK);
        halves.zip(numbers).for_each(|((upper, lower), numbers)| {
            for ((u, l), &w) in upper.iter_mut().zip(lower).zip(numbers) {
                (*u, *l) = split(w);
            }
        });
        Weight(Form::Split {
            upper,
            lower,
            own: None,
        })
    }

    /// Returns the tensor that operations read.
    pub fn working(&self) -> &Tensor {
        match &self.0 {
            Form::Whole(value) => value,
            Form::Split { upper, .. } => upper,
        }
    }

    /// Returns the complete value. If it is split, this is a new CPU tensor. An element whose lower half is on
    /// another rank has the rounded value that operations read.
    pub fn whole(&self) -> Tensor {
        match &self.0 {
            Form::Whole(value) => value.clone(),
            Form::Split { upper, lower, own } => {
                let mut value = Tensor::unspecified(Device::Cpu, DType::F32, upper.shape());
                match own {
                    None => joined(value.slice_mut(), upper.slice(), lower.slice()),
                    Some(own) => {
                        let mut all = vec![0; upper.elements()];
                        all[own.clone()].copy_from_slice(lower.slice());
                        joined(value.slice_mut(), upper.slice(), &all);
                    }
                }
                value
            }
        }
    }

    /// If the value is split, keeps only the lower halves of the elements `numbers`: other ranks keep the rest.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    ///
    /// # Panics
    /// Panics when some of these lower halves are not on this rank.
    pub fn keep_lower_halves(&mut self, numbers: Range<usize>) -> Result<()> {
        let Form::Split { upper, lower, own } = &mut self.0 else {
            return Ok(());
        };
        let there = own.clone().unwrap_or(0..upper.elements());
        assert!(
            there.start <= numbers.start && numbers.end <= there.end,
            "lower halves of {there:?}"
        );
        let kept = 2 * (numbers.start - there.start)..2 * (numbers.end - there.start);
        let kept = lower.copied_bytes(kept)?;
        let mut share = Tensor::unspecified(lower.device(), DType::I16, [numbers.len()]);
        share.bytes_mut().copy_from_slice(&kept);
        (*lower, *own) = (share, Some(numbers));
        Ok(())
    }

    /// Returns this rank's lower halves, if they are distributed over the ranks.
    pub fn lower_share(&self) -> Option<&Tensor> {
        match &self.0 {
            Form::Split { lower, own, .. } => own.as_ref().map(|_| lower),
            Form::Whole(_) => None,
        }
    }

    /// Returns the bytes of the elements `numbers`, from the upper halves of this rank and all `lower` halves.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn bytes_with(&self, lower: &Tensor, numbers: Range<usize>) -> Result<Vec<u8>> {
        let half = |t: &Tensor| t.copied_bytes(2 * numbers.start..2 * numbers.end);
        Ok(joined_bytes(&half(self.working())?, &half(lower)?))
    }

    /// Applies `f` to the complete value and stores the result.
    pub fn change<R>(&mut self, f: impl FnOnce(&mut Tensor) -> R) -> R {
        match &mut self.0 {
            Form::Whole(value) => f(value),
            Form::Split { upper, .. } => {
                let device = upper.device();
                let mut value = self.whole();
                let result = f(&mut value);
                *self = Weight::new(value, device, false);
                result
            }
        }
    }

    /// Replaces the value.
    ///
    /// # Panics
    /// Panics when the shapes differ.
    pub fn set(&mut self, value: &Tensor) {
        assert_eq!(value.shape(), self.shape(), "shape of a parameter");
        let exact = matches!(self.0, Form::Whole(_));
        *self = Weight::new(value.clone(), self.device(), exact);
    }

    /// Rounds the value to the precision that operations read on any device: bf16, or f32 for an exact parameter.
    pub fn round_to_bf16(&mut self) {
        self.change(|value| {
            let numbers = value.slice_mut::<f32>();
            numbers.iter_mut().for_each(|w| *w = split(*w).0.to_f32());
        });
    }

    /// Returns all elements, converted to f64.
    ///
    /// # Errors
    /// Returns an error when the value is not real.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        self.whole().to_f64()
    }

    /// Returns the bytes of the elements `numbers` as [`dtype`](Self::dtype), for files. They are borrowed if host
    /// memory holds them in this form, and otherwise copied.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn bytes(&self, numbers: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match &self.0 {
            Form::Whole(value) => {
                let size = value.dtype().size();
                let range = numbers.start * size..numbers.end * size;
                match value.device() {
                    Device::Cpu => Ok(Cow::Borrowed(&value.bytes()[range])),
                    _ => value.copied_bytes(range).map(Cow::Owned),
                }
            }
            Form::Split { upper, lower, own } => {
                let upper = upper.copied_bytes(2 * numbers.start..2 * numbers.end)?;
                let own = own.clone().unwrap_or(0..self.elements());
                // Lower halves on other ranks count as 0 here, as for `whole`.
                let there = numbers.start.max(own.start)..numbers.end.min(own.end);
                let mut halves = vec![0; upper.len()];
                if !there.is_empty() {
                    let from = 2 * (there.start - own.start)..2 * (there.end - own.start);
                    let to = 2 * (there.start - numbers.start)..2 * (there.end - numbers.start);
                    halves[to].copy_from_slice(&lower.copied_bytes(from)?);
                }
                Ok(Cow::Owned(joined_bytes(&upper, &halves)))
            }
        }
    }

    /// Returns the one tensor, or the two halves, for kernels that change the value.
    pub fn places(&mut self) -> Places<'_> {
        match &mut self.0 {
            Form::Whole(value) => Places::Whole(value),
            Form::Split { upper, lower, .. } => Places::Split([upper, lower]),
        }
    }

    /// Returns the shape of the complete value.
    pub fn shape(&self) -> Shape {
        self.working().shape()
    }

    /// Returns the number of elements of the complete value, over all ranks.
    pub fn elements(&self) -> usize {
        self.working().elements()
    }

    /// Returns the device that holds the value.
    pub fn device(&self) -> Device {
        self.working().device()
    }

    /// Returns the dtype of the complete value, and of its optimizer moments.
    pub fn dtype(&self) -> DType {
        self.working().dtype().arithmetic()
    }
}

/// See [`Weight::places`].
pub enum Places<'a> {
    /// All elements, in one tensor.
    Whole(&'a mut Tensor),
    /// The upper halves of all elements, and the lower halves of all elements or of this rank's share.
    Split([&'a mut Tensor; 2]),
}

/// Joins the bytes of the halves to little-endian f32 numbers.
fn joined_bytes(upper: &[u8], lower: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 2 * upper.len()];
    let halves = upper.par_chunks(2 * BLOCK).zip(lower.par_chunks(2 * BLOCK));
    let out = bytes.par_chunks_mut(4 * BLOCK).zip(halves);
    out.for_each(|(out, (upper, lower))| {
        let halves = upper.chunks_exact(2).zip(lower.chunks_exact(2));
        for (w, (u, l)) in out.chunks_exact_mut(4).zip(halves) {
            let upper = bf16::from_le_bytes([u[0], u[1]]);
            let lower = i16::from_le_bytes([l[0], l[1]]);
            w.copy_from_slice(&join(upper, lower).to_le_bytes());
        }
    });
    bytes
}

fn joined(out: &mut [f32], upper: &[bf16], lower: &[i16]) {
    let halves = upper.par_chunks(BLOCK).zip(lower.par_chunks(BLOCK));
    let out = out.par_chunks_mut(BLOCK).zip(halves);
    out.for_each(|(out, (upper, lower))| {
        for (w, (&u, &l)) in out.iter_mut().zip(upper.iter().zip(lower)) {
            *w = join(u, l);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_pattern_survives_the_split() {
        let wrong = (0..=u16::MAX).into_par_iter().find_any(|&high| {
            (0..=u16::MAX).any(|low| {
                let bits = u32::from(high) << 16 | u32::from(low);
                let (upper, lower) = split(f32::from_bits(bits));
                join(upper, lower).to_bits() != bits
            })
        });
        assert_eq!(wrong, None);
    }

    #[test]
    fn the_upper_half_is_the_nearest_bf16_ties_away_from_zero() {
        let nearest = |w: f32| split(w).0.to_f32();
        assert_eq!(nearest(1.0 + 1.0 / 256.0), 1.0 + 1.0 / 128.0);
        assert_eq!(nearest(-1.0 - 1.0 / 256.0), -1.0 - 1.0 / 128.0);
        assert_eq!(nearest(1.0 + 0.99 / 256.0), 1.0);
        for i in 0..100_000 {
            let w = (i as f32 * 0.37).sin() * 3.0;
            let away = (nearest(w) - w).abs();
            assert!(away <= (bf16::from_f32(w).to_f32() - w).abs(), "{w}");
        }
    }

    #[test]
    fn a_split_value_reads_like_an_unsplit_one() {
        let numbers: Vec<f32> = (0..200_003).map(|i| (i as f32).sin() * 1e-3).collect();
        let value = Tensor::from_slice([numbers.len()], &numbers);
        let mut weight = Weight::new(value, Device::Sim, false);
        assert_eq!(
            (weight.dtype(), weight.working().dtype()),
            (DType::F32, DType::Bf16)
        );
        assert_eq!(weight.whole().slice::<f32>(), numbers);
        let bytes = weight.bytes(5..70_000).unwrap();
        assert_eq!(
            bytes
                .chunks_exact(4)
                .map(bytemuck::pod_read_unaligned)
                .collect::<Vec<f32>>(),
            numbers[5..70_000]
        );
        weight.change(|t| t.slice_mut::<f32>()[7] = 0.3);
        assert_eq!(
            weight.whole().slice::<f32>()[6..9],
            [numbers[6], 0.3, numbers[8]]
        );
    }

    #[test]
    fn a_share_of_the_lower_halves_is_exact_and_the_rest_is_rounded() {
        let numbers: Vec<f32> = (0..1000).map(|i| (i as f32).sin()).collect();
        let value = Tensor::from_slice([1000], &numbers);
        let mut weight = Weight::new(value, Device::Sim, false);
        assert!(weight.lower_share().is_none());
        let Places::Split([_, lower]) = weight.places() else {
            panic!("whole")
        };
        let lower = lower.clone();
        weight.keep_lower_halves(300..500).unwrap();
        assert_eq!(weight.lower_share().unwrap().elements(), 200);
        let expected: Vec<f32> = (0..1000)
            .map(|i| match (300..500).contains(&i) {
                true => numbers[i],
                false => split(numbers[i]).0.to_f32(),
            })
            .collect();
        assert_eq!(weight.whole().slice::<f32>(), expected);
        for range in [0..1000, 200..310, 400..450, 490..600, 600..700] {
            let bytes = weight.bytes(range.clone()).unwrap();
            assert_eq!(*bytes, *bytemuck::cast_slice::<f32, u8>(&expected[range]));
        }
        let bytes = weight.bytes_with(&lower, 100..900).unwrap();
        assert_eq!(bytes, bytemuck::cast_slice::<f32, u8>(&numbers[100..900]));
    }
}
