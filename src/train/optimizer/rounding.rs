//! Stochastic rounding of the optimizer's moments to bf16 (as `kernels/adamw.cu` rounds): a random number below 2^16
//! is added to the bits of x, and the upper 16 bits are kept. The expected value of the result is x, so changes
//! smaller than a bf16 step accumulate.

use super::Moments;
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Stream};
use half::bf16;
use rayon::prelude::*;

/// Number of elements that share 256 draws: element n uses word (n / 256) % 4 of draw (n / 1024) 256 + n % 256, its
/// lower half for the first moment and its upper half for the second.
const BLOCK: usize = 1024;

/// Rounds f32 moments to bf16 moments after update number `update`. The moments are those of parameter number
/// `parameter`, from element `start`, which must be a multiple of [`BLOCK`].
///
/// # Panics
/// Panics when a dtype or a length does not fit.
pub fn store(
    to: &mut Moments,
    [first, second]: [&Tensor; 2],
    update: u64,
    parameter: usize,
    start: usize,
) {
    let stream = Stream::new(0, Purpose::Rounding, update, parameter);
    let (m, v) = (to.first.slice_mut(), to.second.slice_mut());
    let to = m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK));
    let from = first.slice::<f32>().par_chunks(BLOCK);
    let from = from.zip(second.slice::<f32>().par_chunks(BLOCK));
    to.zip(from)
        .enumerate()
        .for_each(|(block, ((m, v), (first, second)))| {
            for lane in 0..256.min(m.len()) {
                let place = (start / BLOCK + block) * 256 + lane;
                let draws = stream.bits(place as u64);
                for (at, draw) in (lane..m.len()).step_by(256).zip(draws) {
                    m[at] = rounded(first[at], draw & 0xffff);
                    v[at] = rounded(second[at], draw >> 16);
                }
            }
        });
}

/// Rounds a finite x with `random`, uniform in 0 to 2^16 − 1: away from zero with a probability proportional to its
/// lower bits.
fn rounded(x: f32, random: u32) -> bf16 {
    bf16::from_bits((x.to_bits().wrapping_add(random) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::tensor::dtype::DType;

    fn empty(count: usize) -> Moments {
        let [first, second] =
            [(); 2].map(|()| Tensor::unspecified(Device::Cpu, DType::Bf16, [count]));
        Moments { first, second }
    }

    #[test]
    fn rounding_returns_a_neighbour_and_is_exact_on_average() {
        let count = 100_000;
        // A third and two thirds between two neighbours, and a number that bf16 holds.
        for x in [1.0 + 1.0 / 384.0, -3.0 - 2.0 / 192.0, 0.5f32] {
            let same = Tensor::from_slice([count], &vec![x; count]);
            let mut moments = empty(count);
            store(&mut moments, [&same, &same], 7, 3, 0);
            let ulp = x.abs().log2().floor().exp2() / 128.0;
            for tensor in [&moments.first, &moments.second] {
                let found = tensor.to_f64().unwrap();
                let mean = found.iter().sum::<f64>() / count as f64;
                // The tolerance of the mean is 5 standard deviations for this number of draws.
                let allowed = 5.0 * 0.5 * f64::from(ulp) / (count as f64).sqrt();
                assert!((mean - f64::from(x)).abs() <= allowed, "{mean} for {x}");
                let near = |f: &f64| (f - f64::from(x)).abs() < f64::from(ulp);
                assert!(found.iter().all(near), "further than a step from {x}");
            }
            assert!(x == 0.5 || moments.first.bytes() != moments.second.bytes());
        }
    }

    #[test]
    fn other_updates_and_parameters_draw_other_numbers() {
        let values: Vec<f32> = (0..3000).map(|i| 1.0 + i as f32 * 1e-4).collect();
        let wide = Tensor::from_slice([3000], &values);
        let of = |update, parameter| {
            let mut moments = empty(3000);
            store(&mut moments, [&wide, &wide], update, parameter, 0);
            moments.first.bytes().to_vec()
        };
        assert_eq!(of(1, 2), of(1, 2));
        assert_ne!(of(1, 2), of(2, 2));
        assert_ne!(of(1, 2), of(1, 3));
    }
}
