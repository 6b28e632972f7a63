//! `kernels/layer_tally.cu`: the counts of one micro-batch in a MoE layer, which are added to the layer's statistics
//! and to the loads of the step, and the updates of router state that use them.
//!
//! `n_e` is the number of tokens that chose expert e. Statistics are n, the tokens T and the entropy of the scores;
//! loads are n and T of the step so far; the fractions of the auxiliary loss are n or the loads, divided by their
//! sum. E is at most 256.

use super::{In, Out, kernel};

kernel! {
    /// Adds to the statistics and, in a pass that trains, to the loads and the flags.
    pub struct LayerTally = layer_tally {
        /// `[E + 2]`: tokens of each expert, tokens, entropy in nats; added to, or assigned with `first_of_stats`.
        stats: Out<'a, f64> [experts + 2];
        /// `[E + 1]`: tokens of each expert, tokens; added to, or assigned with `first_of_step`.
        load: Out<'a, f64> [experts + 1];
        /// `[2]`: the first token of the global batch whose logits are not finite, and the fault bits of the dispatch.
        flags: Out<'a, i32> [2];
        /// `[E]`.
        fractions: Out<'a, f32> [experts];
        /// `[E + 1]` of the dispatch.
        offsets: In<'a, i32> [experts + 1];
        /// `[1]`.
        first_non_finite: In<'a, i32> [1];
        /// `[1]`.
        fault: In<'a, i32> [1];
        /// `[1]`, from the router's statistics; if absent, the entropy is the sum of `entropy_parts`.
        mean_entropy: Option<In<'a, f32>> [1];
        /// `[parts]`, from [`ShareEntropy`].
        entropy_parts: Option<In<'a, f64>> [parts];
        /// T, the number of tokens.
        tokens: usize;
        /// Index of the first token in the global batch.
        first_token: usize;
        /// Number of elements of `entropy_parts`.
        parts: usize;
        /// E, the number of experts.
        experts: usize;
        /// Whether loads and flags are written, as in a pass that trains.
        trains: bool;
        /// Whether to assign `stats` instead of adding to it.
        first_of_stats: bool;
        /// Whether to assign `load` instead of adding to it.
        first_of_step: bool;
        /// Whether the fractions are over the step so far; otherwise they are over these tokens.
        over_step: bool;
    }
}

kernel! {
    /// `parts[b]` is the sum over the b-th block of 256 tokens of the entropy, in nats, of their scores divided by
    /// the sum of the scores.
    pub struct ShareEntropy = share_entropy {
        /// `[ceil(T / 256)]`, see [`parts`](ShareEntropy::parts).
        parts: Out<'a, f64> [tokens.div_ceil(256)];
        /// `[T, E]`.
        scores: In<'a, f32> [tokens * experts];
        /// T, the number of tokens.
        tokens: usize;
        /// E, the number of experts.
        experts: usize;
    }
}

impl ShareEntropy<'_> {
    /// Elements of `parts`.
    pub fn parts(tokens: usize) -> usize {
        tokens.div_ceil(256)
    }
}

kernel! {
    /// `b_e += rate sign(mean load − load_e)`: loss-free balancing (2408.15664).
    pub struct LossfreeUpdate = lossfree_update {
        /// `[E]`, added to.
        bias: Out<'a, f32> [experts];
        /// `[E]`.
        load: In<'a, f64> [experts];
        /// E, the number of experts.
        experts: usize;
        /// The amount by which a bias changes in one update.
        rate: f32;
    }
}

kernel! {
    /// `f_e = λ n_e / slots`: the regulariser of ReMoE (2412.14711).
    pub struct RemoeFractions = remoe_fractions {
        /// `[E]`.
        fractions: Out<'a, f32> [experts];
        /// `[1]`.
        lambda: In<'a, f32> [1];
        /// `[E + 1]` of the dispatch.
        offsets: In<'a, i32> [experts + 1];
        /// K T, the number of slots.
        slots: usize;
        /// E, the number of experts.
        experts: usize;
    }
}

kernel! {
    /// `λ *= factor^sign(N − K T)`, where N and T are the numbers of (token, expert) pairs and of tokens of all
    /// layers.
    pub struct RemoeUpdate = remoe_update {
        /// `[1]`, changed.
        lambda: Out<'a, f32> [1];
        /// `[layers, E + 1]`.
        load: In<'a, f64> [layers * (experts + 1)];
        /// Number of MoE layers.
        layers: usize;
        /// E, the number of experts.
        experts: usize;
        /// K, the number of experts per token.
        top_k: usize;
        /// The factor by which λ is multiplied or divided.
        factor: f64;
    }
}
