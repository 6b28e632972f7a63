//! A grid of runs: a base configuration, and axes whose combinations are the runs.
//!
//! A grid file is TOML. `[base]` holds keys that all runs share; `[axes]` holds a list of values for each key that varies.
//! Several `[[axes]]` tables define several products, and the grid is the union of their runs. A key is a key of the
//! configuration, one of `preset`, `experts` and `width` (a factor on the preset's hidden size and heads), or a short name
//! for a frequent key: see [`names::SHORT`]. A value of an axis can be a table, which sets several keys and can have a `label`.

use super::names::{self, SEED, long, replaced};
use crate::config::{self, Config, Layers};
use crate::data;
use crate::data::tokenizer::loss_unit;
use crate::error::{Error, Result};
use crate::report::in_plain_words;
use crate::routers;
use crate::study::plan::flops_per_token;
use serde::{Deserialize, Deserializer, Serialize};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

const ROUTER: &str = "router.name";
/// Upper bound of the number of evaluations per run if no setting gives their interval, which is rounded up.
const EVALUATIONS: u64 = 20;
const WIDTH: &str = "width";

/// The content of a grid file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    #[serde(default)]
    pub title: String,
    /// Purpose and limits of the comparison.
    #[serde(default)]
    pub description: String,
    /// Name of a run, with `{key}` for the value of an axis. Default: the values of all axes, joined by `-`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Baseline: the value of the compared axis (`router`, if it varies) with which the other values are compared.
    /// Default: the first value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
    /// Perplexity to reach. Default: the final perplexity of the baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_perplexity: Option<f64>,
    /// A TOML file with keys of the configuration; `base` overrides it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    #[serde(default)]
    pub base: Table,
    /// Tables of axes, one for each product.
    #[serde(default, deserialize_with = "products")]
    pub axes: Vec<Table>,
}

/// Reads one table of axes, or a list of them.
fn products<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<Table>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a table of axes, or a list of them")]
    enum Products {
        One(Table),
        Several(Vec<Table>),
    }
    Ok(match Products::deserialize(from)? {
        Products::One(axes) => vec![axes],
        Products::Several(all) => all,
    })
}

/// One run of a grid.
#[derive(Clone, Debug)]
pub struct Run {
    /// Name of the run's folder.
    pub name: String,
    /// The run's value on each axis, in the order of [`Plan::axes`]; empty if neither an axis nor the base sets the key.
    pub labels: Vec<String>,
    pub config: Config,
}

impl Run {
    /// Returns the number of tokens of all steps.
    pub fn tokens(&self) -> f64 {
        let (model, train) = (&self.config.model, &self.config.train);
        train.steps as f64 * (train.sequences_per_step * model.sequence_length) as f64
    }

    /// Returns the FLOPs of all steps.
    pub fn flops(&self) -> Result<f64> {
        Ok(self.tokens() * flops_per_token(&self.config)? as f64)
    }
}

/// The runs of a grid in the order in which they are trained. The seed varies slowest, so that every method has a first
/// run before any has a second.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Keys of the axes: preset, width, experts, router, other keys sorted by name, seed.
    pub axes: Vec<String>,
    pub runs: Vec<Run>,
}

impl Plan {
    /// Returns the index of the seed in `axes`.
    pub fn seed(&self) -> Option<usize> {
        self.axes.iter().position(|a| a == SEED)
    }

    /// Returns the indices of the axes with more than one value, without the seed. The first is the compared axis: the
    /// router if it varies, otherwise any axis other than preset, width and experts if there is one.
    pub fn varied(&self) -> Vec<usize> {
        let several = |i: &usize| {
            let mut labels = self.runs.iter().map(|r| &r.labels[*i]);
            labels.any(|label| *label != self.runs[0].labels[*i])
        };
        let others = (0..self.axes.len()).filter(|i| Some(*i) != self.seed());
        let mut found: Vec<usize> = others.filter(several).collect();
        found.sort_by_key(|i| match self.axes[*i].as_str() {
            ROUTER => 0,
            "preset" | WIDTH | "experts" => 2,
            _ => 1,
        });
        found
    }

    /// Returns the unit of the losses of all runs.
    pub fn loss_unit(&self) -> &'static str {
        let runs = self.runs.iter();
        let mut units = runs.map(|r| loss_unit(&r.config.data.tokenizer));
        let first = units.next().unwrap_or_default();
        match units.all(|unit| unit == first) {
            true => first,
            false => "nats per token",
        }
    }
}

/// One value of an axis.
#[derive(Clone)]
struct Choice {
    label: String,
    set: Vec<(String, Value)>,
}

impl Grid {
    /// Reads a grid file.
    ///
    /// # Errors
    /// When the file cannot be read or is not a valid grid file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        Grid::parse(&text, &path.display().to_string())
    }

    /// Parses the text of a grid file; `from` names it in errors.
    ///
    /// # Errors
    /// When the text is not a valid grid file.
    pub fn parse(text: &str, from: &str) -> Result<Self> {
        let mut grid: Grid = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| {
                text.get(..s.start).map_or(0, |t| t.matches('\n').count()) + 1
            });
            Error::usage(
                from,
                "a grid: base, axes, and the other keys that docs/ablations.md lists",
                format!("line {line}: {}", in_plain_words(e.message())),
                "correct the line",
            )
        })?;
        grid.base = flat(std::mem::take(&mut grid.base));
        grid.axes = grid.axes.into_iter().map(flat).collect();
        Ok(grid)
    }

    /// Returns the grid as the text of a grid file.
    ///
    /// # Errors
    /// When a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| {
            Error::invalid(
                "grid",
                "values that TOML can hold",
                e.to_string(),
                "check the grid's numbers",
            )
        })
    }

    /// Sets a key for all runs. Nothing else sets it, or the keys that it replaces, any longer.
    pub fn set(&mut self, key: &str, value: Value) {
        self.forget(long(key));
        self.base.insert(long(key).into(), value);
    }

    /// Removes a key, and the keys that it replaces, from the base, the axes and their tables.
    fn forget(&mut self, key: &str) {
        for key in [&[key][..], replaced(key)].concat() {
            self.base.remove(key);
            for axes in &mut self.axes {
                axes.remove(key);
                let lists = axes.iter_mut().filter_map(|(_, v)| v.as_array_mut());
                for table in lists.flatten().filter_map(Value::as_table_mut) {
                    *table = flat(std::mem::take(table));
                    table.remove(key);
                }
            }
        }
    }

    /// Sets an axis in every product. Nothing else sets its key, or the keys that it replaces, any longer.
    pub fn vary(&mut self, key: &str, values: Vec<Value>) {
        self.forget(long(key));
        if self.axes.is_empty() {
            self.axes.push(Table::new());
        }
        for axes in &mut self.axes {
            axes.insert(long(key).into(), Value::Array(values.clone()));
        }
    }

    /// Returns all runs.
    ///
    /// # Errors
    /// When the grid is empty, the configuration does not accept a key or value, or two runs of a product have the same
    /// name or the same configuration.
    pub fn plan(&self) -> Result<Plan> {
        let empty = |got: &str| {
            Err(Error::usage(
                "grid",
                "at least one axis, and a value on each",
                got,
                "for example use --router topk,default --seed 0,1,2, or [axes] in the grid file",
            ))
        };
        let products = self.axes.iter().map(|axes| axes_of(axes, self));
        let products: Vec<Vec<(String, Vec<Choice>)>> = products.collect::<Result<_>>()?;
        let mut axes: Vec<String> = products.iter().flatten().map(|(k, _)| k.clone()).collect();
        axes.sort_by_key(|a| order(a));
        axes.dedup();
        if axes.is_empty() {
            return empty("no axis");
        }
        let mut plan = Plan {
            axes,
            runs: Vec::new(),
        };
        for product in &products {
            let first = plan.runs.len();
            for choices in combinations(product) {
                let run = self.run(&plan.axes, &choices)?;
                match plan.runs.iter().position(|r| r.name == run.name) {
                    None => {
                        let mut others = plan.runs[first..].iter();
                        if let Some(same) = others.find(|r| r.config == run.config) {
                            return Err(names::same_configuration(&same.name, &run.name));
                        }
                        plan.runs.push(run);
                    }
                    // Two products may contain the same run.
                    Some(i) if i < first && plan.runs[i].config == run.config => {}
                    Some(i) => {
                        return Err(names::same_name(
                            &run.name,
                            &plan.runs[i].config,
                            &run.config,
                        ));
                    }
                }
            }
        }
        if plan.runs.is_empty() {
            return empty("an axis without values");
        }
        if let Some(seed) = plan.seed() {
            let seeds: Vec<String> = plan.runs.iter().map(|r| r.labels[seed].clone()).collect();
            let place = |label: &String| seeds.iter().position(|s| s == label);
            plan.runs.sort_by_key(|r| place(&r.labels[seed]));
        }
        Ok(plan)
    }

    fn run(&self, axes: &[String], choices: &[(&str, &Choice)]) -> Result<Run> {
        let on = |axis: &str| choices.iter().find(|(key, _)| *key == axis);
        let label = |axis: &String| match on(axis) {
            Some((_, choice)) => choice.label.clone(),
            None => self.base.get(axis).map(text).unwrap_or_default(),
        };
        let labels: Vec<String> = axes.iter().map(label).collect();
        let name = match &self.name {
            Some(template) => names::fill(template, axes, &labels)?,
            None => names::default(axes, &labels),
        };
        if name.is_empty() {
            return Err(names::no_name(self.name.as_deref()));
        }
        let base = self.base.iter().map(|(k, v)| (k.clone(), v.clone()));
        let mut base: Vec<_> = base.collect();
        // In one table, a mix replaces a source.
        base.sort_by_key(|(key, _)| key == "data.mix");
        let chosen = choices.iter().flat_map(|(_, c)| c.set.iter().cloned());
        let config = self
            .config(base.into_iter().chain(chosen))
            .map_err(|e| names::named(e, &name))?;
        Ok(Run {
            name,
            labels,
            config,
        })
    }

    /// Returns the configuration with these keys; later keys override earlier ones.
    fn config(&self, keys: impl Iterator<Item = (String, Value)>) -> Result<Config> {
        let mut layers = Layers::preset("tiny");
        layers.file = self.config.clone();
        let mut width = None;
        for (key, value) in keys {
            match key.as_str() {
                "preset" => layers.preset = text(&value),
                "experts" => {
                    let keys = config::experts(&text(&value))?;
                    layers.set.extend(keys.map(|(k, n)| format!("{k}={n}")));
                }
                WIDTH => width = Some(value),
                ROUTER => layers.flags = vec![("router", ROUTER, value)],
                _ => layers.set.push(format!("{key}={value}")),
            }
        }
        let mut config = data::configure(&layers, &routers::resolve)?;
        if let Some(width) = width {
            let factor = match &width {
                Value::Float(x) => *x,
                Value::Integer(n) => *n as f64,
                _ => f64::NAN,
            };
            for (key, size) in [
                ("model.hidden", config.model.hidden),
                ("model.heads", config.model.heads),
            ] {
                let wide = size as f64 * factor;
                if !(wide >= 1.0 && wide.fract() == 0.0) {
                    return Err(Error::usage(
                        WIDTH,
                        format!("a factor that makes {key} = {size} another whole number"),
                        width.to_string(),
                        "choose for example 0.5, 1 or 2",
                    ));
                }
                layers.set.push(format!("{key}={wide}"));
            }
            config = data::configure(&layers, &routers::resolve)?;
        }
        if !layers.gives("train.eval_interval")? {
            let train = &mut config.train;
            train.eval_interval = train.eval_interval.min(train.steps.div_ceil(EVALUATIONS));
        }
        Ok(config)
    }
}

/// Returns a value as text: a string without quotes, any other value as in TOML.
fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

/// Converts nested tables to dotted keys, and short names to full keys.
fn flat(table: Table) -> Table {
    let dotted = names::dotted(table).into_iter();
    dotted
        .map(|(key, value)| (long(&key).into(), value))
        .collect()
}

fn order(axis: &str) -> (usize, String) {
    let known = ["preset", WIDTH, "experts", ROUTER];
    let place = match known.iter().position(|k| *k == axis) {
        Some(place) => place,
        None if axis == SEED => known.len() + 1,
        None => known.len(),
    };
    (place, axis.into())
}

fn axes_of(table: &Table, grid: &Grid) -> Result<Vec<(String, Vec<Choice>)>> {
    let mut axes = table
        .iter()
        .map(|(key, values)| {
            let Value::Array(values) = values else {
                return Err(Error::usage(
                    format!("axis `{key}`"),
                    "a list of values",
                    values.to_string(),
                    "write it in [ ], or move the key to [base]",
                ));
            };
            let choices = values.iter().map(|v| choice(key, v));
            Ok((key.clone(), choices.collect::<Result<_>>()?))
        })
        .collect::<Result<Vec<(String, Vec<Choice>)>>>()?;
    axes.sort_by_key(|(key, _)| order(key));
    if let Some((key, _)) = axes.iter().find(|(_, choices)| choices.is_empty()) {
        let of = match grid.title.as_str() {
            "" => "the grid",
            title => title,
        };
        return Err(Error::usage(
            format!("axis `{key}` of {of}"),
            "at least one value",
            "an empty list",
            "give values, or leave the axis out",
        ));
    }
    Ok(axes)
}

fn choice(axis: &str, value: &Value) -> Result<Choice> {
    let Value::Table(table) = value else {
        return Ok(Choice {
            label: text(value),
            set: vec![(axis.into(), value.clone())],
        });
    };
    let mut table = flat(table.clone());
    let label = table.remove("label");
    let own = table.get(axis);
    match label.as_ref().or(own) {
        Some(label) => Ok(Choice {
            label: text(label),
            set: table.into_iter().collect(),
        }),
        None => Err(Error::usage(
            format!("axis `{axis}`"),
            "a value with a label",
            value.to_string(),
            "add label = \"…\" to the table",
        )),
    }
}

/// Returns all combinations of one choice per axis. The axis before the seed varies fastest.
fn combinations(product: &[(String, Vec<Choice>)]) -> Vec<Vec<(&str, &Choice)>> {
    let mut all = vec![Vec::new()];
    for (key, choices) in product {
        let with = |taken: &Vec<_>, choice| [&taken[..], &[(key.as_str(), choice)]].concat();
        let longer = all
            .iter()
            .flat_map(|taken| choices.iter().map(move |c| with(taken, c)));
        all = longer.collect();
    }
    all
}
