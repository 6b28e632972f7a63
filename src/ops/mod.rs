//! The operations of a Mixture-of-Experts transformer, one per file, and their registry.
//!
//! A file holds, in order: the formula, the public function, the operation on the tape, the reference implementation
//! for the CPU (generic over f32 and f64), the cases of the checks, and tests against values computed by hand.

pub mod add;
pub mod add_norm;
pub mod attention;
pub mod balance;
pub mod cached_attention;
pub mod combine;
pub mod cross_entropy;
pub mod dispatch;
pub mod embedding;
pub mod expert_mean;
pub mod expert_rows;
pub mod experts;
pub mod gated_rows;
mod gates;
pub mod heads;
pub mod layernorm;
pub mod linear;
mod norm;
pub mod over_ranks;
pub mod qk_norm;
pub mod renormalize;
pub mod rmsnorm;
pub mod rope;
pub mod router;
pub mod routing;
mod rows;
pub mod sampled_experts;
pub mod sampled_gate;
pub mod sampled_outputs;
pub mod scale;
pub mod scores;
pub mod sigmoid_gate;
pub mod spans;
pub mod straight_through;
pub mod swiglu;
pub(crate) mod tokens;

use crate::tape::check::Case;

/// An operation's entry in the registry.
pub struct OpInfo {
    /// The name that `routegrad ops` and the gradient check show.
    pub name: &'static str,
    /// The formula, on one line.
    pub formula: &'static str,
    /// Returns the cases that the checks run.
    pub cases: fn() -> Vec<Case>,
}

/// Every operation.
pub const OPS: &[OpInfo] = &[
    OpInfo {
        name: "add",
        formula: "y = a + b",
        cases: add::cases,
    },
    OpInfo {
        name: "add_norm",
        formula: "s = x + y; norm(s)",
        cases: add_norm::cases,
    },
    OpInfo {
        name: "router",
        formula: "p = softmax(z); A = top K of p",
        cases: router::cases,
    },
    OpInfo {
        name: "renormalize",
        formula: "q_i = p_i / Σ_A p",
        cases: renormalize::cases,
    },
    OpInfo {
        name: "scores",
        formula: "σ(z); z on A, A the experts of positive z",
        cases: scores::cases,
    },
    OpInfo {
        name: "straight_through",
        formula: "w_i = p_i on A, or p_i / Σ_A p; backward: on and off A",
        cases: straight_through::cases,
    },
    OpInfo {
        name: "sampled_gate",
        formula: "w_a = h p_a, p softmax over the kept; backward: c p_a (1[j=a] − p_j)",
        cases: sampled_gate::cases,
    },
    OpInfo {
        name: "scale",
        formula: "y = x ⊙ w",
        cases: scale::cases,
    },
    OpInfo {
        name: "expert_rows",
        formula: "y_r = W_e(r) (silu(gate) ⊙ up), gate above up = G_e(r) x_t(r)",
        cases: expert_rows::cases,
    },
    OpInfo {
        name: "combine",
        formula: "y = Σ_A w_i e_i + Σ_{i∉A} w_i ê_i",
        cases: combine::cases,
    },
    OpInfo {
        name: "balance",
        formula: "E Σ f_i P_i; mean logsumexp²",
        cases: balance::cases,
    },
    OpInfo {
        name: "linear",
        formula: "y = x Wᵀ + b",
        cases: linear::cases,
    },
    OpInfo {
        name: "swiglu",
        formula: "y = silu(gate) ⊙ up",
        cases: swiglu::cases,
    },
    OpInfo {
        name: "rmsnorm",
        formula: "y = x ⊙ w / √(mean(x²) + ε)",
        cases: rmsnorm::cases,
    },
    OpInfo {
        name: "layernorm",
        formula: "y = (x − mean(x)) / √(var(x) + ε) ⊙ w + b",
        cases: layernorm::cases,
    },
    OpInfo {
        name: "rope",
        formula: "(a, b) -> (a cos − b sin, b cos + a sin)",
        cases: rope::cases,
    },
    OpInfo {
        name: "attention",
        formula: "o = softmax(q kᵀ / √hd, causal) v",
        cases: attention::cases,
    },
    OpInfo {
        name: "cross_entropy",
        formula: "Σ (logsumexp(z) − z[target]) / n, z = x Wᵀ",
        cases: cross_entropy::cases,
    },
    OpInfo {
        name: "embedding",
        formula: "y_t = table[id_t]",
        cases: embedding::cases,
    },
    OpInfo {
        name: "sigmoid_gate",
        formula: "y = σ(s) x",
        cases: sigmoid_gate::cases,
    },
    OpInfo {
        name: "gated_rows",
        formula: "y_t = σ(⟨x_t, w⟩) v_t",
        cases: gated_rows::cases,
    },
    OpInfo {
        name: "qk_norm",
        formula: "rmsnorm of the query and key heads of qkv",
        cases: qk_norm::cases,
    },
];
