//! `kernels/router.cu`: scores of the experts, choices and statistics, in one pass over x.
//!
//! `z = x Wᵀ [T, E]` in f32; scores are z, softmax(z), sigmoid(z) or max(z, 0); the choices of a token are its K
//! experts of the highest score + bias; of equal values, the lower expert. Statistics are the mean score and the
//! number of tokens of each expert, the mean of logsumexp(z)², and the mean entropy of softmax scores. D is a
//! multiple of 8, E at most 256, K at most min(E, 16).

use super::bindings::routegrad_score;
use super::cost::{Cost, Sizes, padded_experts};
use super::{In, Out, host_function, kernel};
use half::bf16;

/// Upper bound of K, the number of choices per token.
pub const MAX_CHOICES: usize = 16;

kernel! {
    /// Computes scores, choices, and the partial sums of the statistics.
    pub struct RouterForward = router_forward {
        /// `[T, E]`.
        scores: Out<'a, f32> [tokens * experts];
        /// `logsumexp(z) [T]`.
        log_sum_exp: Out<'a, f32> [tokens];
        /// `[T, K]`, ascending; may be absent when K is 0.
        choices: Option<Out<'a, i32>> [tokens * choices_per_token];
        /// `[ceil(T / 128), 2 E + 2]`, see [`partials`].
        partials: Out<'a, f32> => partials(tokens, experts);
        /// `[1]`: becomes the minimum of its value and the first token whose logits contain a NaN or an infinity.
        first_non_finite: Out<'a, i32> [1];
        /// `[T, D]`.
        x: In<'a, bf16> [tokens * hidden];
        /// `[E, D]`.
        w: In<'a, f32> [experts * hidden];
        /// `[E]`, added to the scores only for the choice.
        selection_bias: Option<In<'a, f32>> [experts];
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// K, the number of choices per token; 0 for no choice.
        choices_per_token: usize;
        /// The function that computes the scores from the logits.
        score: routegrad_score;
    }
}

host_function! {
    /// Number of elements of `partials`.
    pub fn partials = router_partials(tokens: usize, experts: usize) -> u64
}

impl RouterForward<'_> {
    /// The cost including [`RouterStatistics`].
    pub fn cost(s: &Sizes) -> Cost {
        let blocks = s.tokens.div_ceil(128);
        let flops = 6 * 128 * blocks * s.hidden.next_multiple_of(64) * padded_experts(s.experts);
        let scores = 4 * s.tokens * (s.experts + 1 + s.slots);
        let statistics = 4 * (2 * s.experts + 2) * (2 * blocks + 1);
        let read = 2 * s.tokens * s.hidden + 4 * s.experts * s.hidden;
        Cost::new(flops, read + scores + statistics)
    }
}

kernel! {
    /// Sums the partials, and divides scores, logsumexp² and entropy by T.
    pub struct RouterStatistics = router_statistics {
        /// `[2 E + 2]`: mean score and tokens of each expert, mean logsumexp², mean entropy.
        statistics: Out<'a, f32> [2 * experts + 2];
        /// `[ceil(T / 128), 2 E + 2]`.
        partials: In<'a, f32> => partials(tokens, experts);
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
    }
}
