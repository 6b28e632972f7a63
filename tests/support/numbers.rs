//! Seeded numbers and error bounds.

use half::bf16;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.bits()) * end as u128) >> 64) as usize
    }

    /// Uniform in (0, 1].
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box–Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.unit()).cos()) as f32
    }

    /// Standard normals, rounded to bf16.
    pub fn normals_bf16(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.normal())).collect()
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Half the distance between neighbouring bf16 at `x`.
pub fn half_ulp_bf16(x: f64) -> f64 {
    if x == 0.0 {
        0.0
    } else {
        x.abs().log2().floor().exp2() / 256.0
    }
}

/// Unit roundoff of f32.
pub const F32_ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

/// Worst element and relative L2 error, gathered value by value.
#[derive(Default)]
pub struct Errors {
    squared_error: f64,
    squared_value: f64,
}

impl Errors {
    /// Panics when |got − want| exceeds `bound`, or is not a number.
    pub fn add(&mut self, got: f64, want: f64, bound: f64, place: impl Fn() -> String) {
        let error = (got - want).abs();
        assert!(
            error <= bound,
            "{}: got {got}, want {want}, |error| {error:.3e} > {bound:.3e}",
            place()
        );
        self.squared_error += error * error;
        self.squared_value += want * want;
    }

    /// ‖got − want‖ / ‖want‖; 0 for 0 / 0.
    pub fn relative(&self) -> f64 {
        if self.squared_error == 0.0 {
            0.0
        } else {
            (self.squared_error / self.squared_value).sqrt()
        }
    }
}
