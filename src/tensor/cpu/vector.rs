//! Functions of rows and numbers for loops inside [`vectorized`](super::vectorized), into which
//! they are inlined.
//!
//! A compiler must not reorder a floating-point sum, so a simple loop adds one number at a time. Here sums run in
//! `LANES` interleaved parts, which become vector registers; the order depends only on the length.
//!
//! The loops over lanes index arrays and call nothing else: the crate is built without link-time optimization, so that
//! `<[T; N]>::map`, `std::array::from_fn`, `copy_from_slice` and `fill` would remain calls, and the loops scalar code.

#![allow(clippy::needless_range_loop)] // Iterators over several arrays are calls too.

use super::Accumulate;
use crate::tensor::dtype::Real;

/// Interleaved parts of a sum: two AVX2 registers of f32.
const LANES: usize = 16;

/// Returns an array whose element `k` is `f(k)`. `zero` is any number.
#[inline(always)]
fn array<T: Copy, const N: usize>(zero: T, f: impl Fn(usize) -> T) -> [T; N] {
    let mut values = [zero; N];
    for k in 0..N {
        values[k] = f(k);
    }
    values
}

/// Returns the `LANES` elements from `i` on.
#[inline(always)]
fn lanes<T: Copy>(slice: &[T], i: usize) -> [T; LANES] {
    *slice[i..].first_chunk().expect("as many elements")
}

/// Σ f(a_i, b_i, ..) over slices of equal length.
///
/// # Panics
/// Panics when a slice is shorter than the first.
#[inline(always)]
pub fn sum_over<T: Real, const N: usize>(slices: [&[T]; N], f: impl Fn([T; N]) -> T) -> T {
    let n = slices[0].len();
    let mut sums = [T::zero(); LANES];
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        let parts: [_; N] = array([T::zero(); LANES], |k| lanes(slices[k], i));
        for lane in 0..LANES {
            sums[lane] += f(array(T::zero(), |k| parts[k][lane]));
        }
        i += LANES;
    }
    for i in whole..n {
        sums[i - whole] += f(array(T::zero(), |k| slices[k][i]));
    }
    total(sums)
}

/// Returns the sum of the interleaved parts, added pairwise.
#[inline(always)]
fn total<T: Real>(mut sums: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let upper = sums[lane + width];
            sums[lane] += upper;
        }
        width /= 2;
    }
    sums[0]
}

/// Writes `f([a_i, b_i, ..], old)` to the outputs, element by element, where `old` are the values they hold. Parts of
/// `LANES` elements go through local arrays, so that the compiler need not prove that outputs and inputs do not
/// overlap: with more than a few slices it does not prove this and emits scalar code.
///
/// # Panics
/// Panics when a slice is shorter than the first input.
#[inline(always)]
pub fn map_over<T: Real, const O: usize, const I: usize>(
    outputs: [&mut [T]; O],
    inputs: [&[T]; I],
    f: impl Fn([T; I], [T; O]) -> [T; O],
) {
    let n = inputs[0].len();
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        let given: [_; I] = array([T::zero(); LANES], |k| lanes(inputs[k], i));
        let mut new: [_; O] = array([T::zero(); LANES], |k| lanes(outputs[k], i));
        for lane in 0..LANES {
            let x = array(T::zero(), |k| given[k][lane]);
            let results = f(x, array(T::zero(), |k| new[k][lane]));
            for k in 0..O {
                new[k][lane] = results[k];
            }
        }
        for k in 0..O {
            *outputs[k][i..].first_chunk_mut().expect("as many elements") = new[k];
        }
        i += LANES;
    }
    for i in whole..n {
        let x = array(T::zero(), |k| inputs[k][i]);
        let results = f(x, array(T::zero(), |k| outputs[k][i]));
        for k in 0..O {
            outputs[k][i] = results[k];
        }
    }
}

/// Sets all elements to `value`.
#[inline(always)]
pub fn set<T: Copy>(values: &mut [T], value: T) {
    for v in values {
        *v = value;
    }
}

/// The largest of `values`, -∞ for none. NaN is ignored; it appears in the result when the caller exponentiates the
/// values.
#[inline(always)]
pub fn max<T: Real>(values: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut best = [T::neg_infinity(); LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for part in whole {
        for lane in 0..LANES {
            best[lane] = larger(best[lane], part[lane]);
        }
    }
    for lane in 0..rest.len() {
        best[lane] = larger(best[lane], rest[lane]);
    }
    let mut largest = T::neg_infinity();
    for value in best {
        largest = larger(largest, value);
    }
    largest
}

/// Replaces each value by `e^(scale (value - shift))` and returns their sum.
#[inline(always)]
pub fn exp_and_sum<T: Real>(values: &mut [T], scale: T, shift: T) -> T {
    let mut sums = [T::zero(); LANES];
    let (whole, rest) = values.as_chunks_mut::<LANES>();
    for part in whole {
        for lane in 0..LANES {
            part[lane] = ((part[lane] - shift) * scale).exp_vector();
            sums[lane] += part[lane];
        }
    }
    for lane in 0..rest.len() {
        rest[lane] = ((rest[lane] - shift) * scale).exp_vector();
        sums[lane] += rest[lane];
    }
    total(sums)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).exp_vector())
}

impl Accumulate {
    /// Returns the new content of an element that holds `old` when `value` is assigned or added to it. It is written
    /// as a selection and a sum, without a branch, so that loops over it become vector code.
    #[inline(always)]
    pub fn onto<T: Real>(self, old: T, value: T) -> T {
        let kept = if self == Accumulate::Add {
            old
        } else {
            T::zero()
        };
        kept + value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_maxima_see_every_element_once_at_any_length() {
        for n in 0..70 {
            let a: Vec<f64> = (1..=n).map(f64::from).collect();
            let expected = f64::from(n * (n + 1) * (2 * n + 1) / 6);
            assert_eq!(sum_over([&a, &a], |[x, y]| x * y), expected);
            let largest = if n == 0 {
                f64::NEG_INFINITY
            } else {
                f64::from(n)
            };
            assert_eq!(max(&a), largest);
            let reversed: Vec<f64> = a.iter().rev().copied().collect();
            assert_eq!(max(&reversed), largest);
        }
    }

    #[test]
    fn sigmoid_keeps_its_limits() {
        assert_eq!(sigmoid(-200f32), 0.0);
        assert_eq!(sigmoid(200f32), 1.0);
        assert_eq!(sigmoid(0f32), 0.5);
        assert!(sigmoid(f32::NAN).is_nan());
    }
}
