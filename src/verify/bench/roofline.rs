//! Writes a page with lower bounds for the time of an MoE layer on one GPU, and for the time that the router `default`
//! adds to `topk`. The bounds come from the formulas of `costs`, which the tests of the kernels compare with the counters
//! of the simulator.

use crate::config::count::flops_per_token;
use crate::config::{Config, Layers, ModelConfig};
use crate::device::machine::{Chip, h200};
use crate::error::{Error, Result};
use crate::kernels::cost::{Cost, Sizes};
use crate::kernels::grouped_swiglu::dot_columns as planned_dot_columns;
use crate::kernels::launchers::{self, TILE_AUTO};
use crate::kernels::router::RouterForward;
use crate::kernels::router_backward::{self, RouterBackward};
use crate::kernels::{
    Combine, DefaultDots, DispatchChoices, EmbeddingForward, ExpertMean, GateGradient,
    GroupedDownForward, GroupedGemmInputGradient, GroupedGemmWeightGradient, GroupedSwigluBackward,
    GroupedSwigluForward,
};

/// Expert settings, one per column of the page.
pub const EXPERTS: [&str; 5] = ["8c1", "8c2", "32c1", "32c2", "32c4"];
/// Models of the page in `docs/`.
pub const PRESETS: [&str; 2] = ["1.96b", "7.33b"];
/// Number of tokens of a micro-batch.
pub const TOKENS: usize = 16_384;

/// Assumptions of the prediction for the work that `default` adds: the share of the floor's speed that it reaches, the number
/// of launches, and the seconds per launch.
const PREDICTED_SHARE: f64 = 0.85;
const MORE_LAUNCHES: f64 = 1.0;
pub(super) const LAUNCH: f64 = 2e-6;
/// Shares of the floor's speed measured on an H200 for sorting dy alone, and for sorting with the dots of the default vectors.
const SORT_SHARE: f64 = 0.75;
const SORT_WITH_DOTS_SHARE: f64 = 0.65;
/// Name of the kernel that sorts dy: `embedding_forward`, or `default_dots` for the router `default`.
pub(super) const SORT_OF_DY: &str = "embedding_forward (default_dots), rows of dy";

/// Lower bounds in seconds: for `topk`, and for the work that `default` adds.
#[derive(Clone, Copy, Debug, Default)]
struct Floor {
    topk: f64,
    added: f64,
}

impl Floor {
    fn sum<'a>(floors: impl IntoIterator<Item = &'a Floor>) -> Self {
        floors.into_iter().fold(Self::default(), |a, b| Self {
            topk: a.topk + b.topk,
            added: a.added + b.added,
        })
    }

    /// Formats the bounds in microseconds.
    fn cell(self) -> String {
        let (topk, added) = (microseconds(self.topk), microseconds(self.added.abs()));
        let sign = if self.added < 0.0 { "−" } else { "+" };
        match (self.topk > 0.0, self.added != 0.0) {
            (true, true) => format!("{topk} {sign} {added}"),
            (false, _) => format!("+ {added}"),
            _ => topk,
        }
    }
}

fn microseconds(seconds: f64) -> String {
    let us = 1e6 * seconds;
    if us < 10.0 {
        format!("{us:.2}")
    } else {
        format!("{us:.1}")
    }
}

/// Workspace sizes that the launchers use for these sizes.
struct Plan {
    /// Number of partial sums of the router's weight gradient.
    router_partials: usize,
    /// Number of partial dots of a row.
    dot_columns: usize,
}

impl Plan {
    fn new(s: &Sizes, chip: &Chip) -> Result<Self> {
        let sim = launchers::sim()?;
        let before = sim.options().unwrap_or_default();
        sim.set_options(&launchers::Options {
            multiprocessors: chip.multiprocessors as i32,
            arch: 10 * chip.capability.0 + chip.capability.1,
            ..before
        })?;
        let partials = router_backward::workspace(sim, s.tokens, s.experts, s.hidden);
        let columns = planned_dot_columns(sim, s.rows, s.experts, s.hidden, s.ffn, TILE_AUTO);
        sim.set_options(&before)?;
        Ok(Self {
            router_partials: partials? / (s.experts * s.hidden),
            dot_columns: columns?,
        })
    }
}

/// Returns the number of partial dots per row that the launchers use for these sizes.
///
/// # Errors
/// When a launcher does not support the sizes.
pub fn dot_columns(s: &Sizes) -> Result<usize> {
    Ok(Plan::new(s, h200())?.dot_columns)
}

/// Returns the sizes of an MoE layer of a model for a micro-batch of `tokens` tokens.
pub(super) fn layer_sizes(model: &ModelConfig, tokens: usize) -> Sizes {
    Sizes {
        tokens,
        hidden: model.hidden,
        ffn: model.expert_ffn_width,
        experts: model.num_experts,
        slots: model.top_k,
        rows: tokens * model.top_k,
    }
}

/// Returns the name and cost of each kernel in a layer's forward and backward, in order, for `default` or `topk`. If a
/// kernel runs more than once, its purpose follows its name after a comma. The gradient of x through the router is
/// accumulated; so are, with `accumulate`, the weight gradients: in every micro-batch of a step except the first.
///
/// # Errors
/// As [`dot_columns`].
pub(super) fn layer_costs(
    s: &Sizes,
    default: bool,
    accumulate: bool,
    chip: &Chip,
) -> Result<[Vec<(&'static str, Cost)>; 2]> {
    let Sizes {
        hidden,
        ffn,
        experts,
        rows,
        ..
    } = *s;
    let plan = Plan::new(s, chip)?;
    let dots = plan.dot_columns;
    let weight_gradient = |n, k| GroupedGemmWeightGradient::cost(rows, experts, n, k, accumulate);
    let sort = EmbeddingForward::cost(rows, s.tokens, hidden);
    let sort_of_dy = match default {
        true => DefaultDots::cost(s, true),
        false => sort,
    };
    let mut forward = vec![
        ("router_forward", RouterForward::cost(s)),
        ("dispatch_choices", DispatchChoices::cost(s)),
        ("embedding_forward, rows of x", sort),
        ("grouped_swiglu_forward", GroupedSwigluForward::cost(s)),
        ("grouped_down_forward", GroupedDownForward::cost(s, default)),
    ];
    forward.extend(default.then(|| ("expert_mean", ExpertMean::cost(s))));
    forward.push(("combine", Combine::cost(s, true, default, false)));
    let backward = vec![
        (SORT_OF_DY, sort_of_dy),
        (
            "grouped_swiglu_backward",
            GroupedSwigluBackward::cost(s, dots),
        ),
        (
            "grouped_gemm_weight_gradient, down",
            weight_gradient(hidden, ffn),
        ),
        ("embedding_forward, rows of x", sort),
        (
            "grouped_gemm_weight_gradient, gate and up",
            weight_gradient(2 * ffn, hidden),
        ),
        (
            "grouped_gemm_input_gradient",
            GroupedGemmInputGradient::cost(rows, experts, 2 * ffn, hidden),
        ),
        (
            "combine, of the gradient of x",
            Combine::cost(s, false, false, false),
        ),
        ("gate_gradient", GateGradient::cost(s, default, dots)),
        (
            "router_backward",
            RouterBackward::cost(s, true, plan.router_partials),
        ),
    ];
    Ok([forward, backward])
}

/// One column: a model with one expert setting.
struct Column {
    /// The lower bounds of the kernels in forward and in backward.
    floors: [Vec<(&'static str, Floor)>; 2],
    moe_layers: usize,
    /// Seconds of one micro-batch, at half of the dense bf16 peak.
    step_seconds: f64,
    sizes: Sizes,
}

fn column(preset: &str, experts: &str, tokens: usize, chip: &Chip) -> Result<Column> {
    let mut layers = Layers::preset(preset);
    layers.experts = Some(experts.into());
    let model = Config::load(&layers, &|_| Ok(()))?.model;
    let sizes = layer_sizes(&model, tokens);
    let topk = layer_costs(&sizes, false, true, chip)?;
    let default = layer_costs(&sizes, true, true, chip)?;
    let floors = [0, 1].map(|pass| {
        let kernels = default[pass].iter().map(|(name, cost)| {
            let same = topk[pass].iter().find(|(other, _)| other == name);
            let topk = same.map_or(0.0, |(_, cost)| cost.floor_on(chip));
            let added = cost.floor_on(chip) - topk;
            (*name, Floor { topk, added })
        });
        kernels.collect()
    });
    Ok(Column {
        floors,
        moe_layers: model.layers - model.dense_layers.len(),
        step_seconds: tokens as f64 * flops_per_token(&model) as f64 / (0.5 * chip.peak),
        sizes,
    })
}

impl Column {
    fn layer(&self) -> Floor {
        Floor::sum(self.floors.iter().flatten().map(|(_, floor)| floor))
    }
}

/// Returns the page in Markdown: one table per preset, for micro-batches of `tokens` tokens on a GPU.
///
/// # Errors
/// When a preset does not exist, or the number of tokens is 0 or larger than the kernels support.
pub fn page(presets: &[&str], tokens: usize, chip: &Chip) -> Result<String> {
    if !(1..=1 << 24).contains(&tokens) {
        let got = tokens.to_string();
        let help = format!("the micro-batches of the page in docs/ have {TOKENS}");
        return Err(Error::usage("--tokens", "1 to 16777216", got, help));
    }
    let mut page = introduction(chip);
    for preset in presets {
        let columns: Vec<Column> = EXPERTS
            .iter()
            .map(|experts| column(preset, experts, tokens, chip))
            .collect::<Result<_>>()?;
        table(&mut page, preset, tokens, &columns);
    }
    Ok(page)
}

fn introduction(chip: &Chip) -> String {
    let (flops, bytes) = chip.ceilings();
    let (flops, bytes) = (flops / 1e12, bytes / 1e12);
    let (name, peak) = (chip.name.trim_start_matches("NVIDIA "), chip.peak / 1e12);
    let rates = match chip.is_measured() {
        true => {
            format!("what one {name} was\nmeasured to do in a bf16 matrix product and in a copy.")
        }
        false => {
            format!("the peaks\nof the {name}'s data sheet, which no product and no copy reaches.")
        }
    };
    format!(
        "\
# Floors of the MoE layer

Written by `routegrad floors`. The floor of a kernel is max(FLOPs / {flops}e12, bytes / {bytes}e12) seconds: {rates} FLOPs and bytes are those of the kernels' headers; the formulas
are in `src/kernels/`, and the kernels' tests hold them against the simulator's counters. No kernel can be
faster; how much slower it is has to be measured.

Numbers are microseconds of one micro-batch, spread evenly over the experts: what `topk` needs, + what `default` adds to
it. The time of a step is that of the model's FLOPs at half of {peak} TFLOP/s, without recomputation. With `default` one kernel,
`default_dots`, sorts dy by expert and makes its dots with the default vectors on the way, in place of `embedding_forward`; dy is
read no more often than with `topk`. The last row is a prediction, not a measurement: what `default` adds runs at 85% of its
floor, its one more launch costs 2 microseconds, and `default_dots` reaches 65% of its floor where `embedding_forward`
was measured at 75%.
"
    )
}

fn table(page: &mut String, preset: &str, tokens: usize, columns: &[Column]) {
    let cells = |of: &dyn Fn(&Column) -> String| columns.iter().map(of).collect::<Vec<_>>();
    let hidden = columns[0].sizes.hidden;
    let mut widths = cells(&|c| format!("{} with {} experts", c.sizes.ffn, c.sizes.experts));
    widths.dedup();
    let widths = widths.join(", ");
    page.push_str(&format!(
        "\n## {preset}: D = {hidden}, F = {widths}, {tokens} tokens\n\n"
    ));
    let mut row = |name: &str, cells: Vec<String>| {
        page.push_str(&format!("| {name} | {} |\n", cells.join(" | ")));
    };
    row("kernel", EXPERTS.map(str::to_owned).to_vec());
    row("---", vec!["---".into(); columns.len()]);
    for (pass, name) in ["**forward**", "**backward**"].into_iter().enumerate() {
        for (i, (kernel, _)) in columns[0].floors[pass].iter().enumerate() {
            row(
                &format!("`{kernel}`"),
                cells(&|c| c.floors[pass][i].1.cell()),
            );
        }
        let floor = |c: &Column| Floor::sum(c.floors[pass].iter().map(|(_, floor)| floor));
        row(name, cells(&|c| floor(c).cell()));
    }
    row("**layer**", cells(&|c| c.layer().cell()));
    row(
        "`default` adds to the layer",
        cells(&|c| format!("{:.2}%", 100.0 * c.layer().added / c.layer().topk)),
    );
    row(
        "step, milliseconds",
        cells(&|c| format!("{:.1}", 1e3 * c.step_seconds)),
    );
    let of_step = |c: &Column, added: f64| {
        format!(
            "{:.3}%",
            100.0 * c.moe_layers as f64 * added / c.step_seconds
        )
    };
    row(
        "`default` adds to the step",
        cells(&|c| of_step(c, c.layer().added)),
    );
    let predicted = |c: &Column| {
        let sort = c.floors[1].iter().find(|(name, _)| *name == SORT_OF_DY);
        let sort = sort.map_or(0.0, |(_, floor)| floor.topk);
        let slower = sort * (1.0 / SORT_WITH_DOTS_SHARE - 1.0 / SORT_SHARE);
        c.layer().added / PREDICTED_SHARE + slower + MORE_LAUNCHES * LAUNCH
    };
    row("predicted", cells(&|c| of_step(c, predicted(c))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::machine::{H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND};

    #[test]
    fn the_page_of_a_gpu_has_its_rates_and_a_slower_gpu_has_higher_floors() {
        let page = |chip| page(&["557m"], 4096, chip).unwrap();
        assert!(page(h200()).contains("max(FLOPs / 790e12, bytes / 4.3e12)"));
        let slow = Chip::named("rtx3090").unwrap();
        assert!(page(slow).contains("max(FLOPs / 71e12, bytes / 0.936e12)"));
        let whole = |chip| {
            let column = column("557m", "8c1", 4096, chip).unwrap();
            column.layer().topk
        };
        let ratio = whole(slow) / whole(h200());
        assert!(ratio > 4.3 / 0.936 && ratio < 790.0 / 71.0 * 1.2, "{ratio}");
    }

    #[test]
    fn products_are_bound_by_compute_and_what_default_adds_by_memory() {
        let whole = column("7.33b", "8c1", TOKENS, h200()).unwrap().layer();
        // 2 T D · 3 F forward, twice that backward.
        let products = 18.0 * TOKENS as f64 * 2048.0 * 5632.0 / H200_FLOPS_PER_SECOND;
        assert!(whole.topk > products && whole.topk < 1.15 * products);
        // Much less than the time of reading g once more.
        let read = 2.0 * TOKENS as f64 * 2048.0 / H200_BYTES_PER_SECOND;
        assert!(whole.added > 0.0 && whole.added < read / 10.0);
    }
}
