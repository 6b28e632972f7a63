//! `kernels/router_backward.cu`: from gradients of the scores to those of logits, tokens and router weight.
//!
//! With `d = dscores + dmean / T`: `dz = p (d − Σ p d)` behind a softmax, `p (1 − p) d` behind a sigmoid, d where p > 0 behind
//! a ReLU, d for logits; `+ dlse2 (2 / T) logsumexp(z) softmax(z)`. Then `dx = dz W`, and `dW = dzᵀ x` through one partial
//! `[E, D]` for each run of tokens.

use super::bindings::routegrad_score;
use super::cost::{Cost, Sizes, padded_experts};
use super::{In, Out, host_function, kernel};
use half::bf16;

kernel! {
    /// dz, dx, and the partial sums of dW.
    pub struct RouterBackward = router_backward {
        /// `[T, D]`, assigned, or added to.
        dx: Out<'a, bf16> [tokens * hidden];
        /// `[T, E]`, assigned.
        dz: Out<'a, f32> [tokens * experts];
        /// `[runs, E, D]`, see [`workspace`].
        dw_partials: Out<'a, f32> => workspace(tokens, experts, hidden);
        /// `[T, E]`, those of the forward pass.
        scores: In<'a, f32> [tokens * experts];
        /// `[T]`; read with `dlse2` alone.
        log_sum_exp: Option<In<'a, f32>> [tokens];
        /// `[T, E]`; absent: 0.
        dscores: Option<In<'a, f32>> [tokens * experts];
        /// `[E]`, the gradient of the mean scores; absent: 0.
        dmean: Option<In<'a, f32>> [experts];
        /// `[1]`, the gradient of the mean of logsumexp²; absent: 0.
        dlse2: Option<In<'a, f32>> [1];
        /// `[T, D]`.
        x: In<'a, bf16> [tokens * hidden];
        /// `[E, D]`.
        w: In<'a, f32> [experts * hidden];
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// D.
        hidden: usize;
        /// Which function of the logits the scores are.
        score: routegrad_score;
        /// Whether dx is added to.
        accumulate: bool;
    }
}

host_function! {
    /// Elements of `dw_partials`.
    pub fn workspace = router_backward_workspace(tokens: usize, experts: usize, hidden: usize) -> u64
}

impl RouterBackward<'_> {
    /// Together with [`RouterWeightGradient`]; dx and dW are assigned, or added to, through so many partial sums of \[E, D\].
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
    /// `dW = or += Σ partials`, in order.
    pub struct RouterWeightGradient = router_weight_gradient {
        /// `[E, D]`, assigned, or added to.
        dw: Out<'a, f32> [experts * hidden];
        /// `[runs, E, D]`.
        dw_partials: In<'a, f32> => workspace(tokens, experts, hidden);
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// D.
        hidden: usize;
        /// Whether `dw` is added to, or assigned.
        accumulate: bool;
    }
}
