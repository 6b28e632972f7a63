//! Random numbers as pure functions of (seed, purpose, step, layer, index): the counter-based
//! generator Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3" (SC 2011).
//!
//! The generator has no state, so a draw does not depend on the number of threads, micro-batches or ranks, nor on
//! earlier draws. A kernel computes the same numbers from the same layout:
//!
//! | word | content |
//! |---|---|
//! | key 0, key 1 | low and high half of the seed |
//! | counter 0, counter 1 | low and high half of the index (a token's index in the global batch, an element's index
//! in its tensor) |
//! | counter 2 | step |
//! | counter 3 | purpose · 2^24 + layer |

use crate::tensor::dtype::Real;
use rayon::prelude::*;

/// What a draw is for. The numbers are part of the format: changing one changes every run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Purpose {
    /// Initial value of a weight; `layer` numbers the tensor.
    Weights = 0,
    /// Order of the training windows; `step` is the epoch.
    DataOrder = 1,
    /// Draws of a router that samples its experts.
    Routing = 2,
    /// Initial default vectors; `layer` is the layer.
    DefaultVectors = 3,
    /// Sampling of generated tokens.
    Generation = 4,
    /// Inputs and incoming gradients of checks.
    Check = 5,
    /// Stochastic rounding of the optimizer's moments; `step` is the number of the update, `layer` the parameter.
    Rounding = 6,
    /// Tokens drawn for sampled default vectors, which average their outputs; `layer` is the MoE layer.
    DefaultSamples = 7,
}

/// Number of layers that counter 3 can represent.
pub const MAX_LAYERS: usize = 1 << 24;

/// All draws of one (seed, purpose, step, layer); the index is given with each draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    high: [u32; 2],
}

impl Stream {
    /// # Panics
    /// Panics when `step` does not fit in 32 bits, or `layer` is not below [`MAX_LAYERS`].
    pub fn new(seed: u64, purpose: Purpose, step: u64, layer: usize) -> Self {
        assert!(
            layer < MAX_LAYERS,
            "layer {layer} does not fit in the counter"
        );
        let step = u32::try_from(step).expect("a step fits 32 bits");
        Stream {
            key: [seed as u32, (seed >> 32) as u32],
            high: [step, ((purpose as u32) << 24) | layer as u32],
        }
    }

    /// Returns 128 random bits.
    #[inline]
    pub fn bits(&self, index: u64) -> [u32; 4] {
        let counter = [
            index as u32,
            (index >> 32) as u32,
            self.high[0],
            self.high[1],
        ];
        philox4x32_10(counter, self.key)
    }

    /// Returns a uniform number in [0, 1), a multiple of 2^-24 from the top 24 bits of word 0: the same number in
    /// f32, in f64 and in a kernel.
    #[inline]
    pub fn uniform(&self, index: u64) -> f32 {
        (self.bits(index)[0] >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Returns an exponential number with mean 1: `−ln v`, where v in (0, 1) is an odd multiple of 2^-24, exact in
    /// f32, from the top 23 bits of word 0. It is between 6e-8 and 16.6, so its logarithm is finite as well.
    #[inline]
    pub fn exponential(&self, index: u64) -> f64 {
        let v = (f64::from(self.bits(index)[0] >> 9) + 0.5) * (1.0 / (1 << 23) as f64);
        -v.ln()
    }

    /// Returns a standard normal number by Box–Muller in f64. Words 0 and 1 give the radius, words 2 and 3 the angle,
    /// each from a multiple of 2^-53; the first is in (0, 1], so its logarithm is finite.
    #[inline]
    pub fn normal(&self, index: u64) -> f64 {
        const SCALE: f64 = 1.0 / (1u64 << 53) as f64;
        let [a, b, c, d] = self.bits(index);
        let join = |high: u32, low: u32| (u64::from(high) << 32 | u64::from(low)) >> 11;
        let u = (join(a, b) + 1) as f64 * SCALE;
        let v = join(c, d) as f64 * SCALE;
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Fills `out` with zero-mean normals of standard deviation `std`, element `i` from index `i`, in parallel. The
    /// result does not depend on the number of threads.
    pub fn fill_normal<T: Real>(&self, out: &mut [T], std: f64) {
        const BLOCK: usize = 1 << 14;
        out.par_chunks_mut(BLOCK)
            .enumerate()
            .for_each(|(n, block)| {
                for (i, x) in block.iter_mut().enumerate() {
                    *x = T::of(std * self.normal((n * BLOCK + i) as u64));
                }
            });
    }
}

/// Ten rounds of Philox with four 32-bit words.
#[inline]
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    // The key grows by the fractional bits of the golden ratio and of √3 − 1 before each further round.
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let p = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let q = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [
            (q >> 32) as u32 ^ counter[1] ^ key[0],
            q as u32,
            (p >> 32) as u32 ^ counter[3] ^ key[1],
            p as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_test_vectors() {
        // From the vectors that the authors publish with their Random123 library.
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
            ),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn every_part_of_the_key_changes_the_draw() {
        let base = Stream::new(1, Purpose::Weights, 0, 0);
        let others = [
            Stream::new(2, Purpose::Weights, 0, 0),
            Stream::new(1 | 1 << 32, Purpose::Weights, 0, 0),
            Stream::new(1, Purpose::Routing, 0, 0),
            Stream::new(1, Purpose::Weights, 1, 0),
            Stream::new(1, Purpose::Weights, 0, 1),
        ];
        for other in others {
            assert_ne!(base.bits(7), other.bits(7));
        }
        assert_ne!(base.bits(7), base.bits(8));
        assert_ne!(base.bits(7), base.bits(7 | 1 << 32));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let s = Stream::new(3, Purpose::Check, 0, 0);
        let n = 1_000_000u64;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        // The tolerance is 5 standard errors.
        let close = |got: f64, expected: f64, sd: f64| {
            let tol = 5.0 * sd / (n as f64).sqrt();
            assert!(
                (got - expected).abs() <= tol,
                "{got} is not {expected} ± {tol}"
            );
        };
        close(
            mean(&|i| f64::from(s.uniform(i))),
            0.5,
            (1.0f64 / 12.0).sqrt(),
        );
        close(mean(&|i| s.exponential(i)), 1.0, 1.0);
        close(mean(&|i| s.exponential(i).powi(2)), 2.0, 20f64.sqrt());
        close(mean(&|i| s.normal(i)), 0.0, 1.0);
        close(mean(&|i| s.normal(i).powi(2)), 1.0, 2f64.sqrt());
        close(mean(&|i| s.normal(i).powi(4)), 3.0, 96f64.sqrt());
    }

    #[test]
    fn uniform_stays_in_its_interval_at_both_ends() {
        let s = Stream::new(0, Purpose::Check, 0, 0);
        for i in 0..100_000 {
            let u = s.uniform(i);
            assert!((0.0..1.0).contains(&u));
        }
        assert!((u32::MAX >> 8) as f32 * (1.0 / (1 << 24) as f32) < 1.0);
    }

    #[test]
    fn fill_normal_gives_the_same_bytes_on_any_number_of_threads() {
        let fill = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let mut out = vec![0f32; 100_001];
            pool.install(|| Stream::new(5, Purpose::Weights, 0, 3).fill_normal(&mut out, 0.02));
            out
        };
        let one = fill(1);
        assert_eq!(one, fill(2));
        assert_eq!(one, fill(4));
        assert_eq!(
            one[70_000],
            (0.02 * Stream::new(5, Purpose::Weights, 0, 3).normal(70_000)) as f32
        );
    }
}
