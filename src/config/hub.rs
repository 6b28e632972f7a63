//! Reads and writes a model's `config.json`. The keys are those of Hugging Face's Mixture-of-Experts models, plus the
//! router and the settings that only this program has. [`ModelFile`] reads back exactly what it wrote.

use super::{ModelConfig, Norm, QkNorm, RouterConfig};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

const MODEL_TYPE: &str = "routegrad";

/// A model and its router as `config.json` holds them.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFile {
    /// Shapes of the transformer.
    pub model: ModelConfig,
    /// The router that the model was trained with.
    pub router: RouterConfig,
}

#[derive(Serialize, Deserialize)]
struct Keys {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    num_experts: usize,
    num_experts_per_tok: usize,
    moe_intermediate_size: usize,
    intermediate_size: usize,
    mlp_only_layers: Vec<usize>,
    norm_type: Norm,
    norm_eps: f64,
    rope_theta: f64,
    tie_word_embeddings: bool,
    attention_bias: bool,
    qk_norm: QkNorm,
    shared_expert_intermediate_size: usize,
    max_position_embeddings: usize,
    hidden_act: String,
    router: RouterConfig,
}

impl ModelFile {
    /// Returns the JSON object of `config.json`.
    ///
    /// # Errors
    /// When a router setting cannot be written as JSON.
    pub fn to_json(&self) -> Result<serde_json::Value> {
        let m = &self.model;
        serde_json::to_value(Keys {
            model_type: MODEL_TYPE.into(),
            vocab_size: m.vocab_size,
            hidden_size: m.hidden,
            num_hidden_layers: m.layers,
            num_attention_heads: m.heads,
            num_key_value_heads: m.kv_heads,
            head_dim: m.head_dim,
            num_experts: m.num_experts,
            num_experts_per_tok: m.top_k,
            moe_intermediate_size: m.expert_ffn_width,
            intermediate_size: m.dense_ffn_width,
            mlp_only_layers: m.dense_layers.clone(),
            norm_type: m.norm,
            norm_eps: m.norm_eps,
            rope_theta: m.rope_theta,
            tie_word_embeddings: m.tied_embeddings,
            attention_bias: m.qkv_bias,
            qk_norm: m.qk_norm,
            shared_expert_intermediate_size: m.shared_expert_width,
            max_position_embeddings: m.sequence_length,
            hidden_act: "silu".into(),
            router: self.router.clone(),
        })
        .map_err(|e| {
            Error::invalid(
                "config.json",
                "values that JSON can hold",
                e.to_string(),
                "check the router's settings",
            )
        })
    }

    /// Reads the JSON object of a `config.json` and checks the shapes.
    ///
    /// # Errors
    /// When the model is not one of this program, a key is missing or has a wrong type, or a shape is not valid.
    pub fn from_json(value: &serde_json::Value) -> Result<Self> {
        let foreign = |got: String| {
            Error::invalid(
                "config.json",
                "a model of routegrad",
                got,
                "choose a checkpoint that `train` wrote",
            )
        };
        match value.get("model_type").and_then(|t| t.as_str()) {
            Some(MODEL_TYPE) => {}
            other => return Err(foreign(format!("model_type {other:?}"))),
        }
        let keys = Keys::deserialize(value).map_err(|e| foreign(e.to_string()))?;
        let model = ModelConfig {
            vocab_size: keys.vocab_size,
            hidden: keys.hidden_size,
            layers: keys.num_hidden_layers,
            heads: keys.num_attention_heads,
            kv_heads: keys.num_key_value_heads,
            head_dim: keys.head_dim,
            num_experts: keys.num_experts,
            top_k: keys.num_experts_per_tok,
            expert_ffn_width: keys.moe_intermediate_size,
            dense_ffn_width: keys.intermediate_size,
            dense_layers: keys.mlp_only_layers,
            norm: keys.norm_type,
            norm_eps: keys.norm_eps,
            rope_theta: keys.rope_theta,
            tied_embeddings: keys.tie_word_embeddings,
            qkv_bias: keys.attention_bias,
            qk_norm: keys.qk_norm,
            shared_expert_width: keys.shared_expert_intermediate_size,
            sequence_length: keys.max_position_embeddings,
        };
        model.validate_file()?;
        Ok(ModelFile {
            model,
            router: keys.router,
        })
    }
}

impl ModelConfig {
    /// Checks the shapes of a `config.json`. No setting can change them, so the errors advise what to do with the file.
    ///
    /// # Errors
    /// When a shape is not valid.
    pub(crate) fn validate_file(&self) -> Result<()> {
        self.validate().map_err(|e| match e {
            Error::Invalid {
                op, expected, got, ..
            } => Error::invalid(
                format!("config.json ({op})"),
                expected,
                got,
                "correct the file, or choose another model",
            ),
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Layers};
    use super::*;

    #[test]
    fn a_model_reads_back_equal_from_config_json() {
        let mut layers = Layers::preset("small");
        layers.set = vec!["model.kv_heads=2".into(), "router.beta=0.75".into()];
        let config = Config::load(&layers, &|_| Ok(())).unwrap();
        let file = ModelFile {
            model: config.model,
            router: config.router,
        };
        let text = file.to_json().unwrap().to_string();
        let back = ModelFile::from_json(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(back, file);
    }

    #[test]
    fn a_foreign_model_is_named() {
        let json = serde_json::json!({ "model_type": "mixtral", "hidden_size": 4096 });
        let e = ModelFile::from_json(&json).unwrap_err().to_string();
        assert!(e.contains("mixtral"), "{e}");
    }
}
