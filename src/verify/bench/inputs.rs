//! The inputs of a case, which are the same for every implementation. They depend only on names, so that a peer in another
//! language can generate the same bits (`benches/peers/inputs.py`).
//!
//! Number i of tensor `t` of group `g` comes from SplitMix64, seeded with the FNV-1a hash of "g/t": the four 16-bit parts
//! of output i are added, and the sum is centred and scaled to unit variance.

use crate::verify::kernels::numbers::{Random, SPLITMIX_STEP};
use half::bf16;
use rayon::prelude::*;

/// Generates the tensors of the group with this name.
pub struct Inputs<'a>(pub &'a str);

/// Standard deviation of the sum of four independent uniform numbers in 0 … 65535.
const DEVIATION: f64 = 37_837.227_237_206_48;

impl Inputs<'_> {
    fn seed(&self, tensor: &str) -> u64 {
        let name = self.0.bytes().chain([b'/']).chain(tensor.bytes());
        name.fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
        })
    }

    /// Returns `count` numbers with mean 0 and this standard deviation.
    pub fn f32(&self, tensor: &str, count: usize, deviation: f64) -> Vec<f32> {
        let seed = self.seed(tensor);
        let number = |i| (unit_normal(seed, i) * deviation) as f32;
        (0..count as u64).into_par_iter().map(number).collect()
    }

    /// As [`f32`](Self::f32), rounded to bf16.
    pub fn bf16(&self, tensor: &str, count: usize, deviation: f64) -> Vec<bf16> {
        let seed = self.seed(tensor);
        let number = |i| bf16::from_f32((unit_normal(seed, i) * deviation) as f32);
        (0..count as u64).into_par_iter().map(number).collect()
    }

    /// Returns `count` integers from 0 to `end` − 1.
    pub fn ids(&self, tensor: &str, count: usize, end: usize) -> Vec<i32> {
        let seed = self.seed(tensor);
        let id = |i| ((bits(seed, i) >> 33) % end as u64) as i32;
        (0..count as u64).map(id).collect()
    }

    /// Returns the experts of each token, in increasing order, `[T, K]`, such that expert e is chosen by `counts[e]`
    /// tokens. Each expert is repeated as often as it is chosen, and this list is distributed over the tokens in a random
    /// order.
    pub fn choices(&self, counts: &[usize], tokens: usize) -> Vec<i32> {
        let per_token = counts.iter().sum::<usize>() / tokens;
        let seed = self.seed("order");
        let mut order: Vec<usize> = (0..tokens).collect();
        order.sort_by_key(|&token| bits(seed, token as u64) >> 1);
        let experts = counts.iter().enumerate();
        let row = experts.flat_map(|(e, &count)| std::iter::repeat_n(e as i32, count));
        let mut chosen = vec![0; tokens * per_token];
        for (slot, expert) in row.enumerate() {
            // No token gets an expert twice, since an expert occupies at most `tokens` consecutive places.
            chosen[order[slot % tokens] * per_token + slot / tokens] = expert;
        }
        chosen
    }
}

/// Returns output i of SplitMix64.
fn bits(seed: u64, i: u64) -> u64 {
    Random(seed.wrapping_add(i.wrapping_mul(SPLITMIX_STEP))).bits()
}

fn unit_normal(seed: u64, i: u64) -> f64 {
    let bits = bits(seed, i);
    let sum = (0..4).map(|part| bits >> (16 * part) & 0xFFFF).sum::<u64>();
    (sum as f64 - 131_070.0) / DEVIATION
}

/// Distributes `slots` choices evenly over `experts` experts.
pub fn balanced(slots: usize, experts: usize) -> Vec<usize> {
    (0..experts)
        .map(|e| slots * (e + 1) / experts - slots * e / experts)
        .collect()
}

/// Distributes the choices by Zipf's law: expert i has weight 1 / (i + 1), but each token chooses an expert at most once.
pub fn zipf(tokens: usize, per_token: usize, experts: usize) -> Vec<usize> {
    let mut counts = vec![0; experts];
    let mut left = tokens * per_token;
    // Experts whose share would exceed the number of tokens get all tokens; the remaining choices are divided among the
    // others.
    for (expert, count) in counts.iter_mut().enumerate() {
        let weights: f64 = (expert..experts).map(|e| 1.0 / (e + 1) as f64).sum();
        let share = left as f64 / (expert + 1) as f64 / weights;
        let rounded = (share.round() as usize).clamp(0, tokens.min(left));
        // The remaining choices must fit in the other experts.
        *count = rounded.max(left.saturating_sub(tokens * (experts - expert - 1)));
        left -= *count;
    }
    counts
}

/// Returns 1 / √n.
pub fn unit_sum(n: usize) -> f64 {
    (n as f64).sqrt().recip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_mean_0_and_variance_1_and_differ_by_name() {
        let numbers = Inputs("a").f32("x", 100_000, 1.0);
        let mean = numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e5;
        let square = numbers.iter().map(|&x| f64::from(x * x)).sum::<f64>() / 1e5;
        assert!(
            mean.abs() < 0.01 && (square - 1.0).abs() < 0.02,
            "{mean} {square}"
        );
        assert_ne!(numbers, Inputs("a").f32("y", 100_000, 1.0));
        assert_ne!(numbers, Inputs("b").f32("x", 100_000, 1.0));
    }

    #[test]
    fn the_generator_returns_the_numbers_that_the_peers_test_for() {
        // benches/peers/inputs.py contains the same numbers.
        let inputs = Inputs("grouped gemm");
        assert_eq!(inputs.ids("ids", 4, 1000), [321, 305, 525, 74]);
        let numbers: Vec<u32> = inputs
            .f32("x", 4, 0.5)
            .iter()
            .map(|x| x.to_bits())
            .collect();
        assert_eq!(numbers, [0x3edf877f, 0xbde4fb87, 0x3ef01417, 0x3f19303a]);
    }

    #[test]
    fn choices_have_the_counts_and_no_token_has_an_expert_twice() {
        for (tokens, per_token, experts) in [(64, 1, 8), (64, 2, 8), (33, 3, 5), (16, 8, 8)] {
            for counts in [
                balanced(tokens * per_token, experts),
                zipf(tokens, per_token, experts),
            ] {
                assert_eq!(counts.iter().sum::<usize>(), tokens * per_token);
                let chosen = Inputs("x").choices(&counts, tokens);
                let mut found = vec![0; experts];
                for token in chosen.chunks(per_token) {
                    assert!(token.windows(2).all(|pair| pair[0] < pair[1]), "{token:?}");
                    token.iter().for_each(|&e| found[e as usize] += 1);
                }
                assert_eq!(found, counts);
            }
        }
    }

    #[test]
    fn zipf_assigns_most_to_the_first_expert_and_some_to_all() {
        let counts = zipf(16_384, 1, 8);
        assert!(
            counts.windows(2).all(|pair| pair[0] >= pair[1]),
            "{counts:?}"
        );
        // 1 / (1 + 1/2 + ... + 1/8).
        assert!((counts[0] as f64 / 16_384.0 - 0.368).abs() < 0.001 && counts[7] > 0);
    }
}
