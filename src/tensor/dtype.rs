//! Element types known at run time, and the two types over which arithmetic on the CPU is generic.

use bytemuck::Pod;
use half::bf16;
use std::fmt;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary64: the CPU's arithmetic for finite differences.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// The upper half of an f32: activations and working weights on devices with kernels.
    Bf16,
    /// The lower halves of split weights.
    I16,
    /// Token ids, expert numbers, rows.
    I32,
}

impl DType {
    /// Returns the number of bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::I16 => 2,
        }
    }

    /// Returns the dtype in which such elements are computed: f32 for bf16.
    pub fn arithmetic(self) -> DType {
        match self {
            DType::Bf16 => DType::F32,
            other => other,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::I16 => "i16",
            DType::I32 => "i32",
        })
    }
}

/// A Rust type that can be the element of a tensor.
pub trait Element: Pod + Send + Sync + fmt::Debug {
    /// The corresponding [`DType`].
    const DTYPE: DType;
}

impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for half::bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for i16 {
    const DTYPE: DType = DType::I16;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

/// The real numbers that reference code is generic over: `f32` to train, `f64` to verify.
pub trait Real:
    Element + num_traits::Float + num_traits::NumAssign + std::iter::Sum + Default
{
    /// Rounds an `f64` to this type.
    fn of(x: f64) -> Self;
    /// Widens to `f64`; exact.
    fn f64(self) -> f64;
    /// e^x, written so that loops over it become vector code. For `f32` it is within 2 ulp of the exact value, and 0
    /// if that is below the smallest normal number. For `f64` it is the function of the standard library.
    fn exp_vector(self) -> Self;
    /// Returns the library's function for matrix products of this type, on this processor.
    fn gemm() -> Gemm<Self>;
}

/// `d = α·d + β·(a · b)`, or without `α·d`: the extents of a product, the matrices with the distances between their columns
/// and rows, whether `d` is read, α, β, three flags for complex numbers, and the threads.
pub type Gemm<T> = unsafe fn(
    usize,
    usize,
    usize,
    *mut T,
    isize,
    isize,
    bool,
    *const T,
    isize,
    isize,
    *const T,
    isize,
    isize,
    T,
    T,
    bool,
    bool,
    bool,
    gemm_common::Parallelism,
);

/// Returns the bf16 nearest to `x`, ties to even. `bf16::from_f64` drops bits that decide between neighbors.
pub fn nearest_bf16(x: f64) -> bf16 {
    // Rounded to odd, an f32 keeps on which side of a tie x lies.
    let near = x as f32;
    let odd = match near.is_finite() && f64::from(near) != x {
        true => (near.to_bits() - u32::from(f64::from(near).abs() > x.abs())) | 1,
        false => near.to_bits(),
    };
    bf16::from_f32(f32::from_bits(odd))
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn exp_vector(self) -> Self {
        self.exp()
    }
    fn gemm() -> Gemm<Self> {
        gemm_f64::gemm::f64::get_gemm_fn()
    }
}

impl Real for f32 {
    fn gemm() -> Gemm<Self> {
        gemm_f32::gemm::f32::get_gemm_fn()
    }

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }

    /// Cody–Waite reduction to |r| ≤ ln 2 / 2, then the Taylor polynomial of degree 7 (its
    /// remainder there is 5e-9), then scaling by 2^n through the exponent bits.
    ///
    /// Fused multiply-adds, and no conversion to an integer: Rust's saturates, which costs more
    /// than all the rest.
    #[inline(always)]
    fn exp_vector(self) -> Self {
        const LN2_HIGH: f32 = 0.693_359_4; // 11 significant bits: n · LN2_HIGH is exact
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let x = if self > 88.7 { 88.7 } else { self };
        let x = if x < -87.3 { -87.3 } else { x };
        // Adding 1.5 · 2^23 rounds to an integer, which is then in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = (-n).mul_add(LN2_LOW, (-n).mul_add(LN2_HIGH, x));
        let mut y: f32 = 1.0 / 5040.0;
        for c in [
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
            1.0,
            1.0,
        ] {
            y = y.mul_add(r, c);
        }
        // Within the clamp y · 2^n is normal and finite, so n may be added to y's exponent.
        let value = f32::from_bits(y.to_bits().wrapping_add(shifted.to_bits() << 23));
        let value = if self < -87.3 { 0.0 } else { value };
        let value = if self > 88.7 { f32::INFINITY } else { value };
        if self.is_nan() { self } else { value }
    }
}

/// Runs `$body` with `$T` standing for the Rust type of a real dtype; any other dtype is an error
/// of operation `$op`.
#[macro_export]
macro_rules! with_real {
    ($dtype:expr, $op:expr, |$T:ident| $body:expr) => {
        match $dtype {
            $crate::tensor::dtype::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::tensor::dtype::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::error::Error::invalid(
                $op,
                "f32 or f64 tensors",
                other.to_string(),
                "convert the tensor, or choose another device",
            )),
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_vector_is_within_two_ulp_of_the_exact_value() {
        let mut worst = 0f64;
        for i in -870_000..=887_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * exact;
            worst = worst.max((f64::from(x.exp_vector()) - exact).abs() / ulp);
        }
        assert!(worst <= 2.0, "worst error {worst} ulp");
    }

    #[test]
    fn exp_vector_keeps_the_limits() {
        assert_eq!(f32::NEG_INFINITY.exp_vector(), 0.0);
        assert_eq!(f32::INFINITY.exp_vector(), f32::INFINITY);
        assert_eq!(0f32.exp_vector(), 1.0);
        assert!(f32::NAN.exp_vector().is_nan());
    }

    #[test]
    fn nearest_bf16_decides_ties_by_the_last_bits() {
        for sign in [1.0, -1.0] {
            for (upper, tie) in [(0x3F80u16, 0x3F80), (0x3F81, 0x3F82)] {
                let middle = f64::from(f32::from_bits(u32::from(upper) << 16 | 0x8000));
                for (x, expected) in [
                    (middle, tie),
                    (middle + 2f64.powi(-50), upper + 1),
                    (middle - 2f64.powi(-50), upper),
                    (middle + 2f64.powi(-23), upper + 1),
                ] {
                    let found = nearest_bf16(sign * x).to_f32();
                    let expected = f32::from_bits(u32::from(expected) << 16);
                    assert_eq!(found, sign as f32 * expected, "{x:e}");
                }
            }
            assert_eq!(nearest_bf16(sign * 1e-300).to_f32(), 0.0);
            assert_eq!(nearest_bf16(sign * 1e300).to_f64(), sign * f64::INFINITY);
        }
        assert!(nearest_bf16(f64::NAN).is_nan());
    }
}
