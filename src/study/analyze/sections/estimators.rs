//! The sections of the report on the estimators at one forward pass and on route regret.

use super::{layer_caption, over_layers, series};
use crate::error::Result;
use crate::report::page::{Section, Table};
use crate::study::analyze::estimators::{Compared, ESTIMATORS};
use crate::study::analyze::figures::{Chart, Mark, Series, charts};
use crate::study::analyze::regret::{Regret, Rerouted};

/// The result of [`crate::study::analyze::estimators::compare`].
type ByK = [(usize, Vec<Compared>)];

/// Returns the layers, each with every K and its comparison.
fn layers(by_k: &ByK) -> impl Iterator<Item = Vec<(usize, &Compared)>> {
    let count = by_k.first().map_or(0, |(_, layers)| layers.len());
    (0..count).map(move |layer| by_k.iter().map(|(k, all)| (*k, &all[layer])).collect())
}

/// Draws a panel for each layer, with one series over K for each name.
fn over_k(
    by_k: &ByK,
    names: &[&str],
    value: impl Fn(&Compared, usize) -> Option<f64>,
    y: &str,
) -> Result<Option<String>> {
    let panel = |(layer, by_k): (usize, Vec<(usize, &Compared)>)| Chart {
        caption: layer_caption(layer),
        series: names
            .iter()
            .enumerate()
            .map(|(n, name)| Series {
                name: (*name).into(),
                points: by_k.iter().map(|(k, c)| (*k, value(c, n))).collect(),
            })
            .collect(),
    };
    let panels: Vec<Chart> = layers(by_k).enumerate().map(panel).collect();
    charts(&panels, ["K", y], Mark::Line)
}

pub fn estimators(by_k: &ByK, notes: Vec<String>) -> Result<Section> {
    let rows = layers(by_k).enumerate().flat_map(|(layer, by_k)| {
        let each = move |(k, c)| (0..ESTIMATORS.len()).map(move |n| (layer, k, n, c));
        by_k.into_iter().flat_map(each)
    });
    let table = Table::of::<(usize, usize, usize, &Compared)>(
        rows,
        &[
            ("moe_layer", &|row| row.0.into()),
            ("top_k", &|row| row.1.into()),
            ("estimator", &|row| ESTIMATORS[row.2].into()),
            ("cosine_dw", &|row| row.3.dw[row.2].cosine.into()),
            ("error_dw", &|row| row.3.dw[row.2].error.into()),
            ("cosine_dz", &|row| row.3.dz[row.2].cosine.into()),
            ("error_dz", &|row| row.3.dz[row.2].error.into()),
        ],
    );
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
        figure: over_k(by_k, &ESTIMATORS, |c, n| c.dw[n].cosine, "cosine")?,
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
    for (layer, by_k) in layers(by_k).enumerate() {
        for (k, compared) in by_k {
            let mut row = vec![layer.into(), k.into()];
            row.extend(scales(compared).map(Into::into));
            table.rows.push(row);
        }
    }
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
        figure: over_k(by_k, &SCALE_SHOWN, |c, n| scales(c)[n], "")?,
    })
}

/// `rerouted` is the result of [`crate::study::analyze::regret::reroute`]; `unit` is the unit of its losses.
pub fn regret(
    rerouted: &[Vec<Rerouted>],
    unit: &'static str,
    notes: Vec<String>,
) -> Result<Section> {
    let layers: Vec<Regret> = rerouted.iter().map(|tokens| Regret::of(tokens)).collect();
    let applies = layers.iter().any(|r| r.tokens > 0);
    let table = Table::of(
        layers.iter().enumerate().filter(|_| applies),
        &[
            ("moe_layer", &|(layer, _)| (*layer).into()),
            ("tokens", &|(_, r)| r.tokens.into()),
            ("loss_chosen", &|(_, r)| r.chosen.into()),
            ("loss_runner_up", &|(_, r)| r.runner_up.into()),
            ("loss_mean_other", &|(_, r)| r.mean_other.into()),
            ("loss_best_other", &|(_, r)| r.best_other.into()),
            ("share_better", &|(_, r)| r.better.into()),
            ("regret", &|(_, r)| r.regret.into()),
            ("regret_from_here", &|(_, r)| r.regret_from_here.into()),
        ],
    );
    let of = |name: &str, f: fn(&Regret) -> f64| series(name, layers.iter().map(|r| Some(f(r))), 0);
    let bars = vec![
        of("regret", |r| r.regret),
        of("cost of the runner-up", |r| r.runner_up - r.chosen),
        of("mean cost of the others", |r| r.mean_other - r.chosen),
    ];
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
        table,
        figure: match applies {
            true => over_layers(bars, unit)?,
            false => None,
        },
    })
}
