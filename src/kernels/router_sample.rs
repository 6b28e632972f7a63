//! `kernels/router_sample.cu`: SparseMixer's choice of experts (2310.00811, 2409.12136), one for each stage, sampled among
//! the likely.
//!
//! A stage keeps the experts, other than that of the stage before, with `(top − z_i) / max(|z_i|, top) <= 2 ε`, and draws one
//! from their softmax. Its factor is 1 where the expert is the likeliest or u > `threshold`, else `untrusted`. The draws are
//! those of [`crate::tensor::random`].

use super::bindings::routegrad_draws;
use super::{In, Out, kernel};

kernel! {
    /// The experts of every stage, and what their gates are made of.
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
        /// `[1]`, in device memory, so that a captured step draws anew; absent: the likeliest experts, factor 1.
        draws: Option<In<'a, routegrad_draws>> [1];
        /// T.
        tokens: usize;
        /// E.
        experts: usize;
        /// S, 1 or 2.
        stages: usize;
        /// The MoE layer, from 0: part of the key of the draws.
        layer: usize;
        /// ε of the mask: half of the relative distance to the largest logit from which on an expert is left out.
        epsilon: f64;
        /// A sample that is not the likeliest has factor 1 where its u is above it.
        threshold: f64;
        /// The factor of the other samples.
        untrusted: f32;
    }
}
