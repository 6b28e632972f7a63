//! The cost of a model, computed from its shapes alone: parameters and floating-point operations.

use super::{ModelConfig, Norm, QkNorm};

/// Number of parameters of each part of the model. For a part that every layer has, the number is per layer.
struct Parts {
    embedding: u128,
    head: u128,
    attention_matrices: u128,
    attention_vectors: u128,
    norms: u128,
    dense_ffn: u128,
    router: u128,
    expert: u128,
    shared_expert: u128,
    dense_layers: u128,
    moe_layers: u128,
}

fn parts(m: &ModelConfig) -> Parts {
    let wide = |n: usize| n as u128;
    let (d, head_dim) = (wide(m.hidden), wide(m.head_dim));
    let (q, kv) = (wide(m.heads) * head_dim, wide(m.kv_heads) * head_dim);
    let norm = match m.norm {
        Norm::LayerNorm => 2 * d,
        Norm::RmsNorm => d,
    };
    let qk_norm = match m.qk_norm {
        QkNorm::None => 0,
        QkNorm::Head => 2 * head_dim,
        QkNorm::Full => q + kv,
    };
    let bias = if m.qkv_bias { q + 2 * kv } else { 0 };
    let shared = wide(m.shared_expert_width);
    Parts {
        embedding: wide(m.vocab_size) * d,
        head: wide(m.vocab_size) * d,
        attention_matrices: d * (q + 2 * kv) + q * d,
        attention_vectors: bias + qk_norm,
        norms: norm * (2 * wide(m.layers) + 1),
        dense_ffn: 3 * d * wide(m.dense_ffn_width),
        router: wide(m.num_experts) * d,
        expert: 3 * d * wide(m.expert_ffn_width),
        // Its sigmoid gate is one row.
        shared_expert: if shared > 0 { 3 * d * shared + d } else { 0 },
        dense_layers: wide(m.dense_layers.len()),
        moe_layers: wide(m.layers - m.dense_layers.len()),
    }
}

fn parameters(m: &ModelConfig, experts: usize) -> u128 {
    let p = parts(m);
    let head = if m.tied_embeddings { 0 } else { p.head };
    p.embedding
        + head
        + p.norms
        + m.layers as u128 * (p.attention_matrices + p.attention_vectors)
        + p.dense_layers * p.dense_ffn
        + p.moe_layers * (p.router + experts as u128 * p.expert + p.shared_expert)
}

/// Converts to `u64`; returns `u64::MAX` if the number does not fit. Counts for validated shapes cannot overflow 128 bits.
fn saturating(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// Returns the number of parameters of the complete model. Default vectors are buffers and are not counted.
pub fn total_parameters(m: &ModelConfig) -> u64 {
    saturating(parameters(m, m.num_experts))
}

/// Returns the number of parameters that one token uses: those of K experts per layer instead of E.
pub fn active_parameters(m: &ModelConfig) -> u64 {
    saturating(parameters(m, m.top_k))
}

/// Returns the floating-point operations of training on one token, forward and backward: 6 per parameter for the matrix
/// products, and 6 S per layer and channel for the causal half of attention. Recomputation, norms and the embedding lookup
/// are not counted.
pub fn flops_per_token(m: &ModelConfig) -> u64 {
    let p = parts(m);
    let channels = (m.heads * m.head_dim) as u128;
    let matrices = p.head
        + m.layers as u128 * p.attention_matrices
        + p.dense_layers * p.dense_ffn
        + p.moe_layers * (p.router + m.top_k as u128 * p.expert + p.shared_expert);
    let attention = (m.layers * m.sequence_length) as u128 * channels;
    saturating(6 * (matrices + attention))
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Layers};
    use super::*;

    fn model(preset: &str, experts: &str) -> ModelConfig {
        let mut layers = Layers::preset(preset);
        layers.experts = Some(experts.into());
        Config::load(&layers, &|_| Ok(())).unwrap().model
    }

    #[test]
    fn total_parameters_are_those_of_the_method() {
        for (preset, eight, thirty_two) in [
            ("557m", "556.7", "555.4"),
            ("1.96b", "1964.0", "1958.1"),
            ("7.33b", "7330.1", "7305.3"),
        ] {
            let millions = |e| format!("{:.1}", total_parameters(&model(preset, e)) as f64 / 1e6);
            for e in ["8c1", "8c2"] {
                assert_eq!(millions(e), eight, "{preset} {e}");
            }
            for e in ["32c1", "32c2", "32c4"] {
                assert_eq!(millions(e), thirty_two, "{preset} {e}");
            }
        }
        let tiny = total_parameters(&model("tiny", "8c1")) as f64;
        assert_eq!(format!("{:.1}", tiny / 1e6), "3.7");
        let small = total_parameters(&model("small", "8c1")) as f64;
        assert_eq!(format!("{:.0}", small / 1e6), "24");
    }

    #[test]
    fn active_parameters_and_flops_are_those_of_the_method() {
        // Active parameters in millions, operations in 10^9, tokens/s at half of 989 TFLOP/s.
        let table = [
            ("557m", "8c1", "208.5", "1.008", 490_600),
            ("557m", "8c2", "258.3", "1.306", 378_500),
            ("557m", "32c1", "169.9", "0.776", 637_200),
            ("557m", "32c2", "182.3", "0.851", 581_300),
            ("557m", "32c4", "207.2", "1.000", 494_500),
            ("1.96b", "8c1", "571.2", "2.941", 168_150),
            ("1.96b", "8c2", "770.2", "4.135", 119_600),
            ("1.96b", "32c1", "416.1", "2.010", 246_030),
            ("1.96b", "32c2", "465.8", "2.308", 214_220),
            ("1.96b", "32c4", "565.3", "2.905", 170_210),
            ("7.33b", "8c1", "1759.0", "9.581", 51_610),
            ("7.33b", "8c2", "2554.9", "14.356", 34_450),
            ("7.33b", "32c1", "1137.3", "5.851", 84_520),
            ("7.33b", "32c2", "1336.3", "7.044", 70_200),
            ("7.33b", "32c4", "1734.2", "9.432", 52_430),
        ];
        for (preset, experts, active, giga, tokens) in table {
            let m = model(preset, experts);
            let case = format!("{preset} {experts}");
            let millions = active_parameters(&m) as f64 / 1e6;
            assert_eq!(format!("{millions:.1}"), active, "{case}");
            let flops = flops_per_token(&m) as f64;
            assert_eq!(format!("{:.3}", flops / 1e9), giga, "{case}");
            // Tokens/s are rounded to hundreds at 557m, to tens above.
            let unit = if preset == "557m" { 100.0 } else { 10.0 };
            let rate = 0.5 * crate::device::machine::H200_PEAK / flops / unit;
            assert_eq!(rate.round() as i64 * unit as i64, tokens, "{case}");
        }
    }

    #[test]
    fn options_add_their_parameters() {
        let mut m = model("tiny", "8c1");
        let base = total_parameters(&m);
        m.tied_embeddings = true;
        assert_eq!(total_parameters(&m), base - 256 * 128);
        m.tied_embeddings = false;
        m.qkv_bias = true;
        assert_eq!(total_parameters(&m), base + 4 * 3 * 128);
        m.qkv_bias = false;
        m.qk_norm = QkNorm::Head;
        assert_eq!(total_parameters(&m), base + 4 * 2 * 64);
        m.qk_norm = QkNorm::None;
        m.shared_expert_width = 10;
        assert_eq!(total_parameters(&m), base + 3 * (3 * 128 * 10 + 128));
        m.shared_expert_width = 0;
        m.kv_heads = 1;
        assert_eq!(total_parameters(&m), base - 4 * 2 * 128 * 64);
    }
}
