//! `kernels/router_sample.cu`: SparseMixer's choice of experts (2310.00811, 2409.12136), one for each stage, sampled
//! among the likely experts.
//!
//! A stage keeps the experts, except the expert of the stage before, with `(top − z_i) / max(|z_i|, top) <= 2 ε`, and
//! draws one from their softmax. Its factor is 1 where the expert is the likeliest or u > `threshold`, else
//! `untrusted`. The random numbers are those of [`crate::tensor::random`].

use super::bindings::routegrad_draws;
use super::{In, Out, kernel};

kernel! {
    /// Samples the experts of every stage, and computes the constants of their gates.
    pub struct RouterSample = router_sample {
        /// `[S, T]`.
        experts_chosen: Out<'a, i32> [stages * tokens];
        /// `[S, T]`.
        factors: Out<'a, f32> [stages * tokens];
        /// `[S, T, E]`, 0 or 1.
        kept: Out<'a, i32> [stages * tokens * experts];
        /// `[T, S]`, ascending.
        choices: Out<'a, i32> [tokens * stages];
        /// `[T, E]`.
        logits: In<'a, f32> [tokens * experts];
        /// `[1]`, in device memory, so that each replay of a captured step draws new numbers; if absent, the
        /// likeliest experts with factor 1.
        draws: Option<In<'a, routegrad_draws>> [1];
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
        /// S, the number of stages: 1 or 2.
        stages: usize;
        /// Index of the MoE layer, from 0: part of the key of the draws.
        layer: usize;
        /// ε of the mask: half of the relative distance from the largest logit above which an expert is excluded.
        epsilon: f64;
        /// A sample that is not the likeliest expert has factor 1 if its u exceeds this threshold.
        threshold: f64;
        /// The factor of the other samples.
        untrusted: f32;
    }
}
