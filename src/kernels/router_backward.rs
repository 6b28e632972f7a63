//! `kernels/router_backward.cu`: from gradients of the scores to gradients of logits, tokens and router weight.
//!
//! With `d = dscores + dmean / T`: `dz = p (d − Σ p d)` for a softmax, `p (1 − p) d` for a sigmoid, d where p > 0 for
//! a ReLU, d for logits; `+ dlse2 (2 / T) logsumexp(z) softmax(z)`. Then `dx = dz W`, and `dW = dzᵀ x` through one
//! partial sum `[E, D]` for each run of tokens.

use super::bindings::routegrad_score;
use super::cost::{Cost, Sizes, padded_experts};
use super::{In, Out, host_function, kernel};
use half::bf16;

kernel! {
    /// Computes dz, dx, and the partial sums of dW.
    pub struct RouterBackward = router_backward {
        /// `[T, D]`, assigned, or added to.
        dx: Out<'a, bf16> [tokens * hidden];
        /// `[T, E]`, assigned.
        dz: Out<'a, f32> [tokens * experts];
        /// `[runs, E, D]`, see [`workspace`].
        dw_partials: Out<'a, f32> => workspace(tokens, experts, hidden);
        /// `[T, E]`, the scores of the forward pass.
        scores: In<'a, f32> [tokens * experts];
        /// `[T]`; read only with `dlse2`.
        log_sum_exp: Option<In<'a, f32>> [tokens];
        /// `[T, E]`; if absent, 0.
        dscores: Option<In<'a, f32>> [tokens * experts];
        /// `[E]`, the gradient of the mean scores; if absent, 0.
        dmean: Option<In<'a, f32>> [experts];
        /// `[1]`, the gradient of the mean of logsumexp²; if absent, 0.
        dlse2: Option<In<'a, f32>> [1];
        /// `[T, D]`.
        x: In<'a, bf16> [tokens * hidden];
        /// `[E, D]`.
        w: In<'a, f32> [experts * hidden];
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// The function that computes the scores from the logits.
        score: routegrad_score;
        /// Whether to add to `dx` instead of assigning it.
        accumulate: bool;
    }
}

host_function! {
    /// Number of elements of `dw_partials`.
    pub fn workspace = router_backward_workspace(tokens: usize, experts: usize, hidden: usize) -> u64
}

impl RouterBackward<'_> {
    /// The cost including [`RouterWeightGradient`], with this many partial sums of \[E, D\]; dx and dW are assigned,
    /// or added to.
    pub fn cost(s: &Sizes, accumulate: bool, partials: usize) -> Cost {
        let experts = padded_experts(s.experts);
        let flops_dx = 6 * s.tokens.next_multiple_of(128) * s.hidden.next_multiple_of(64) * experts;
        let flops_dw = 6 * s.tokens.next_multiple_of(64) * s.hidden.next_multiple_of(128) * experts;
        let passes = if accumulate { 2 } else { 1 };
        let (x, w) = (2 * s.tokens * s.hidden, 4 * s.experts * s.hidden);
        // Scores and their gradient are read, dz is written and read.
        let logits = 16 * s.tokens * s.experts + 4 * s.tokens + 4 * s.experts;
        let dx = w + passes * x;
        let dw = x + 2 * partials * w + passes * w;
        Cost::new(flops_dx + flops_dw, logits + dx + dw)
    }
}

kernel! {
    /// Computes `dW = Σ partials` or `dW += Σ partials`, in order.
    pub struct RouterWeightGradient = router_weight_gradient {
        /// `[E, D]`, assigned, or added to.
        dw: Out<'a, f32> [experts * hidden];
        /// `[runs, E, D]`.
        dw_partials: In<'a, f32> => workspace(tokens, experts, hidden);
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// D, the width of the model.
        hidden: usize;
        /// Whether to add to `dw` instead of assigning it.
        accumulate: bool;
    }
}
