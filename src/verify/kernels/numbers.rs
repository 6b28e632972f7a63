//! Seeded random numbers and error bounds for kernel cases.

use half::bf16;
use rayon::prelude::*;

/// SplitMix64.
pub struct Random(pub u64);

/// Increment of the state of SplitMix64.
pub const SPLITMIX_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl Random {
    /// Returns the next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(SPLITMIX_STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a uniform integer in 0 … `end` − 1.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.bits()) * end as u128) >> 64) as usize
    }

    /// Returns a uniform number in (0, 1].
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Returns a standard normal number (Box–Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.unit()).cos()) as f32
    }

    /// Returns standard normal numbers.
    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }

    /// Returns standard normal numbers, rounded to bf16. They are generated in parallel and do not depend on the number of
    /// threads.
    pub fn normals_bf16(&mut self, len: usize) -> Vec<bf16> {
        let seed = self.bits();
        let mut values = vec![bf16::ZERO; len];
        values
            .par_chunks_mut(1 << 16)
            .enumerate()
            .for_each(|(block, values)| {
                let mut random = Random(seed ^ (block as u64).wrapping_mul(0xD6E8_FEB8_6659_FD93));
                values
                    .iter_mut()
                    .for_each(|v| *v = bf16::from_f32(random.normal()));
            });
        values
    }

    /// Returns a random token for each of `rows` rows, and for the rows after them, up to `given`, one far out of range.
    pub fn tokens(&mut self, tokens: usize, rows: usize, given: usize) -> Vec<i32> {
        let mut all: Vec<i32> = (0..rows).map(|_| self.below(tokens) as i32).collect();
        all.resize(given, i32::MAX);
        all
    }

    /// Shuffles the items.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Returns half the distance between neighbouring bf16 numbers at `x`.
pub fn half_ulp_bf16(x: f64) -> f64 {
    const EXPONENT: u64 = 0x7ff << 52;
    f64::from_bits(x.to_bits() & EXPONENT) / 256.0 // the power of two below |x|, or 0 for 0
}

/// Returns the sum of the terms, and the sum of their magnitudes.
pub fn sums(terms: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let add = |(sum, size): (f64, f64), term: f64| (sum + term, size + term.abs());
    terms.into_iter().fold((0.0, 0.0), add)
}

/// Unit roundoff of f32.
pub const F32_ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

/// Accumulates the relative L2 error, and the largest error of an element as a share of its bound.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// Number of values that were compared.
    pub values: u64,
    squared_error: f64,
    squared_value: f64,
    worst: f64,
}

impl Errors {
    /// Errors of `values` values that are all exact.
    pub fn none(values: usize) -> Self {
        Self {
            values: values as u64,
            ..Self::default()
        }
    }

    /// # Errors
    /// When |got − want| is larger than `bound`, or is NaN.
    pub fn add(
        &mut self,
        got: f64,
        want: f64,
        bound: f64,
        place: impl Fn() -> String,
    ) -> Result<(), String> {
        let error = (got - want).abs();
        if !(error <= bound) {
            return Err(format!(
                "{}: got {got}, want {want}, |error| {error:.3e} > {bound:.3e}",
                place()
            ));
        }
        self.values += 1;
        self.squared_error += error * error;
        self.squared_value += want * want;
        if bound > 0.0 {
            self.worst = self.worst.max(error / bound);
        }
        Ok(())
    }

    /// As [`add`](Self::add); where the reference is not finite, the result must not be finite either.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_unless_spoilt(
        &mut self,
        got: f64,
        want: f64,
        bound: f64,
        place: impl Fn() -> String,
    ) -> Result<(), String> {
        match (want.is_finite(), got.is_finite()) {
            (true, _) => self.add(got, want, bound, place),
            (false, false) => Ok(()),
            (false, true) => Err(format!("{}: got {got} instead of {want}", place())),
        }
    }

    /// Adds a bf16 result whose f32 value may have an error of up to `error`; if the reference is NaN, the result must be
    /// NaN.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_bf16(
        &mut self,
        got: bf16,
        want: f64,
        error: f64,
        place: impl Fn() -> String,
    ) -> Result<(), String> {
        if want.is_nan() {
            return match got.is_nan() {
                true => Ok(()),
                false => Err(format!("{}: got {got}, want NaN", place())),
            };
        }
        let bound = half_ulp_bf16(want.abs() + error) + error;
        self.add(got.to_f64(), want, bound, place)
    }

    /// Returns the errors of values against their references: for each index the value and the bound, which for a bf16
    /// is that of its f32 value.
    ///
    /// # Errors
    /// As [`add`](Self::add) and [`add_bf16`](Self::add_bf16); the message names the element: `name` and its index.
    pub fn within<T: Number>(
        name: &str,
        got: &[T],
        mut want: impl FnMut(usize) -> (f64, f64),
    ) -> Result<Self, String> {
        let mut errors = Self::default();
        for (i, got) in got.iter().enumerate() {
            let (got, (want, bound)) = ((*got).into(), want(i));
            let place = || format!("{name} {i}");
            match T::BF16 {
                true => errors.add_bf16(bf16::from_f64(got), want, bound, place)?,
                false => errors.add(got, want, bound, place)?,
            }
        }
        Ok(errors)
    }

    /// Returns the errors of all parts of the result, which are computed in parallel.
    ///
    /// # Errors
    /// That of a part.
    pub fn of_parts(
        parts: impl ParallelIterator<Item = Result<Self, String>>,
    ) -> Result<Self, String> {
        let parts: Vec<Self> = parts.collect::<Result<_, String>>()?;
        let mut errors = Self::default();
        parts.into_iter().for_each(|part| errors.merge(part));
        Ok(errors)
    }

    /// # Errors
    /// When the relative error is larger than `limit`, or is NaN.
    pub fn at_most(self, limit: f64) -> Result<Self, String> {
        let relative = self.relative();
        match relative <= limit {
            true => Ok(self),
            false => Err(format!("relative error {relative:.2e} > {limit:.1e}")),
        }
    }

    /// Adds the errors of another part of the result.
    pub fn merge(&mut self, other: Errors) {
        self.values += other.values;
        self.squared_error += other.squared_error;
        self.squared_value += other.squared_value;
        self.worst = self.worst.max(other.worst);
    }

    /// Returns ‖got − want‖ / ‖want‖; 0 for 0 / 0.
    pub fn relative(&self) -> f64 {
        if self.squared_error == 0.0 {
            0.0
        } else {
            (self.squared_error / self.squared_value).sqrt()
        }
    }

    /// Returns the largest error of an element as a share of its bound.
    pub fn worst(&self) -> f64 {
        self.worst
    }
}

/// A type of values that kernels write.
pub trait Number: Copy + Into<f64> {
    /// Whether values are rounded to bf16 from f32.
    const BF16: bool = false;
}
impl Number for f32 {}
impl Number for f64 {}
impl Number for bf16 {
    const BF16: bool = true;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_above_its_bound_or_nan_is_rejected_and_others_are_summed() {
        let mut errors = Errors::default();
        errors.add(3.5, 3.0, 0.5, String::new).unwrap();
        errors.add(4.0, 4.0, 0.0, String::new).unwrap();
        assert_eq!(
            (errors.relative(), errors.worst(), errors.values),
            (0.1, 1.0, 2)
        );
        assert!(errors.add(f64::NAN, 1.0, 1.0, String::new).is_err());
        assert!(
            errors
                .add(1.0, 1.25, 0.2, || "here".into())
                .unwrap_err()
                .starts_with("here")
        );
    }

    #[test]
    fn half_an_ulp_is_half_the_distance_to_the_next_bf16() {
        for x in [1.0f32, 1.5, 0.75, 1e-20, 3e30] {
            let x = bf16::from_f32(x);
            let next = bf16::from_bits(x.to_bits() + 1);
            assert_eq!(
                half_ulp_bf16(x.to_f64()),
                (next.to_f64() - x.to_f64()) / 2.0
            );
        }
    }
}
