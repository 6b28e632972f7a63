//! Selects the architecture of transformers that computes a model as in evaluation, and writes its `config.json`.

use crate::config::{Config, ModelConfig, ModelFile, Norm, QkNorm};
use crate::error::Result;
use crate::routers::topk::TopK;
use crate::tensor::dtype::DType;
use serde_json::{Value, json};
use std::fmt;

/// The code that computes the exported model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen2-MoE: RMSNorm, TopK, optionally a shared expert and biases of queries, keys and values.
    Qwen2Moe,
    /// Qwen3-MoE: RMSNorm, TopK, norms of queries and keys over each head.
    Qwen3Moe,
    /// The Python code that is written beside the weights.
    Routegrad,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Architecture::Qwen2Moe => "qwen2_moe",
            Architecture::Qwen3Moe => "qwen3_moe",
            Architecture::Routegrad => "routegrad",
        })
    }
}

/// Returns the architecture of a model whose router is called `name` and evaluates as `equivalent`, and the properties of
/// the model that no architecture of transformers has.
pub fn choose(
    model: &ModelConfig,
    name: &str,
    equivalent: Option<&TopK>,
) -> (Architecture, Vec<String>) {
    let mut foreign = Vec::new();
    if model.norm != Norm::RmsNorm {
        foreign.push("LayerNorm".into());
    }
    if equivalent.is_none() {
        foreign.push(format!("router {name}"));
    }
    let architecture = match model.qk_norm {
        QkNorm::None => Architecture::Qwen2Moe,
        QkNorm::Head | QkNorm::Full => Architecture::Qwen3Moe,
    };
    if model.qk_norm == QkNorm::None && model.heads * model.head_dim != model.hidden {
        foreign.push("head_dim other than hidden / heads".into());
    }
    if model.qk_norm == QkNorm::Full {
        foreign.push("norms of queries and keys over all heads".into());
    }
    // In Qwen3, the biases include the output projection.
    if architecture == Architecture::Qwen3Moe && model.qkv_bias {
        foreign.push("biases beside norms of queries and keys".into());
    }
    if architecture == Architecture::Qwen3Moe && model.shared_expert_width > 0 {
        foreign.push("a shared expert beside norms of queries and keys".into());
    }
    match foreign.is_empty() {
        true => (architecture, foreign),
        false => (Architecture::Routegrad, foreign),
    }
}

/// Returns `config.json` with keys that transformers 4 and 5 read. `renormalize` states whether the weights of the chosen
/// experts sum to 1.
///
/// # Errors
/// When a router setting cannot be written as JSON.
pub fn config_json(
    architecture: Architecture,
    config: &Config,
    renormalize: bool,
    dtype: DType,
) -> Result<Value> {
    let m = &config.model;
    let mut json = match architecture {
        Architecture::Routegrad => ModelFile {
            model: m.clone(),
            router: config.router.clone(),
        }
        .to_json()?,
        Architecture::Qwen2Moe | Architecture::Qwen3Moe => json!({
            "model_type": architecture.to_string(),
            "vocab_size": m.vocab_size,
            "hidden_size": m.hidden,
            "intermediate_size": m.dense_ffn_width,
            "num_hidden_layers": m.layers,
            "num_attention_heads": m.heads,
            "num_key_value_heads": m.kv_heads,
            "head_dim": m.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": m.sequence_length,
            "rms_norm_eps": m.norm_eps,
            "rope_theta": m.rope_theta,
            "tie_word_embeddings": m.tied_embeddings,
            "use_sliding_window": false,
            "decoder_sparse_step": 1,
            "mlp_only_layers": m.dense_layers,
            "num_experts": m.num_experts,
            "num_experts_per_tok": m.top_k,
            "moe_intermediate_size": m.expert_ffn_width,
            "norm_topk_prob": renormalize,
        }),
    };
    let further = match architecture {
        Architecture::Qwen2Moe => json!({
            "architectures": ["Qwen2MoeForCausalLM"],
            "qkv_bias": m.qkv_bias,
            "shared_expert_intermediate_size": m.shared_expert_width,
        }),
        Architecture::Qwen3Moe => json!({
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": false,
        }),
        Architecture::Routegrad => json!({
            "architectures": ["RoutegradForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_routegrad.RoutegradConfig",
                "AutoModelForCausalLM": "modeling_routegrad.RoutegradForCausalLM",
            },
            "use_cache": false,
        }),
    };
    let name = match dtype {
        DType::Bf16 => "bfloat16",
        _ => "float32",
    };
    json["torch_dtype"] = name.into();
    if let Value::Object(further) = further {
        for (key, value) in further {
            json[key] = value;
        }
    }
    Ok(json)
}
