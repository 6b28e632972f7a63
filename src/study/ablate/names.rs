//! Names of runs and axes.

use crate::config::Config;
use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use toml::{Table, Value};

/// Short names of frequent keys.
pub const SHORT: &[(&str, &str)] = &[
    ("router", "router.name"),
    ("seed", "train.seed"),
    ("steps", "train.steps"),
    ("learning_rate", "train.learning_rate"),
    ("data", "data.source"),
    ("device", "train.device"),
];

pub const SEED: &str = "train.seed";

/// Returns the full key of a short name.
pub fn long(key: &str) -> &str {
    let found = SHORT.iter().find(|(short, _)| *short == key);
    found.map_or(key, |(_, long)| long)
}

/// Returns the other keys whose values a value of `key` replaces.
pub fn replaced(key: &str) -> &'static [&'static str] {
    match key {
        "experts" => &["model.num_experts", "model.top_k"],
        "data.source" => &["data.mix"],
        "data.mix" => &["data.source"],
        _ => &[],
    }
}

/// Returns the name of an axis: the short name of the key, or the last part of the key.
pub fn short(key: &str) -> &str {
    match SHORT.iter().find(|(_, long)| *long == key) {
        Some((short, _)) => short,
        None => key.rsplit('.').next().unwrap_or(key),
    }
}

/// Replaces all characters except letters, digits and `._=-`, which are safe in a path.
fn clean(label: &str) -> String {
    let keep = |c: char| c.is_ascii_alphanumeric() || "._=-".contains(c);
    let cleaned: String = label
        .chars()
        .map(|c| if keep(c) { c } else { '_' })
        .collect();
    cleaned.trim_start_matches('.').into()
}

/// Returns the label; if it is a number, true or false, with the name of the axis before it, unless the axis is the seed.
pub fn with_axis(axis: &str, label: &str, between: &str) -> String {
    match axis != SEED && label.parse::<f64>().is_ok() || matches!(label, "true" | "false") {
        true => format!("{}{between}{label}", short(axis)),
        false => label.into(),
    }
}

/// Returns all labels, joined by `-`.
pub fn default(axes: &[String], labels: &[String]) -> String {
    let parts = axes.iter().zip(labels).filter(|(_, l)| !l.is_empty());
    let parts: Vec<String> = parts.map(|(a, l)| clean(&with_axis(a, l, "="))).collect();
    parts.join("-")
}

/// Returns the template with the axes in braces replaced by their labels.
///
/// # Errors
/// When a name in braces is not an axis.
pub fn fill(template: &str, axes: &[String], labels: &[String]) -> Result<String> {
    let by_name: BTreeMap<&str, &String> = axes
        .iter()
        .zip(labels)
        .flat_map(|(a, l)| [(a.as_str(), l), (short(a), l)])
        .collect();
    let mut name = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (key, after) = after.split_once('}').unwrap_or((after, ""));
        let Some(label) = by_name.get(key) else {
            let axes: Vec<&str> = axes.iter().map(|a| short(a)).collect();
            return Err(Error::usage(
                format!("name `{template}` of the grid"),
                format!("an axis in braces: {}", axes.join(", ")),
                format!("`{key}`"),
                "change the name",
            ));
        };
        name.push_str(before);
        name.push_str(&clean(label));
        rest = after;
    }
    name.push_str(rest);
    Ok(clean(&name))
}

/// Adds the name of the run to an error; the errors of `--set` are errors of keys of the grid here.
pub fn named(mut e: Error, run: &str) -> Error {
    if let Error::Invalid { op, .. } = &mut e {
        let key = op.replace("--set", "grid").replace("--preset", "preset");
        let key = key.replace("--experts", "experts");
        *op = format!("run {run}: {key}");
    }
    e
}

/// Returns the error for a run without a name, whose folder would be that of all runs.
pub fn no_name(template: Option<&str>) -> Error {
    Error::usage(
        "grid",
        "names of runs that contain a character other than the dots at their beginning",
        match template {
            Some(template) => format!("the name `{template}`"),
            None => "an axis with an empty value".into(),
        },
        "change the name",
    )
}

/// Converts nested tables to dotted keys.
pub fn dotted(table: Table) -> Table {
    let mut out = Table::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                let inner = dotted(inner).into_iter();
                out.extend(inner.map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            value => {
                out.insert(key, value);
            }
        }
    }
    out
}

/// Returns the dotted keys and the values of a configuration.
pub fn keys(config: &Config) -> BTreeMap<String, String> {
    let text = |value: Value| match value {
        Value::String(s) => format!("{s:?}"),
        value => value.to_string(),
    };
    // Every value of a configuration can be written as TOML.
    let table = dotted(Table::try_from(config).unwrap_or_default()).into_iter();
    table.map(|(key, value)| (key, text(value))).collect()
}

/// Returns the first key in which two configurations differ, with both values; "none" if one lacks the key.
pub fn difference(a: &Config, b: &Config) -> Option<[String; 3]> {
    let (a, b) = (keys(a), keys(b));
    let all: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let key = all.into_iter().find(|key| a.get(*key) != b.get(*key))?;
    let [a, b] = [a.get(key), b.get(key)].map(|v| v.map_or("none".into(), String::clone));
    Some([key.clone(), a, b])
}

/// Returns the error for two runs with the same name.
pub fn same_name(name: &str, a: &Config, b: &Config) -> Error {
    let differs = match difference(a, b) {
        None => "the same run twice".to_string(),
        Some([key, a, b]) => format!("two that differ in {key}, {a} and {b}"),
    };
    Error::usage(
        "grid",
        format!("one run with the name `{name}`"),
        differs,
        "give each run a different name: repeat no value, and use every axis in `name`",
    )
}

/// Returns the error for two runs with the same configuration.
pub fn same_configuration(a: &str, b: &str) -> Error {
    Error::usage(
        "grid",
        "runs with different configurations",
        format!("the same configuration for `{a}` and `{b}`"),
        "remove one of them, or the key that all runs share and that overrides their axis",
    )
}
