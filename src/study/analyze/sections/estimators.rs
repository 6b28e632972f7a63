//! The sections of the report on the estimators at one forward pass and on route regret.

use super::{layer_caption, series};
use crate::error::Result;
use crate::report::page::{Section, Table};
use crate::study::analyze::estimators::{Compared, ESTIMATORS, Quality};
use crate::study::analyze::figures::{Axes, Chart, Mark, Series, charts};
use crate::study::analyze::regret::{Regret, Rerouted};

/// The result of [`crate::study::analyze::estimators::compare`].
type ByK = [(usize, Vec<Compared>)];

/// Returns a panel for each layer, with one series over K for each name.
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
        shows: "How close each estimator is to the exact gradient of the router, which densemixer \
                computes, at the same forward pass of this model on held-out text and with the same \
                incoming gradient. K is changed in all MoE layers together. The estimators differ in the \
                output of the experts that did not run: topk leaves it out; default uses ê, or c* ê with \
                the best scale c*; sampled uses a moving average over drawn training tokens that did not \
                choose the expert, as with router.source = \"sampled\". The next two are fitted on \
                training text on which every expert ran: the mean over the tokens that did not choose \
                the expert, and a linear function of x. The table contains the cosine and the relative \
                error of dW [E, D] and of dz [T, E], each with its own c*. The figure shows the cosine \
                of dW.",
        formula: "dz_j = p_j (s_j − Σ_i p_i s_i), s_i = ⟨g, e_i(x)⟩ for i in A, else ⟨g, v_i⟩; exact with v_i = e_i(x); dW = Σ_t dz xᵀ",
        notes,
        table,
        figure: lines(&panels, "K", "cosine")?,
    })
}

/// Names of the numbers of [`scale`], as columns of its table.
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
        shows: "Whether the default vectors have the right length: c* is the factor of the ê term at \
                which the squared error of the router's gradient is smallest. default has a smaller \
                error than topk exactly if c* is above ½. ν is the mean of an expert's outputs over \
                training tokens that did not choose it, in place of which default uses ê. If g has no \
                preferred direction, c* is about cos(ê, ν) |ν| / |ê|. ê is too long, or has another \
                direction than ν, because it averages the tokens that chose the expert.",
        formula: "c* = ⟨Δ_exact, Δ_default⟩ / ‖Δ_default‖², where Δ is the difference between a gradient and that of topk; |ê|² and ⟨ê, ν⟩ summed over \
                  experts, weighted by Σ p_ti over tokens t that did not choose i",
        notes,
        table,
        figure: lines(&panels, "K", "")?,
    })
}

/// `rerouted` is the result of [`crate::study::analyze::regret::reroute`]; `unit` is the unit of its losses.
pub fn regret(
    rerouted: &[Vec<Rerouted>],
    unit: &'static str,
    notes: Vec<String>,
) -> Result<Section> {
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
            of("mean cost of the others", |r| r.mean_other - r.chosen),
        ],
    };
    let axes = Axes {
        x: "MoE layer",
        y: unit,
    };
    Ok(Section {
        name: "route-regret",
        title: "Route regret",
        shows: "How good the router's choices are. For a sample of held-out tokens, the loss of the next \
                token with the chosen expert (the least probable of the K) is compared with the loss \
                with each expert that was not chosen. One token at one layer is rerouted at a time; each \
                expert has its own gate. Regret is the loss that the best of all experts would have \
                saved. The best expert is known only from the next token, so even a perfect router has \
                some regret. The runner-up and the mean over the other experts do not depend on the next \
                token.",
        formula: "mean over tokens of max(0, ℓ(chosen) − min_j ℓ(j)); from here: ℓ summed over the rest of the sequence",
        notes: match applies {
            true => notes,
            false => vec!["Does not apply: every expert is chosen.".into()],
        },
        figure: match applies {
            true => Some(charts(&[chart], &axes, Mark::Bar)?),
            false => None,
        },
        table,
    })
}
