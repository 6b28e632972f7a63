//! The grids of the figures in the Default MoE paper (arXiv 2504.12463), at any scale.

use super::grid::Grid;
use crate::config::{Config, Layers};
use crate::error::{Error, Result};
use crate::report::nearest;
use toml::Value;

macro_rules! embedded {
    ($($name:literal),*) => {
        &[$(($name, include_str!(concat!("../../../configs/ablations/figure-", $name, ".toml")))),*]
    };
}

/// Number and grid of every figure that compares training runs.
pub const FIGURES: &[(&str, &str)] =
    embedded!["2", "5", "6", "7", "8", "9", "10", "11", "12", "13"];

/// The scales from which on each preset replaces the paper's model.
const LADDER: [(f64, &str); 3] = [(0.0, "tiny"), (0.05, "small"), (0.3, "557m")];

const RATE: &str = "train.learning_rate";

/// Returns the grid of a figure at the paper's size.
///
/// # Errors
/// When there is no grid for this figure.
pub fn figure(name: &str) -> Result<Grid> {
    if let Some((number, text)) = FIGURES.iter().find(|(n, _)| *n == name) {
        return Grid::parse(text, &format!("configs/ablations/figure-{number}.toml"));
    }
    let names: Vec<&str> = FIGURES.iter().map(|(n, _)| *n).collect();
    let near = nearest(name, names.iter().copied()).unwrap_or("5");
    Err(Error::usage(
        "--figure",
        format!("one of {}", names.join(", ")),
        format!("`{name}`"),
        match name {
            "1" | "3" | "4" => "figure 1 is a drawing; `routegrad analyze` draws 3 and 4".into(),
            _ => format!("did you mean `{near}`?"),
        },
    ))
}

/// Reduces the cost of a grid. For a scale s below 1, the preset of the base becomes `tiny` below 0.05, `small` below 0.3,
/// and `557m` otherwise, with that preset's batch. The number of steps is multiplied by √s, with a minimum of 20; learning
/// rates keep their ratio to the preset's rate, rounded to three digits. At every scale, 20 evaluations and 5 checkpoints
/// are spread over the run. Returns a description of the changes.
///
/// # Errors
/// When the scale is not in (0, 1], or the base of the grid sets no preset or no steps.
pub fn scale(grid: &mut Grid, scale: f64) -> Result<String> {
    if !(scale > 0.0 && scale <= 1.0) {
        return Err(Error::usage(
            "--scale",
            "a number above 0 and up to 1",
            scale.to_string(),
            "1 is the full size, 0.01 takes minutes a run on a CPU",
        ));
    }
    let needs = |what: &str| {
        Error::usage(
            "--scale",
            format!("a grid whose base sets {what}"),
            "none",
            "add it to [base], with sizes on an axis `width` instead of `preset`",
        )
    };
    let base = &mut grid.base;
    let preset = base.get("preset").and_then(Value::as_str);
    let preset = preset
        .map(str::to_string)
        .ok_or_else(|| needs("`preset`"))?;
    let full = base.get("train.steps").and_then(Value::as_integer);
    let full = full.ok_or_else(|| needs("`steps`"))?;
    let mut words = format!("scale 1: {preset}, {full} steps");
    let mut steps = full;
    if scale < 1.0 {
        let rung = LADDER.iter().rev().find(|(from, _)| scale >= *from);
        let small = rung.map_or("tiny", |(_, name)| name);
        let load = |name: &str| Config::load(&Layers::preset(name), &crate::routers::resolve);
        let (from, to) = (load(&preset)?, load(small)?);
        let ratio = to.train.learning_rate / from.train.learning_rate;
        steps = ((full as f64 * scale.sqrt()).ceil() as i64).max(20);
        base.insert("preset".into(), Value::String(small.into()));
        if let Some(rate) = base.get_mut(RATE) {
            scale_rates(rate, ratio);
        }
        for rates in grid.axes.iter_mut().filter_map(|axes| axes.get_mut(RATE)) {
            scale_rates(rates, ratio);
        }
        grid.target_perplexity = None;
        words = format!(
            "scale {scale}: {small} instead of {preset}, {steps} of {full} steps (√scale), \
             learning rates × {ratio:.3} (as the presets' own)"
        );
    }
    for (key, value) in [
        ("train.steps", steps),
        ("train.eval_interval", (steps + 19) / 20),
        ("train.checkpoint_interval", (steps + 4) / 5),
    ] {
        grid.base.insert(key.into(), Value::Integer(value));
    }
    Ok(words)
}

/// Multiplies a learning rate, or a list of them, by `ratio` and rounds to three significant digits.
fn scale_rates(value: &mut Value, ratio: f64) {
    match value {
        Value::Float(rate) => {
            let digits = format!("{:.2e}", *rate * ratio);
            *rate = digits.parse().unwrap_or(*rate * ratio);
        }
        Value::Array(all) => all.iter_mut().for_each(|v| scale_rates(v, ratio)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::summarize;
    use super::*;

    #[test]
    fn every_figure_plans_at_every_scale() {
        for (name, _) in FIGURES {
            for s in [1e-4, 0.01, 0.1, 0.5, 1.0] {
                let mut grid = figure(name).unwrap();
                assert!(!grid.title.is_empty() && !grid.description.is_empty());
                let said = scale(&mut grid, s).unwrap();
                let plan = grid
                    .plan()
                    .unwrap_or_else(|e| panic!("figure {name} at {s}: {e}"));
                assert!(plan.runs.len() > 1, "figure {name}: {said}");
                // The baseline exists, and every group has a baseline for comparison.
                let none = tempfile::tempdir().unwrap();
                let baseline = grid.baseline.as_deref();
                let found = summarize(none.path(), &plan, baseline, None).unwrap();
                let alone = found.groups.iter().enumerate();
                let alone = alone.filter(|(i, g)| g.baseline == *i).count();
                assert!(alone < found.groups.len(), "figure {name}");
                // The plan of the saved grid is equal to the original plan.
                let again = Grid::parse(&grid.to_toml().unwrap(), "saved").unwrap();
                let again = again.plan().unwrap();
                let names = |p: &super::super::grid::Plan| -> Vec<_> {
                    p.runs
                        .iter()
                        .map(|r| (r.name.clone(), r.config.clone()))
                        .collect()
                };
                assert!(names(&plan) == names(&again), "figure {name} at {s}");
            }
        }
    }

    #[test]
    fn the_full_size_is_that_of_the_paper() {
        let mut grid = figure("11").unwrap();
        scale(&mut grid, 1.0).unwrap();
        let plan = grid.plan().unwrap();
        let config = &plan.runs[0].config;
        let tokens = config.train.steps
            * (config.train.sequences_per_step * config.model.sequence_length) as u64;
        assert_eq!((tokens as f64 / 1e9).round(), 160.0);
        assert_eq!(
            (config.model.hidden, config.train.learning_rate),
            (1024, 7e-4)
        );

        // Figure 2 (c) doubles and halves the width: the paper's other two presets.
        let mut grid = figure("2").unwrap();
        scale(&mut grid, 1.0).unwrap();
        let plan = grid.plan().unwrap();
        for preset in ["557m", "1.96b", "7.33b"] {
            let model = Config::load(&Layers::preset(preset), &|_| Ok(()))
                .unwrap()
                .model;
            assert!(
                plan.runs.iter().any(|r| r.config.model == model),
                "{preset}"
            );
        }
    }

    #[test]
    fn a_scale_shrinks_model_steps_and_rates_alike() {
        let mut grid = figure("12").unwrap();
        let full = grid.base["train.steps"].as_integer().unwrap() as f64;
        scale(&mut grid, 0.01).unwrap();
        let plan = grid.plan().unwrap();
        let config = &plan.runs[0].config;
        assert_eq!(config.model.hidden, 128);
        assert_eq!(config.train.learning_rate, 3e-3);
        assert_eq!(config.train.steps as f64, (full * 0.1).ceil());
        for s in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(scale(&mut figure("5").unwrap(), s).is_err());
        }
    }
}
