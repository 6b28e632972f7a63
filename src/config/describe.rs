//! Writes a configuration as TOML with the meaning and the default of every key. The meanings are the doc comments of the
//! fields in `config/mod.rs`.

use super::Config;
use crate::error::Result;
use serde_json::Value as Json;
use std::fmt::Write;
use toml::{Table, Value};

/// The source code that defines the types.
const SOURCE: &str = include_str!("mod.rs");

/// Sections and their types, in order.
const SECTIONS: [(&str, &str); 5] = [
    ("model", "ModelConfig"),
    ("router", "RouterConfig"),
    ("balance", "BalanceConfig"),
    ("train", "TrainConfig"),
    ("data", "DataConfig"),
];

/// Returns `config` as TOML. A comment above every key gives its meaning and, where the meaning does not already give it,
/// the default from `defaults`. `settings` are the names and meanings of the keys that belong to the router.
///
/// # Errors
/// When a value cannot be written as TOML.
pub fn described(config: &Config, defaults: &Config, settings: &[(&str, &str)]) -> Result<String> {
    let (values, defaults) = (config.to_table()?, defaults.to_table()?);
    let mut text = String::new();
    for (section, name) in SECTIONS {
        let _ = writeln!(text, "[{section}]");
        let of = |table: &Table, key: &str| Some(table.get(section)?.get(key)?.clone());
        let mut keys = fields(name);
        if section == "router" {
            keys.extend(settings.iter().map(|(key, meaning)| (*key, vec![*meaning])));
        }
        for (key, meaning) in keys {
            let Some(value) = of(&values, key) else {
                continue;
            };
            for line in &meaning {
                let _ = writeln!(text, "# {line}");
            }
            let says = meaning.iter().any(|line| line.contains("Default:"));
            if let Some(default) = of(&defaults, key).filter(|_| !says) {
                let _ = writeln!(text, "# Default: {}.", inline(&default));
            }
            let _ = writeln!(text, "{key} = {}\n", inline(&value));
        }
    }
    Ok(text.trim_end().to_string())
}

/// Returns the names of a type's fields with the lines of their doc comments.
fn fields(name: &str) -> Vec<(&'static str, Vec<&'static str>)> {
    let start = SOURCE.find(&format!("pub struct {name} {{"));
    let body = start.map_or("", |at| &SOURCE[at..]);
    let (mut found, mut comment) = (Vec::new(), Vec::new());
    for line in body.lines().skip(1).take_while(|line| *line != "}") {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("/// ") {
            comment.push(text);
        } else if let Some((field, _)) = line.strip_prefix("pub ").and_then(|l| l.split_once(':')) {
            found.push((field, std::mem::take(&mut comment)));
        }
    }
    found
}

/// Returns a value as it is written after `key =`.
fn inline(value: &Value) -> String {
    match value {
        // The text is on one line, so that a comment can hold it. The escapes of JSON are valid in TOML too.
        Value::String(text) => Json::from(text.as_str()).to_string(),
        Value::Float(x) if *x != 0.0 && x.abs() < 1e-3 => format!("{x:e}"),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    #[test]
    fn every_key_has_a_meaning_and_the_text_gives_the_configuration_back() {
        let mut layers = Layers::preset("tiny");
        layers.set = vec!["train.eps=1e-12".into(), "data.source=\"a b\"".into()];
        let load = |layers: &Layers| Config::load(layers, &|_| Ok(())).unwrap();
        let (config, preset) = (load(&layers), load(&Layers::preset("tiny")));
        let text = described(&config, &preset, &[]).unwrap();
        let table = config.to_table().unwrap();
        for (section, name) in SECTIONS {
            let fields = fields(name);
            for key in table[section].as_table().unwrap().keys() {
                let meaning = fields.iter().find(|(field, _)| field == key);
                assert!(
                    meaning.is_some_and(|(_, m)| !m.is_empty()),
                    "{section}.{key}"
                );
            }
        }
        assert!(text.contains("# Default: 1e-8.\neps = 1e-12\n"), "{text}");
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
    }
}
