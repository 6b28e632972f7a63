//! The comparisons at one forward pass, and route regret, in words, tables and figures.

use super::{layer_caption, series};
use crate::error::Result;
use crate::report::page::{Section, Table};
use crate::study::analyze::estimators::{Compared, ESTIMATORS, Quality};
use crate::study::analyze::figures::{Axes, Chart, Mark, Series, charts};
use crate::study::analyze::regret::{Regret, Rerouted};

/// What [`crate::study::analyze::estimators::compare`] gives.
type ByK = [(usize, Vec<Compared>)];

/// The panels of all layers: a series for each name, over K.
fn over_k(
    by_k: &ByK,
    names: &[&str],
    value: impl Fn(&Compared, usize) -> Option<f64>,
) -> Vec<Chart> {
    let layers = by_k.first().map_or(0, |(_, layers)| layers.len());
    let panel = |layer: usize| Chart {
        caption: layer_caption(layer),
        series: names
            .iter()
            .enumerate()
            .map(|(n, name)| Series {
                name: (*name).into(),
                points: by_k
                    .iter()
                    .map(|(k, layers)| (*k, value(&layers[layer], n)))
                    .collect(),
            })
            .collect(),
    };
    (0..layers).map(panel).collect()
}

fn lines(panels: &[Chart], x: &str, y: &str) -> Result<Option<String>> {
    match panels {
        [] => Ok(None),
        panels => charts(panels, &Axes { x, y }, Mark::Line).map(Some),
    }
}

pub fn estimators(by_k: &ByK, notes: Vec<String>) -> Result<Section> {
    let mut table = Table::new(&[
        "moe_layer",
        "top_k",
        "estimator",
        "cosine_dw",
        "error_dw",
        "cosine_dz",
        "error_dz",
    ]);
    let layers = by_k.first().map_or(0, |(_, layers)| layers.len());
    for layer in 0..layers {
        for (k, compared) in by_k {
            let Compared { dw, dz, .. } = &compared[layer];
            for ((name, dw), dz) in ESTIMATORS.iter().zip(dw).zip(dz) {
                let numbers = |q: &Quality| [q.cosine.into(), q.error.into()];
                let mut row = vec![layer.into(), (*k).into(), (*name).into()];
                row.extend(numbers(dw));
                row.extend(numbers(dz));
                table.rows.push(row);
            }
        }
    }
    let panels = over_k(by_k, &ESTIMATORS, |compared, n| compared.dw[n].cosine);
    Ok(Section {
        name: "estimator-similarity",
        title: "Estimators of the router's gradient at one forward pass",
        shows: "How near each estimator comes to the exact gradient of the router, which densemixer has, when nothing else \
                differs: one forward pass of this model on held-out text, one incoming gradient, K changed in all MoE layers \
                together. topk leaves out the experts that did not run; default puts ê in their place, or c* ê with the scale that \
                is best in hindsight; sampled puts the mean over drawn training tokens that did not choose the expert, a moving \
                average as router.source = \"sampled\" keeps it; the next two put what would be known had every expert run on training text: its mean over \
                tokens that did not choose it, and a linear function of x. Cosine and relative error of dW [E, D] and of dz [T, E]; \
                c* is each gradient's own. The figure shows the cosine of dW.",
        formula: "dz_j = p_j (s_j − Σ_i p_i s_i), s_i = ⟨g, e_i(x)⟩ on A and ⟨g, v_i⟩ off it; exact with v_i = e_i(x); dW = Σ_t dz xᵀ",
        notes,
        table,
        figure: lines(&panels, "K", "cosine")?,
    })
}

/// Names of the numbers of [`scale`], as a table heads them.
pub const SCALE: [&str; 4] = ["c_star_dz", "c_star_dw", "norm_ratio", "cosine"];
const SCALE_SHOWN: [&str; 4] = ["c* of dz", "c* of dW", "|ê| / |ν|", "cos(ê, ν)"];

fn scales(compared: &Compared) -> [Option<f64>; 4] {
    [
        compared.scale_dz,
        compared.scale_dw,
        compared.norm_ratio,
        compared.cosine,
    ]
}

pub fn scale(by_k: &ByK, notes: Vec<String>) -> Result<Section> {
    let mut table = Table::new(&["moe_layer", "top_k"]);
    table.columns.extend(SCALE.map(Into::into));
    let layers = by_k.first().map_or(0, |(_, layers)| layers.len());
    for layer in 0..layers {
        for (k, compared) in by_k {
            let mut row = vec![layer.into(), (*k).into()];
            row.extend(scales(&compared[layer]).map(Into::into));
            table.rows.push(row);
        }
    }
    let panels = over_k(by_k, &SCALE_SHOWN, |compared, n| scales(compared)[n]);
    Ok(Section {
        name: "default-vector-scale",
        title: "Scale of the default vectors",
        shows: "What the default vectors are worth: c* is the factor on the ê term at which the squared error of the router's gradient \
                is least; default has a smaller error than topk exactly where c* is above ½. ν is the mean of an expert's outputs over \
                training tokens that did not choose it, which ê stands in for; c* is about cos(ê, ν) |ν| / |ê| where g has no \
                preferred direction. A long ê, or one that points elsewhere, is the mark of averaging the tokens that chose the \
                expert.",
        formula: "c* = ⟨Δ_exact, Δ_default⟩ / ‖Δ_default‖², Δ the difference of a gradient from that of topk; |ê|² and ⟨ê, ν⟩ summed over \
                  experts, weighted by Σ p_ti over tokens t that did not choose i",
        notes,
        table,
        figure: lines(&panels, "K", "")?,
    })
}

/// `rerouted` as [`crate::study::analyze::regret::reroute`] gives it; its losses are in `unit`.
pub fn regret(rerouted: &[Vec<Rerouted>], unit: &'static str) -> Result<Section> {
    let mut table = Table::new(&[
        "moe_layer",
        "tokens",
        "loss_chosen",
        "loss_runner_up",
        "loss_mean_other",
        "loss_best_other",
        "share_better",
        "regret",
        "regret_from_here",
    ]);
    let layers: Vec<Regret> = rerouted.iter().map(|tokens| Regret::of(tokens)).collect();
    let applies = layers.iter().any(|r| r.tokens > 0);
    for (layer, r) in layers.iter().enumerate().filter(|_| applies) {
        let mut row = vec![layer.into(), r.tokens.into()];
        row.extend([r.chosen, r.runner_up, r.mean_other, r.best_other].map(Into::into));
        row.extend([r.better, r.regret, r.regret_from_here].map(Into::into));
        table.rows.push(row);
    }
    let of = |name: &str, f: fn(&Regret) -> f64| series(name, layers.iter().map(|r| Some(f(r))), 0);
    let chart = Chart {
        caption: String::new(),
        series: vec![
            of("regret", |r| r.regret),
            of("cost of the runner-up", |r| r.runner_up - r.chosen),
            of("cost of another", |r| r.mean_other - r.chosen),
        ],
    };
    let axes = Axes {
        x: "MoE layer",
        y: unit,
    };
    Ok(Section {
        name: "route-regret",
        title: "Route regret",
        shows: "What the router's choice is worth: for a sample of held-out tokens, the loss of the next token with the chosen expert \
                (the least probable of K) beside that with each expert that was not chosen, one token at one layer rerouted at a time, \
                each expert with its own gate. Regret is what the best of all experts would have saved; it is chosen in hindsight, \
                knowing the next token, so that a perfect router has some too. The runner-up and the mean over the others are not.",
        formula: "mean over tokens of max(0, ℓ(chosen) − min_j ℓ(j)); from here: ℓ summed over the rest of the sequence",
        notes: match applies {
            true => Vec::new(),
            false => vec!["Does not apply: every expert is chosen.".into()],
        },
        figure: match applies {
            true => Some(charts(&[chart], &axes, Mark::Bar)?),
            false => None,
        },
        table,
    })
}
