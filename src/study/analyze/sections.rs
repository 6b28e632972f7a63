//! The sections of the report: text, tables and figures.

mod estimators;

pub use estimators::{SCALE, estimators, regret, scale};

use super::figures::{Chart, Heatmap, Mark, Series, charts, heatmaps};
use super::gradients::Method;
use super::routing::Routed;
use super::{Analysis, Cell, FILL_PASSES, Table, vectors};
use crate::config::Config;
use crate::data::LeftOut;
use crate::error::Result;
use crate::routers;
use crate::tensor::Tensor;

fn layer_caption(layer: usize) -> String {
    format!("MoE layer {layer}")
}

fn numbered(n: usize) -> Vec<String> {
    (0..n).map(|i| i.to_string()).collect()
}

fn series(name: &str, values: impl IntoIterator<Item = Option<f64>>, first: usize) -> Series {
    Series {
        name: name.into(),
        points: (first..).zip(values).collect(),
    }
}

/// Draws bars over the MoE layers.
fn over_layers(series: Vec<Series>, y: &str) -> Result<Option<String>> {
    let caption = String::new();
    charts(&[Chart { caption, series }], ["MoE layer", y], Mark::Bar)
}

/// Draws bars over the experts, `[MoE layer][E]`, in a panel for each MoE layer.
fn over_experts(name: &str, layers: &[Vec<Option<f64>>], y: &str) -> Result<Option<String>> {
    let panel = |(layer, values): (usize, &Vec<Option<f64>>)| Chart {
        caption: layer_caption(layer),
        series: vec![series(name, values.iter().copied(), 0)],
    };
    let panels: Vec<Chart> = layers.iter().enumerate().map(panel).collect();
    charts(&panels, ["expert", y], Mark::Bar)
}

/// Returns the table and the heatmaps of a matrix `[E][E]` of each MoE layer.
fn matrices(value: &'static str, layers: Vec<Vec<Vec<Option<f64>>>>) -> (Table, Vec<Heatmap>) {
    let mut table = Table::new(&["moe_layer", "expert", "other_expert", value]);
    for (layer, matrix) in layers.iter().enumerate() {
        for (i, row) in matrix.iter().enumerate() {
            let cells = |(j, value): (usize, &Option<f64>)| -> Vec<Cell> {
                vec![layer.into(), i.into(), j.into(), (*value).into()]
            };
            table.rows.extend(row.iter().enumerate().map(cells));
        }
    }
    let map = |(layer, values): (usize, Vec<Vec<Option<f64>>>)| Heatmap {
        caption: layer_caption(layer),
        rows: numbered(values.len()),
        columns: numbered(values.len()),
        values,
    };
    (table, layers.into_iter().enumerate().map(map).collect())
}

/// Returns the note of an analysis of default vectors for a model that has none.
fn without_vectors(config: &Config) -> Vec<String> {
    let router = &config.router.name;
    vec![format!(
        "Does not apply: the router {router} keeps no default vectors."
    )]
}

/// Returns notes about this model for the analyses of gradients.
pub fn gradient_notes(config: &Config, filled: bool) -> Vec<String> {
    let router = &config.router.name;
    let mut notes = Vec::new();
    if filled {
        notes.push(format!(
            "The router {router} keeps no default vectors. Those of `default` were computed from {FILL_PASSES} \
             micro-batches of training text, with unchanged weights (β = 0.9, from zero)."
        ));
    }
    let built = routers::build(&config.router);
    if !built.as_ref().is_ok_and(|r| r.weighs_by_softmax()) {
        notes.push(format!(
            "The model was trained with {router}. Here its experts are weighted by the softmax of its \
             logits, without the other parts of {router}."
        ));
    } else if built.is_ok_and(|r| r.evaluates_all_experts()) {
        notes.push(format!(
            "The model was trained with {router}. Here each token chooses {} experts, as with topk.",
            config.model.top_k
        ));
    }
    if config.model.num_experts == 1 {
        notes.push("With one expert there is no choice to compare.".into());
    }
    notes
}

pub fn entropy(routed: &[Routed]) -> Result<Analysis> {
    let table = Table::of(
        routed.iter().enumerate(),
        &[
            ("moe_layer", &|(layer, _)| (*layer).into()),
            ("entropy_nats", &|(_, routed)| routed.entropy.into()),
        ],
    );
    let entropies = routed.iter().map(|r| Some(r.entropy));
    Ok(Analysis {
        name: "router-entropy",
        title: "Router entropy",
        shows: "How uncertain the router of each MoE layer is: the entropy of the probabilities of a token, \
                averaged over the held-out tokens. It is ln E if all experts are equally probable, and 0 if one \
                expert has probability 1.",
        formula: "mean over t of −Σ_i p_ti ln p_ti",
        notes: Vec::new(),
        table,
        figure: over_layers(vec![series("entropy", entropies, 0)], "nats")?,
    })
}

pub fn vector_similarity(config: &Config, trained: &[Tensor]) -> Result<Analysis> {
    let similarities = trained.iter().map(vectors::similarity);
    let (table, maps) = matrices("cosine", similarities.collect::<Result<_>>()?);
    let scale = "cosine: −1 blue, 0 white, 1 orange";
    Ok(Analysis {
        name: "default-vector-similarity",
        title: "Similarity of the default vectors",
        shows: "How similar the default vectors of a layer's experts are. Near 1, two experts have similar mean \
                outputs; near 0, their mean outputs differ.",
        formula: "⟨ê_i, ê_j⟩ / (‖ê_i‖ ‖ê_j‖)",
        notes: match trained.is_empty() {
            true => without_vectors(config),
            false => Vec::new(),
        },
        table,
        figure: heatmaps(&maps, ["expert", "expert"], scale, |c| c)?,
    })
}

/// `similarity` is the result of [`super::gradients::dense_similarity`].
pub fn dense_similarity(
    similarity: &[Vec<Vec<Option<f64>>>; 2],
    notes: Vec<String>,
) -> Result<Analysis> {
    let mut table = Table::new(&["moe_layer", "top_k", "method", "cosine"]);
    let layers = similarity[0].first().map_or(0, Vec::len);
    let mut panels = Vec::new();
    for layer in 0..layers {
        let lines = Method::BOTH.iter().zip(similarity).map(|(method, by_k)| {
            for (k, values) in by_k.iter().enumerate() {
                let (k, name, cosine) = (k + 1, method.name(), values[layer]);
                let row = vec![layer.into(), k.into(), name.into(), cosine.into()];
                table.rows.push(row);
            }
            series(method.name(), by_k.iter().map(|values| values[layer]), 1)
        });
        panels.push(Chart {
            series: lines.collect(),
            caption: layer_caption(layer),
        });
    }
    Ok(Analysis {
        name: "two-forward-similarity",
        title: "Similarity to the dense model's router gradient: two forward passes",
        shows: "How similar the router's gradient under topk and under default is to the gradient of the dense model, \
                in which every expert is active, with the same weights and text (figure 3 of the Default MoE \
                paper). K is changed in all MoE layers together. The dense model has another forward pass and \
                therefore another incoming gradient, so the figure shows both the difference of the models and \
                the quality of the estimators. The default vectors are frozen; the loss is the cross-entropy only.",
        formula: "⟨G_K, G_E⟩ / (‖G_K‖ ‖G_E‖), G [E, D] = ∂loss/∂W of a layer's router, flattened",
        notes,
        table,
        figure: charts(&panels, ["K", "cosine"], Mark::Line)?,
    })
}

pub fn frequency(config: &Config, routed: &[Routed]) -> Result<Analysis> {
    let mut table = Table::new(&["moe_layer", "expert", "tokens", "share"]);
    let shares: Vec<_> = routed.iter().map(Routed::frequency).collect();
    for (layer, (routed, shares)) in routed.iter().zip(&shares).enumerate() {
        for (expert, (count, share)) in routed.counts.iter().zip(shares).enumerate() {
            let (count, share) = (Cell::Count(*count), (*share).into());
            let row = vec![layer.into(), expert.into(), count, share];
            table.rows.push(row);
        }
    }
    let every = routers::build(&config.router)?.evaluates_all_experts();
    Ok(Analysis {
        name: "routing-frequency",
        title: "Routing frequency",
        shows: "How often each expert is chosen on held-out text; 1 / E is a balanced load.",
        formula: "f_i = tokens that chose i / Σ_j tokens that chose j",
        notes: match every {
            true => vec![format!(
                "With {} every expert processes every token: the shares are equal.",
                config.router.name
            )],
            false => Vec::new(),
        },
        table,
        figure: over_experts("share of the routed slots", &shares, "share")?,
    })
}

pub fn co_activation(config: &Config, routed: &[Routed]) -> Result<Analysis> {
    let shared = |r: &Routed| r.counts.iter().sum::<u64>() > r.tokens;
    let applies = routed.iter().any(shared);
    let shown = routed.iter().filter(|_| applies);
    let (table, maps) = matrices("share", shown.map(Routed::co_activation).collect());
    let axes = ["also chosen", "expert"];
    Ok(Analysis {
        name: "co-activation",
        title: "Co-activation",
        shows: "Which experts are chosen together: among the tokens that chose the expert of the row, the \
                share that also chose the expert of the column.",
        formula: "n_ij / n_i, where n_ij is the number of tokens that chose i and j",
        notes: match applies {
            true => Vec::new(),
            false => vec![format!(
                "Does not apply: with K = {} no token has two experts.",
                config.model.top_k
            )],
        },
        table,
        figure: heatmaps(&maps, axes, "share: 0 white, 1 orange", |share| share)?,
    })
}

/// `by_source`: the name of each source, and how each MoE layer routed its text.
pub fn by_source(by_source: &[(String, Vec<Routed>)], left_out: &LeftOut) -> Result<Analysis> {
    let mut table = Table::new(&[
        "source",
        "moe_layer",
        "expert",
        "tokens",
        "share",
        "relative",
    ]);
    let layers = by_source.first().map_or(0, |(_, routed)| routed.len());
    let mut maps = Vec::new();
    for layer in 0..layers {
        // An expert's share of a source, relative to the mean of its shares over the sources.
        let shares: Vec<_> = by_source
            .iter()
            .map(|(_, r)| r[layer].frequency())
            .collect();
        let experts = shares.first().map_or(0, Vec::len);
        let mean = |e: usize| {
            let known: Vec<f64> = shares.iter().filter_map(|s| s[e]).collect();
            known.iter().sum::<f64>() / known.len() as f64
        };
        let means: Vec<f64> = (0..experts).map(mean).collect();
        let relative = |shares: &Vec<Option<f64>>| -> Vec<Option<f64>> {
            let pairs = shares.iter().zip(&means);
            let ratio = |(share, mean): (&Option<f64>, &f64)| {
                Some((*share)? / mean).filter(|r| r.is_finite())
            };
            pairs.map(ratio).collect()
        };
        let values: Vec<_> = shares.iter().map(relative).collect();
        for (((name, routed), shares), values) in by_source.iter().zip(&shares).zip(&values) {
            for (expert, (share, value)) in shares.iter().zip(values).enumerate() {
                table.rows.push(vec![
                    name.as_str().into(),
                    layer.into(),
                    expert.into(),
                    Cell::Count(routed[layer].counts[expert]),
                    (*share).into(),
                    (*value).into(),
                ]);
            }
        }
        maps.push(Heatmap {
            caption: layer_caption(layer),
            rows: by_source.iter().map(|(name, _)| name.clone()).collect(),
            columns: numbered(experts),
            values,
        });
    }
    let scale = "share of a source's tokens over the mean share: ¼ blue, 1 white, 4 orange";
    let mut notes = Vec::new();
    for (why, names) in [
        ("shorter than one sequence", &left_out.short),
        ("with less held-out text than these", &left_out.smaller),
    ] {
        if !names.is_empty() {
            notes.push(format!("Left out, {why}: {}.", names.join(", ")));
        }
    }
    if by_source.len() == 1 {
        notes.push("There is one source: nothing to compare it with.".into());
    }
    Ok(Analysis {
        name: "routing-by-source",
        title: "Domain specialisation",
        shows: "Whether experts specialise: each expert's share of the tokens of a source of the text, \
                relative to the mean of its shares over the sources. The sources are the files of a folder, \
                or, for a single text, consecutive groups with the same number of documents. If the text is \
                a folder of prepared tokens, they have only held-out documents; otherwise they include training text.",
        formula: "f_si / mean over s of f_si, f_si = share of source s that went to expert i",
        notes,
        table,
        figure: heatmaps(&maps, ["expert", "source"], scale, |r| {
            r.max(1e-9).log2() / 2.0
        })?,
    })
}

/// `error` is the result of [`super::gradients::gradient_error`].
pub fn gradient_error(error: &[Vec<Option<f64>>], notes: Vec<String>) -> Result<Analysis> {
    let mut table = Table::new(&["moe_layer", "method", "relative_error"]);
    let mut bars = Vec::new();
    for (method, values) in Method::BOTH.iter().zip(error) {
        for (layer, value) in values.iter().enumerate() {
            let row = vec![layer.into(), method.name().into(), (*value).into()];
            table.rows.push(row);
        }
        bars.push(series(method.name(), values.iter().copied(), 0));
    }
    Ok(Analysis {
        name: "gradient-error",
        title: "Error of the router's gradient",
        shows: "The error of a method's gradient of the logits, because it did not run every expert, at the \
                incoming gradient of the method itself (Default MoE, eq. 7 and 9). The error of densemixer \
                is 0; the error of a zero gradient is 1.",
        formula: "‖dz_densemixer − dz_method‖ / ‖dz_densemixer‖ over all tokens of a layer",
        notes,
        table,
        figure: over_layers(bars, "relative error")?,
    })
}

pub fn drift(config: &Config, drifts: &[Vec<Option<f64>>]) -> Result<Analysis> {
    let mut table = Table::new(&["moe_layer", "expert", "relative_distance"]);
    for (layer, values) in drifts.iter().enumerate() {
        for (expert, value) in values.iter().enumerate() {
            let row = vec![layer.into(), expert.into(), (*value).into()];
            table.rows.push(row);
        }
    }
    let name = "‖m − ê‖ / ‖m‖";
    Ok(Analysis {
        name: "default-vector-distance",
        title: "Default vectors and current outputs",
        shows: "The distance between an expert's mean output on the next training micro-batch and its default \
                vector, which averages the outputs of earlier steps. The method assumes that it is small.",
        formula: "‖m_i − ê_i‖ / ‖m_i‖, m_i weighted as the router's settings say, ê_i before its update",
        notes: match drifts.is_empty() {
            true => without_vectors(config),
            false => Vec::new(),
        },
        table,
        figure: over_experts(name, drifts, name)?,
    })
}
