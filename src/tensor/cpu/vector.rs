//! Functions of rows and numbers for loops inside [`vectorized`](super::vectorized), into which
//! they are inlined.
//!
//! A compiler must not reorder a floating-point sum, so a simple loop adds one number at a time. Here sums run in
//! `LANES` interleaved parts, which become vector registers; the order depends only on the length.

use super::Accumulate;
use crate::tensor::dtype::Real;

/// Interleaved parts of a sum: two AVX2 registers of f32.
const LANES: usize = 16;

/// Σ f(a_i, b_i, ..) over slices of equal length.
///
/// # Panics
/// Panics when a slice is shorter than the first.
#[inline(always)]
pub fn sum_over<T: Real, const N: usize>(slices: [&[T]; N], f: impl Fn([T; N]) -> T) -> T {
    let n = slices[0].len();
    let slices = slices.map(|s| &s[..n]);
    let mut sums = [T::zero(); LANES];
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        let parts = slices.map(|s| &s[i..i + LANES]);
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(parts.map(|p| p[lane]));
        }
        i += LANES;
    }
    for (lane, sum) in sums.iter_mut().enumerate().take(n - whole) {
        *sum += f(slices.map(|s| s[whole + lane]));
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
    mut outputs: [&mut [T]; O],
    inputs: [&[T]; I],
    f: impl Fn([T; I], [T; O]) -> [T; O],
) {
    let n = inputs[0].len();
    let whole = n - n % LANES;
    let inputs = inputs.map(|s| &s[..n]);
    for output in &mut outputs {
        *output = &mut std::mem::take(output)[..n];
    }
    let mut i = 0;
    while i < whole {
        let mut new = [[T::zero(); LANES]; O];
        let mut given = [[T::zero(); LANES]; I];
        for (new, output) in new.iter_mut().zip(&outputs) {
            new.copy_from_slice(&output[i..i + LANES]);
        }
        for (given, input) in given.iter_mut().zip(&inputs) {
            given.copy_from_slice(&input[i..i + LANES]);
        }
        for lane in 0..LANES {
            let results = f(
                std::array::from_fn(|k| given[k][lane]),
                std::array::from_fn(|k| new[k][lane]),
            );
            for (new, result) in new.iter_mut().zip(results) {
                new[lane] = result;
            }
        }
        for (output, new) in outputs.iter_mut().zip(&new) {
            output[i..i + LANES].copy_from_slice(new);
        }
        i += LANES;
    }
    for i in whole..n {
        let results = f(
            std::array::from_fn(|k| inputs[k][i]),
            std::array::from_fn(|k| outputs[k][i]),
        );
        for (output, result) in outputs.iter_mut().zip(results) {
            output[i] = result;
        }
    }
}

/// The largest of `values`, -∞ for none. NaN is ignored; it appears in the result when the caller exponentiates the
/// values.
#[inline(always)]
pub fn max<T: Real>(values: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut best = [T::neg_infinity(); LANES];
    let (whole, rest) = values.split_at(values.len() - values.len() % LANES);
    for part in whole.chunks_exact(LANES) {
        for (best, &v) in best.iter_mut().zip(part) {
            *best = larger(*best, v);
        }
    }
    for (best, &v) in best.iter_mut().zip(rest) {
        *best = larger(*best, v);
    }
    best.into_iter().fold(T::neg_infinity(), larger)
}

/// Replaces each value by `e^(scale (value - shift))` and returns their sum.
#[inline(always)]
pub fn exp_and_sum<T: Real>(values: &mut [T], scale: T, shift: T) -> T {
    let mut sums = [T::zero(); LANES];
    let mut step = |part: &mut [T]| {
        for (sum, v) in sums.iter_mut().zip(part) {
            *v = ((*v - shift) * scale).exp_vector();
            *sum += *v;
        }
    };
    let mut parts = values.chunks_exact_mut(LANES);
    parts.by_ref().for_each(&mut step);
    step(parts.into_remainder());
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
