//! Determines the value of every key of a configuration. Later sources override earlier ones: the preset, then the file,
//! then each `--set key=value` in order, then `--experts` and the flags that set one key each. A source of the text that
//! is set after a mix replaces the mix.
//!
//! Values are inserted one key at a time, and the complete configuration is parsed after each, so that an error names the
//! key that caused it. At the end, widths that no source set are derived from the other values.

use super::names::common_name;
use super::{BalanceConfig, Config, PRESETS, RouterConfig, preset};
use crate::error::{Error, Result};
use crate::report::{in_plain_words, nearest, similarity};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Largest distance within which an error message searches for a divisor to suggest.
const FARTHEST: i64 = 1 << 16;

/// Checks a router's settings and fills in the default of each missing setting.
pub type RouterCheck<'a> = dyn Fn(&mut RouterConfig) -> Result<()> + 'a;

/// The sources of a configuration, in increasing order of priority.
#[derive(Clone, Debug)]
pub struct Layers {
    /// Name of a model in [`PRESETS`].
    pub preset: String,
    /// A TOML file with any of the keys.
    pub file: Option<PathBuf>,
    /// Whether the file is the resolved configuration of an earlier run. A key that is missing in such a file takes the
    /// value that it had when the run started, which may differ from the present default.
    pub resolved: bool,
    /// `section.key=value` with the value in TOML; a bare word is read as a string.
    pub set: Vec<String>,
    /// Experts and active experts, as in `32c4`. The width of an expert follows from them unless another source sets it.
    pub experts: Option<String>,
    /// Flags that set one key each: (flag, key, value).
    pub flags: Vec<(&'static str, &'static str, Value)>,
}

impl Layers {
    /// The configuration of the preset `name`, without changes.
    pub fn preset(name: &str) -> Self {
        Layers {
            preset: name.into(),
            file: None,
            resolved: false,
            set: Vec::new(),
            experts: None,
            flags: Vec::new(),
        }
    }

    /// Returns whether a source other than the preset sets this key.
    ///
    /// # Errors
    /// When the file cannot be read or parsed, or a `--set` value is not valid.
    pub fn gives(&self, key: &str) -> Result<bool> {
        let file = self.file.as_deref().map(read_file).transpose()?;
        let set = self.set.iter().map(|s| parse_set(s));
        let set: Vec<Assignment> = set.collect::<Result<_>>()?;
        let given = file.iter().flatten().chain(&set).any(|a| a.key == key);
        Ok(given || self.flags.iter().any(|(_, k, _)| *k == key))
    }
}

/// One value to insert into the configuration.
struct Assignment {
    /// Where the value was set, for error messages.
    from: String,
    key: String,
    value: Value,
}

/// Merges the sources. It does not validate shapes or check the router's settings.
pub(super) fn resolve(layers: &Layers) -> Result<Config> {
    let mut table = embedded(preset::find("--preset", PRESETS, &layers.preset)?);
    // The defaults of serde are the values that runs of earlier versions used.
    if !layers.resolved {
        let reduction = Value::try_from(BalanceConfig::default().aux_reduction);
        insert(
            &mut table,
            "balance.aux_reduction",
            reduction.map_err(|e| unwritable(&e))?,
        );
    }
    let known = known_keys(&table)?;
    let mut assignments = Vec::new();
    if let Some(path) = &layers.file {
        let mut file = read_file(path)?;
        // In one file, a mix replaces a source.
        file.sort_by_key(|a| a.key == "data.mix");
        assignments.push(file);
    }
    let mut flags: Vec<Assignment> = layers
        .flags
        .iter()
        .map(|(flag, key, value)| Assignment {
            from: (*flag).into(),
            key: (*key).into(),
            value: value.clone(),
        })
        .collect();
    if let Some(name) = &layers.experts {
        let experts = preset::experts(name)?.map(|(key, number)| Assignment {
            from: "--experts".into(),
            key: key.into(),
            value: number.into(),
        });
        flags.extend(experts);
    }
    // A flag that names the router is applied before --set, so that --set can change the settings of this router.
    assignments.push(
        layers
            .flags
            .iter()
            .filter(|(_, key, _)| *key == "router.name")
            .map(|(flag, key, value)| Assignment {
                from: (*flag).into(),
                key: (*key).into(),
                value: value.clone(),
            })
            .collect(),
    );
    assignments.push(
        layers
            .set
            .iter()
            .map(|s| parse_set(s))
            .collect::<Result<_>>()?,
    );
    assignments.push(flags);

    let given: Vec<String> = assignments
        .iter()
        .flatten()
        .map(|a| a.key.clone())
        .collect();
    for mut layer in assignments {
        // The router's name comes first, because a new name removes the settings of the previous router.
        layer.sort_by_key(|a| a.key != "router.name");
        for assignment in layer {
            assign(&mut table, assignment, &known)?;
        }
    }
    derive(&mut table, true)?;
    if !given.iter().any(|key| key == "train.micro_batch") {
        fit_micro_batch(&mut table);
    }
    parse(&table).map_err(|e| incomplete(&e))
}

/// Replaces the preset's micro-batch by the largest number, not above it, that divides the sequences of a step.
fn fit_micro_batch(table: &mut Table) {
    let number = |key: &str| get(table, key).and_then(Value::as_integer);
    let keys = ["train.sequences_per_step", "train.micro_batch"];
    // The validation reports values that are not valid batch sizes.
    if let [Some(sequences), Some(most)] = keys.map(number)
        && sequences > 0
        && let Some(micro) = (1..=most.min(sequences)).rev().find(|m| sequences % m == 0)
    {
        insert(table, keys[1], micro.into());
    }
}

/// Inserts one value and parses the complete configuration.
fn assign(table: &mut Table, a: Assignment, known: &[String]) -> Result<()> {
    let free = a
        .key
        .strip_prefix("router.")
        .is_some_and(|k| !k.contains('.'));
    if !free && !known.contains(&a.key) {
        return Err(unknown(&a, known));
    }
    if a.key == "router.name" && get(table, &a.key) != Some(&a.value) {
        table.remove("router");
    }
    // A source replaces a mix that was set before.
    if a.key == "data.source" {
        insert(table, "data.mix", Value::Array(Vec::new()));
    }
    insert(table, &a.key, a.value.clone());
    let mut whole = table.clone();
    derive(&mut whole, false)?;
    parse(&whole).map(drop).map_err(|e| {
        let message = e.message().lines().next().unwrap_or_default().to_string();
        let expected = message
            .split_once(", expected ")
            .map(|(_, e)| e.to_string());
        Error::usage(
            format!("{} ({})", a.key, a.from),
            in_plain_words(expected.as_ref().unwrap_or(&message)),
            a.value.to_string(),
            "change the value",
        )
    })
}

fn unknown(a: &Assignment, known: &[String]) -> Error {
    if let Some(key) = common_name(&a.key) {
        return Error::usage(
            a.from.clone(),
            "a key of the configuration",
            format!("`{}`", a.key),
            format!("use `{key}`"),
        );
    }
    // A key without its section is compared with the last part of every key.
    let near = if a.key.contains('.') {
        nearest(&a.key, known.iter().map(String::as_str))
    } else {
        known.iter().map(String::as_str).max_by(|x, y| {
            let last = |k: &str| similarity(&a.key, k.rsplit('.').next().unwrap_or(k));
            last(x).total_cmp(&last(y)).then(y.cmp(x))
        })
    };
    Error::usage(
        a.from.clone(),
        "a key of the configuration",
        format!("`{}`", a.key),
        format!("did you mean `{}`?", near.unwrap_or("model.hidden")),
    )
}

/// Derives the widths that no source set. If a width would not be a whole number: when `strict`, returns an error;
/// otherwise rounds down, since a later key may still change the result.
fn derive(table: &mut Table, strict: bool) -> Result<()> {
    let Some(Value::Table(model)) = table.get_mut("model") else {
        return Ok(());
    };
    // The parser and the validation report wrong types and zeros.
    let number = |key: &str| {
        model
            .get(key)
            .and_then(Value::as_integer)
            .filter(|n| *n > 0)
    };
    let (hidden, heads, experts) = (number("hidden"), number("heads"), number("num_experts"));
    let wide = hidden.map(|d| d.saturating_mul(22));
    for (key, dividend, divisor, [whole, parts]) in [
        ("kv_heads", heads, Some(1), ["model.heads", "1"]),
        ("head_dim", hidden, heads, ["model.hidden", "model.heads"]),
        (
            "expert_ffn_width",
            wide,
            experts,
            ["22 · model.hidden", "model.num_experts"],
        ),
    ] {
        let (Some(dividend), Some(divisor)) = (dividend, divisor) else {
            model.entry(key).or_insert(Value::Integer(0));
            continue;
        };
        if model.contains_key(key) {
            continue;
        }
        if strict && dividend % divisor != 0 {
            // RoPE rotates pairs of elements of a head, so the width must be even.
            let multiple = if key == "head_dim" { 2 } else { 1 };
            let fits = |d: &i64| dividend % (d * multiple) == 0;
            let near = [
                (1..divisor.min(FARTHEST)).rev().find(fits),
                (divisor..=dividend.min(FARTHEST)).find(fits),
            ];
            let near: Vec<String> = near.iter().flatten().map(i64::to_string).collect();
            let such_as = match near.is_empty() {
                true => String::new(),
                false => format!(", such as {}", near.join(" or ")),
            };
            return Err(Error::usage(
                parts,
                format!("a divisor of {whole} = {dividend}{such_as}"),
                divisor.to_string(),
                format!("change {parts} or model.hidden, or set model.{key}"),
            ));
        }
        model.insert(key.into(), Value::Integer(dividend / divisor));
    }
    // A dense layer has the width of one expert, as in the paper's counts of active parameters.
    if let (false, Some(width)) = (
        model.contains_key("dense_ffn_width"),
        model.get("expert_ffn_width").cloned(),
    ) {
        model.insert("dense_ffn_width".into(), width);
    }
    Ok(())
}

fn parse(table: &Table) -> std::result::Result<Config, toml::de::Error> {
    Value::Table(table.clone()).try_into()
}

fn incomplete(e: &toml::de::Error) -> Error {
    Error::usage(
        "configuration",
        "a complete configuration",
        e.message().to_string(),
        "start from a preset",
    )
}

pub(super) fn unwritable(e: &toml::ser::Error) -> Error {
    let help = "check the configuration's numbers";
    Error::invalid(
        "configuration",
        "values that TOML can hold",
        e.to_string(),
        help,
    )
}

/// Parses an embedded TOML file; a test parses each of them.
fn embedded(text: &str) -> Table {
    text.parse()
        .expect("embedded configurations are valid TOML")
}

/// Returns every key of the configuration: those of the preset with all defaults written out.
fn known_keys(preset: &Table) -> Result<Vec<String>> {
    let mut whole = preset.clone();
    derive(&mut whole, false)?;
    let table = parse(&whole).map_err(|e| incomplete(&e))?.to_table()?;
    Ok(flatten(&table).into_iter().map(|(key, _)| key).collect())
}

/// Returns dotted keys and their values. An empty section is returned as a key of its own.
fn flatten(table: &Table) -> Vec<(String, Value)> {
    let mut out = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) if !inner.is_empty() => out.extend(
                flatten(inner)
                    .into_iter()
                    .map(|(k, v)| (format!("{key}.{k}"), v)),
            ),
            _ => out.push((key.clone(), value.clone())),
        }
    }
    out
}

fn get<'a>(table: &'a Table, dotted: &str) -> Option<&'a Value> {
    let (section, key) = dotted.split_once('.')?;
    table.get(section)?.get(key)
}

fn insert(table: &mut Table, dotted: &str, value: Value) {
    let Some((section, key)) = dotted.split_once('.') else {
        table.insert(dotted.into(), value);
        return;
    };
    let inner = table
        .entry(section)
        .or_insert_with(|| Value::Table(Table::new()));
    if let Value::Table(inner) = inner {
        inner.insert(key.into(), value);
    }
}

fn read_file(path: &Path) -> Result<Vec<Assignment>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let table: Table = text.parse().map_err(|e: toml::de::Error| {
        let line = e.span().map_or(1, |s| {
            text.get(..s.start).map_or(0, |t| t.matches('\n').count()) + 1
        });
        Error::file(
            path,
            "TOML",
            format!("line {line}: {}", in_plain_words(e.message())),
            "correct the line",
        )
    })?;
    Ok(flatten(&table)
        .into_iter()
        .map(|(key, value)| Assignment {
            from: path.display().to_string(),
            key,
            value,
        })
        .collect())
}

fn parse_set(text: &str) -> Result<Assignment> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(Error::usage(
            "--set",
            "key=value, as in train.steps=100",
            format!("`{text}`"),
            "add the value",
        ));
    };
    let (key, value) = (key.trim(), value.trim());
    let value = format!("v = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(value.into()));
    Ok(Assignment {
        from: "--set".into(),
        key: key.into(),
        value,
    })
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
