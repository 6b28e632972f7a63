//! Converts a `config.json` of transformers to this program's configuration. A missing key has the default of transformers
//! v5, which writes only keys whose values differ from the default.

use crate::config::{ModelConfig, ModelFile, Norm, QkNorm, RouterConfig};
use crate::error::{Error, Result};
use serde_json::{Value, json};

/// The values of missing keys for a `model_type`.
struct Defaults {
    kv_heads: Option<u64>,
    eps: f64,
    theta: f64,
    /// Whether weights are renormalised; `None` if the model type has no key for it.
    renormalize: bool,
    qk_norm: QkNorm,
    /// Name of the key for biases of query, key and value, and whether these biases include the output projection.
    bias: Option<(&'static str, bool)>,
}

fn defaults(model_type: &str) -> Option<Defaults> {
    let base = Defaults {
        kv_heads: None,
        eps: 1e-5,
        theta: 1e4,
        renormalize: false,
        qk_norm: QkNorm::None,
        bias: None,
    };
    Some(match model_type {
        "mixtral" => Defaults {
            kv_heads: Some(8),
            theta: 1e6,
            renormalize: true,
            ..base
        },
        "olmoe" => Defaults {
            qk_norm: QkNorm::Full,
            bias: Some(("attention_bias", true)),
            ..base
        },
        "qwen2_moe" => Defaults {
            kv_heads: Some(16),
            eps: 1e-6,
            bias: Some(("qkv_bias", false)),
            ..base
        },
        "qwen3_moe" => Defaults {
            kv_heads: Some(4),
            eps: 1e-6,
            qk_norm: QkNorm::Head,
            bias: Some(("attention_bias", true)),
            ..base
        },
        _ => return None,
    })
}

/// The RoPE type without scaling of the angles.
const UNSCALED: &str = "default";

/// Upper bound of all counts, since the program may loop over a count before other checks.
const MOST: usize = 1 << 24;

/// A `config.json` that is being read.
struct Keys<'a>(&'a Value);

impl Keys<'_> {
    fn wrong(&self, key: &str, expected: &str) -> Error {
        let got = self.0.get(key).map(Value::to_string);
        Error::invalid(
            format!("config.json: {key}"),
            expected,
            got.unwrap_or("no such key".into()),
            "choose a model that this program can compute: docs/exchange.md",
        )
    }

    /// Returns the value of a key; `None` if it is missing or null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn count(&self, key: &str, default: Option<u64>) -> Result<usize> {
        let n = self.get(key).map_or(default, Value::as_u64);
        n.and_then(|n| usize::try_from(n).ok())
            .filter(|n| *n <= MOST)
            .ok_or_else(|| self.wrong(key, &format!("a whole number up to {MOST}")))
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        self.get(key)
            .map_or(Some(default), Value::as_f64)
            .ok_or_else(|| self.wrong(key, "a number"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key)
            .map_or(Some(default), Value::as_bool)
            .ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// Returns an error if the key is present and its value is not one of these.
    fn only(&self, key: &str, allowed: &[Value]) -> Result<()> {
        match self.get(key) {
            Some(value) if !allowed.contains(value) => {
                let names = allowed.iter().map(|value| format!("{value} or "));
                Err(self.wrong(key, &(names.collect::<String>() + "no such key")))
            }
            _ => Ok(()),
        }
    }
}

/// Reads the model of a `config.json`: of this program, or of type `mixtral`, `olmoe`, `qwen2_moe` or `qwen3_moe`.
///
/// # Errors
/// When the type is another one, a value is not valid, or the program cannot compute what a key requests.
pub fn read(config: &Value) -> Result<ModelFile> {
    let keys = Keys(config);
    let model_type = keys.get("model_type").and_then(Value::as_str).unwrap_or("");
    let Some(defaults) = defaults(model_type) else {
        if model_type == "routegrad" {
            return ModelFile::from_json(config);
        }
        return Err(keys.wrong(
            "model_type",
            "routegrad, mixtral, olmoe, qwen2_moe or qwen3_moe",
        ));
    };
    refuse(&keys)?;
    let qwen = model_type.starts_with("qwen");
    let hidden = keys.count("hidden_size", None)?;
    let layers = keys.count("num_hidden_layers", None)?;
    let heads = keys.count("num_attention_heads", None)?;
    let kv_heads = defaults.kv_heads.unwrap_or(heads as u64);
    let experts = match keys.get("num_experts") {
        Some(_) => "num_experts",
        None => "num_local_experts",
    };
    let expert_width = match qwen {
        true => "moe_intermediate_size",
        false => "intermediate_size",
    };
    let bias = match defaults.bias {
        None => false,
        Some((key, all)) => {
            let on = keys.flag(key, key == "qkv_bias")?;
            if on && all {
                return Err(keys.wrong(key, "false: no bias in the output projection"));
            }
            on
        }
    };
    let model = ModelConfig {
        vocab_size: keys.count("vocab_size", None)?,
        hidden,
        layers,
        heads,
        kv_heads: keys.count("num_key_value_heads", Some(kv_heads))?,
        head_dim: keys.count("head_dim", Some((hidden / heads.max(1)) as u64))?,
        num_experts: keys.count(experts, None)?,
        top_k: keys.count("num_experts_per_tok", None)?,
        expert_ffn_width: keys.count(expert_width, None)?,
        dense_ffn_width: keys.count("intermediate_size", None)?,
        dense_layers: match qwen {
            true => dense_layers(&keys, layers)?,
            false => vec![],
        },
        norm: Norm::RmsNorm,
        norm_eps: keys.number("rms_norm_eps", defaults.eps)?,
        rope_theta: theta(&keys, defaults.theta)?,
        tied_embeddings: keys.flag("tie_word_embeddings", false)?,
        qkv_bias: bias,
        qk_norm: defaults.qk_norm,
        shared_expert_width: match model_type {
            "qwen2_moe" => keys.count("shared_expert_intermediate_size", Some(5632))?,
            _ => 0,
        },
        sequence_length: keys.count("max_position_embeddings", None)?,
    };
    model.validate_file()?;
    let renormalize = match model_type {
        "mixtral" => true,
        _ => keys.flag("norm_topk_prob", defaults.renormalize)?,
    };
    let router = RouterConfig {
        name: "topk".into(),
        settings: toml::Table::from_iter([("renormalize".into(), renormalize.into())]),
    };
    Ok(ModelFile { model, router })
}

/// Returns an error for settings that would change the result and that the program does not support.
fn refuse(keys: &Keys) -> Result<()> {
    // Both names are those of the same function.
    keys.only("hidden_act", &["silu".into(), "swish".into()])?;
    keys.only("clip_qkv", &[])?;
    keys.only("partial_rotary_factor", &[1.0.into(), 1.into()])?;
    if let Some(scaling) = keys.get("rope_scaling") {
        let kinds = ["rope_type", "type"].map(|key| scaling.get(key));
        let mut given = kinds.into_iter().flatten().peekable();
        if given.peek().is_none() || given.any(|kind| kind != UNSCALED) {
            return Err(keys.wrong("rope_scaling", "none, or one of type default"));
        }
    }
    // A window that covers the longest sequence has no effect.
    let [window, context] =
        ["sliding_window", "max_position_embeddings"].map(|key| keys.get(key)?.as_u64());
    let harmless = window.zip(context).is_some_and(|(w, c)| w >= c);
    if !harmless {
        keys.only("use_sliding_window", &[false.into()])?;
        // mixtral has only the width; other types ignore the width unless `use_sliding_window` is set.
        if keys.0["model_type"] == "mixtral" {
            keys.only("sliding_window", &[])?;
        } else if keys.0.get("use_sliding_window").is_none() {
            keys.only("sliding_window", &[0.into()])?;
        }
    }
    let full = |kind: &Value| kind == "full_attention" || harmless && kind == "sliding_attention";
    let kinds = keys.get("layer_types");
    let all_full = |kinds: &Vec<Value>| kinds.iter().all(full);
    if kinds.is_some_and(|kinds| !kinds.as_array().is_some_and(all_full)) {
        return Err(keys.wrong("layer_types", "full_attention in every layer"));
    }
    Ok(())
}

/// Reads θ of RoPE: from `rope_parameters` of transformers v5, otherwise from `rope_theta`.
fn theta(keys: &Keys, default: f64) -> Result<f64> {
    let outer = keys.number("rope_theta", default)?;
    let Some(parameters) = keys.get("rope_parameters") else {
        return Ok(outer);
    };
    let flat = parameters
        .as_object()
        .filter(|p| !p.values().any(Value::is_object));
    if flat.is_none() {
        return Err(keys.wrong("rope_parameters", "one set of parameters for all layers"));
    }
    let inner = Keys(parameters);
    // `type` is the older name of this key.
    for key in ["rope_type", "type"] {
        inner.only(key, &[UNSCALED.into()])?;
    }
    inner.only("partial_rotary_factor", &[1.0.into(), 1.into()])?;
    inner.number("rope_theta", outer)
}

/// Returns the layers without experts: those in `mlp_only_layers`, and for a `decoder_sparse_step` of n all layers but
/// every n-th.
fn dense_layers(keys: &Keys, layers: usize) -> Result<Vec<usize>> {
    let step = keys.count("decoder_sparse_step", Some(1))?.max(1);
    let none = json!([]);
    let listed = keys.get("mlp_only_layers").unwrap_or(&none).as_array();
    let listed: Option<Vec<u64>> = listed.and_then(|l| l.iter().map(Value::as_u64).collect());
    let listed = listed.ok_or_else(|| keys.wrong("mlp_only_layers", "a list of layers"))?;
    let dense = |l: &usize| listed.contains(&(*l as u64)) || (l + 1) % step != 0;
    Ok((0..layers).filter(dense).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qwen(more: Value) -> Value {
        let mut config = json!({
            "model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 20,
            "vocab_size": 40, "max_position_embeddings": 64,
        });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    #[test]
    fn missing_keys_have_the_defaults_of_transformers() {
        let file = read(&qwen(json!({}))).unwrap();
        assert_eq!(file.model.norm_eps, 1e-6);
        assert_eq!((file.model.head_dim, file.model.rope_theta), (6, 1e4));
        assert_eq!(file.router.settings["renormalize"], false.into());
        assert!(file.model.dense_layers.is_empty());
    }

    #[test]
    fn rope_is_read_old_and_new() {
        let old = read(&qwen(json!({"rope_theta": 5e5}))).unwrap();
        let new = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
        assert_eq!(old, read(&qwen(new)).unwrap());
        assert_eq!(old.model.rope_theta, 5e5);
        let outside = json!({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}});
        assert_eq!(old, read(&qwen(outside)).unwrap());
    }

    #[test]
    fn dense_layers_are_listed_or_follow_from_the_step() {
        let keys = json!({"mlp_only_layers": [1], "decoder_sparse_step": 2});
        assert_eq!(read(&qwen(keys)).unwrap().model.dense_layers, [0, 1, 2]);
    }

    #[test]
    fn settings_without_effect_are_accepted() {
        let plain = read(&qwen(json!({}))).unwrap();
        for harmless in [
            json!({"hidden_act": "swish"}),
            json!({"rope_scaling": {"type": "default"}}),
            json!({"rope_scaling": null}),
            json!({"use_sliding_window": true, "sliding_window": 64}),
            json!({"sliding_window": 4096, "layer_types": ["sliding_attention"]}),
        ] {
            assert_eq!(read(&qwen(harmless.clone())).unwrap(), plain, "{harmless}");
        }
    }

    #[test]
    fn the_error_for_an_unsupported_setting_names_its_key() {
        for (key, config) in [
            ("hidden_act", json!({"hidden_act": "gelu"})),
            ("clip_qkv", json!({"clip_qkv": 8.0})),
            ("use_sliding_window", json!({"use_sliding_window": true})),
            ("sliding_window", json!({"sliding_window": 63})),
            ("rope_scaling", json!({"rope_scaling": {"type": "yarn"}})),
            (
                "rope_scaling",
                json!({"rope_scaling": {"type": "default", "rope_type": "yarn"}}),
            ),
            ("rope_scaling", json!({"rope_scaling": {"factor": 4.0}})),
            ("rope_scaling", json!({"rope_scaling": "linear"})),
            ("layer_types", json!({"layer_types": ["sliding_attention"]})),
            ("layer_types", json!({"layer_types": "sliding_attention"})),
            (
                "layer_types",
                json!({"sliding_window": 4096, "layer_types": ["chunked_attention"]}),
            ),
            (
                "rope_parameters",
                json!({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}),
            ),
            (
                "rope_type",
                json!({"rope_parameters": {"rope_type": "yarn"}}),
            ),
            // The older name of `rope_type`.
            (
                "config.json: type",
                json!({"rope_parameters": {"type": "yarn", "factor": 4}}),
            ),
            ("attention_bias", json!({"attention_bias": true})),
            ("num_experts", json!({"num_experts": "many"})),
            ("model_type", json!({"model_type": "llama"})),
        ] {
            let e = read(&qwen(config)).unwrap_err().to_string();
            assert!(e.contains(key), "{key}: {e}");
        }
        let mixtral =
            json!({"model_type": "mixtral", "sliding_window": 2, "use_sliding_window": false});
        let e = read(&qwen(mixtral)).unwrap_err().to_string();
        assert!(e.contains("sliding_window"), "{e}");
    }
}
