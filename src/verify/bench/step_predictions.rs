//! Predicts the time of training steps on an H200 from the list of their kernels, the time of each launcher in the steps
//! that were timed on 2026-11-24, and the cost model of products. Compares the predictions with the times that
//! `hardware-check` has recorded since.

use super::measure::median;
use super::predict::Model;
use super::roofline::LAUNCH;
use super::step_costs::StepCosts;
use crate::config::{Config, Layers, count};
use crate::device::machine::h200;
use crate::error::{Error, Result};
use crate::report::page::{Cell, Table, replace_between};
use crate::routers;
use crate::study::plan::{Target, plan};
use crate::verify::hardware::record::{self, Ending, Records};
use crate::verify::hardware::steps::on_record;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Marks around the tables in a page.
const MARKS: [&str; 2] = [
    "<!-- predicted steps: routegrad bench --predict --update writes what follows -->",
    "<!-- end of predicted steps -->",
];

/// The timed steps, as the program printed them.
const RECORDED: &str = include_str!("../../../benches/results/steps-nvidia-h200.txt");

/// Number of sequences of 2,048 tokens per step.
const SEQUENCES: usize = 64;
/// Number of sequences per micro-batch of the timed steps.
const RECORDED_MICRO_BATCH: usize = 8;

/// Kernels that have changed since then, with the bytes that the timed version moved per byte of the present version.
const CHANGED: &[(&str, f64)] = &[("cross_entropy_rows", 10.0 / 6.0)];
/// Kernels whose time was that of a few blocks, or of one expert with all rows; they are treated as kernels with little
/// work.
const LITTLE: &[&str] = &["dispatch_choices", "embedding_order", "expert_mean"];
/// Kernels that do more work with the router `default`; their timings come from a step of `default`.
const OF_DEFAULT: &[&str] = &["combine", "grouped_down_forward"];
/// Launchers whose time is added to that of another launcher.
const JOINED: &[(&str, &str)] = &[
    ("norm_weight_gradient", "norm_backward"),
    ("router_weight_gradient", "router_backward"),
];
/// Kernels that did not exist then, each with the kernel whose share of the roofline they are assumed to reach.
const LIKE: &[(&str, &str)] = &[
    ("default_dots", "embedding_forward"),
    ("qkv_rope_forward", "grouped_swiglu_forward"),
];

/// A timed step: from the text of 2026-11-24, or from a record.
#[derive(Default)]
struct Recorded {
    /// Seconds of each launcher.
    launchers: BTreeMap<String, f64>,
    /// Seconds of the step.
    seconds: f64,
    /// Date and commit of a record.
    code: String,
}

impl Recorded {
    /// Returns the timeline of a preset and a router.
    fn of(preset: &str, router: &str) -> Option<Recorded> {
        let command = format!("train --preset {preset} --router {router} ");
        let section = RECORDED.split("\n== ").find(|s| s.contains(&command))?;
        let mut found = Recorded::default();
        for line in section.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let seconds = words.first().and_then(|ms| ms.parse().ok());
            match (&words[..], seconds.map(|ms: f64| 1e-3 * ms)) {
                ([_, share, _, launcher], Some(seconds)) if share.ends_with('%') => {
                    found.add(launcher, seconds);
                }
                ([_, "the", "step"], Some(seconds)) => found.seconds = seconds,
                _ => {}
            }
        }
        (found.seconds > 0.0).then_some(found)
    }

    /// Returns the latest record of a model and a router with micro-batches of this size.
    fn since(
        records: &Records,
        preset: &str,
        router: &str,
        micro_batch: usize,
    ) -> Option<Recorded> {
        let task = format!("trains: {}", on_record(preset, router, micro_batch));
        let passed = |r: &&record::Record| {
            r.task == task && r.gpu == h200().name && r.ending == Ending::Passed
        };
        let newest = records.iter().filter(passed).max_by_key(|r| &r.date)?;
        let measured = &newest.measured;
        let steps = measured["seconds_of_each_step"].as_array()?;
        let steps: Vec<f64> = steps.iter().filter_map(|s| s.as_f64()).collect();
        let day = newest.date.split('T').next().unwrap_or_default();
        let mut found = Recorded {
            seconds: median(&steps).0,
            code: format!("{day}, commit {}", newest.commit),
            ..Recorded::default()
        };
        for kernel in measured["timeline"]["kernels"].as_array()? {
            let seconds = 1e-3 * kernel["milliseconds"].as_f64()?;
            found.add(kernel["launcher"].as_str()?, seconds);
        }
        Some(found)
    }

    fn add(&mut self, launcher: &str, seconds: f64) {
        let joined = JOINED.iter().find(|(name, _)| *name == launcher);
        let launcher = joined.map_or(launcher, |(_, other)| other);
        *self.launchers.entry(launcher.into()).or_default() += seconds;
    }

    /// Returns the shares of their rooflines that the launchers reached.
    fn shares(&self, costs: &StepCosts) -> BTreeMap<&'static str, f64> {
        let shares = costs.0.iter().filter_map(|(launcher, launches)| {
            let seconds = self.launchers.get(*launcher)?;
            let changed = CHANGED.iter().find(|(name, _)| name == launcher);
            let moved = changed.map_or(1.0, |(_, factor)| *factor);
            let share = moved * launches.floor / seconds;
            (share > 0.0).then_some((*launcher, share))
        });
        shares.collect()
    }
}

fn config(preset: &str, router: &str, micro_batch: usize) -> Result<Config> {
    let mut layers = Layers::preset(preset);
    layers.set = vec![
        format!("router.name={router}"),
        format!("train.sequences_per_step={SEQUENCES}"),
        format!("train.micro_batch={micro_batch}"),
        "train.device=\"cuda\"".into(),
    ];
    Config::load(&layers, &routers::resolve)
}

/// A step that is predicted.
struct Predicted {
    preset: &'static str,
    router: &'static str,
    micro_batch: usize,
    costs: StepCosts,
    /// Predicted seconds of each launcher.
    launchers: BTreeMap<&'static str, f64>,
    recorded: Option<Recorded>,
    /// Seconds that the step has taken since, if there is a record.
    measured: Option<Recorded>,
    /// FLOPs of the step, as `plan` counts them.
    flops: f64,
}

impl Predicted {
    fn new(
        model: &Model,
        records: &Records,
        preset: &'static str,
        router: &'static str,
        micro_batch: usize,
    ) -> Result<Self> {
        let config = config(preset, router, micro_batch)?;
        let tokens = config.train.sequences_per_step * config.model.sequence_length;
        let costs = StepCosts::of(&config)?;
        // 7.33b was not timed: its kernels are assumed to reach the same shares as those of 1.96b.
        let timed = if preset == "7.33b" { "1.96b" } else { preset };
        let shares = |router: &str| -> Result<_> {
            let recorded = Recorded::of(timed, router).ok_or_else(|| {
                let got = format!("none of {timed} with {router}");
                Error::invalid(
                    "bench --predict",
                    "a timed step",
                    got,
                    "see benches/results",
                )
            })?;
            let then = StepCosts::of(&self::config(timed, router, RECORDED_MICRO_BATCH)?)?;
            Ok((recorded.shares(&then), recorded))
        };
        // Kernels that both routers have are taken from topk, whose launches have not changed.
        let (mut shares_of_all, _) = shares("topk")?;
        let (own, recorded) = shares(router)?;
        let more = own
            .into_iter()
            .filter(|(launcher, _)| OF_DEFAULT.contains(launcher));
        shares_of_all.extend(more);
        let launchers = costs.0.iter().map(|(launcher, launches)| {
            let products = launches.products.iter().map(|(product, times)| {
                model.seconds(launcher, product).map(|s| *times as f64 * s)
            });
            let modelled: Option<f64> = products.sum();
            let like = LIKE.iter().find(|(name, _)| name == launcher);
            let share = shares_of_all.get(like.map_or(*launcher, |(_, other)| other));
            let seconds = match (modelled, share) {
                _ if LITTLE.contains(launcher) => {
                    launches.floor + 2.0 * LAUNCH * launches.count as f64
                }
                (Some(seconds), _) if !launches.products.is_empty() => seconds,
                (_, Some(share)) => launches.floor / share,
                _ => launches.floor,
            };
            (*launcher, seconds)
        });
        Ok(Predicted {
            preset,
            router,
            micro_batch,
            launchers: launchers.collect(),
            recorded: (timed == preset && micro_batch == RECORDED_MICRO_BATCH).then_some(recorded),
            measured: Recorded::since(records, preset, router, micro_batch),
            flops: count::flops_per_token(&config.model) as f64 * tokens as f64,
            costs,
        })
    }

    /// Returns the measured seconds of a launcher.
    fn measured_of(&self, launcher: &str) -> Option<&f64> {
        self.measured.as_ref()?.launchers.get(launcher)
    }

    fn between(&self) -> f64 {
        LAUNCH * self.costs.launches() as f64
    }

    fn seconds(&self) -> f64 {
        self.launchers.values().sum::<f64>() + self.between()
    }

    fn share_of_peak(&self, seconds: f64) -> f64 {
        self.flops / seconds / h200().peak
    }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.1}", 1e3 * seconds)
}

/// Writes the tables into a page, between their marks.
///
/// # Errors
/// When the page has no marks, or cannot be written.
pub fn update(model: &Model, folder: &Path, page: &Path) -> Result<()> {
    replace_between(page, MARKS, &markdown(model, folder)?)
}

/// Returns the tables in Markdown: the steps of three models with two routers, compared with the records in `folder`, and
/// the kernels of one step.
///
/// # Errors
/// When a preset cannot be planned, or the records cannot be read.
pub fn markdown(model: &Model, folder: &Path) -> Result<String> {
    let records = Records::open(folder)?;
    let mut steps = Vec::new();
    for preset in ["557m", "1.96b", "7.33b"] {
        for micro_batch in [RECORDED_MICRO_BATCH, 32] {
            for router in ["topk", "default"] {
                let config = config(preset, router, micro_batch)?;
                if plan(&config, Target::Gpu(h200()), 1)?.fits() {
                    steps.push(Predicted::new(
                        model,
                        &records,
                        preset,
                        router,
                        micro_batch,
                    )?);
                }
            }
        }
    }
    let mut table = Table::new(&[
        "model",
        "router",
        "micro-batch",
        "roofline ms",
        "24 Nov. ms",
        "predicted ms",
        "measured ms",
        "tokens/s",
        "share of the peak, predicted",
        "measured",
    ]);
    for step in &steps {
        let measured = step.measured.as_ref().map(|m| m.seconds);
        let tokens = SEQUENCES as f64 * 2048.0;
        let share = |seconds: f64| format!("{:.1}%", 100.0 * step.share_of_peak(seconds));
        let recorded = step.recorded.as_ref().map(|r| r.seconds);
        let or_dash = |text: Option<String>| text.unwrap_or("–".into()).into();
        table.rows.push(vec![
            format!("`{}`", step.preset).into(),
            format!("`{}`", step.router).into(),
            step.micro_batch.to_string().into(),
            milliseconds(step.costs.floor()).into(),
            or_dash(recorded.map(milliseconds)),
            milliseconds(step.seconds()).into(),
            or_dash(measured.map(milliseconds)),
            or_dash(measured.map(|seconds| format!("{:.0}", tokens / seconds))),
            share(step.seconds()).into(),
            or_dash(measured.map(share)),
        ]);
    }
    let codes: BTreeSet<&str> = steps
        .iter()
        .filter_map(|step| Some(step.measured.as_ref()?.code.as_str()))
        .collect();
    let codes: Vec<&str> = codes.into_iter().collect();
    let of = |router: &str| {
        steps
            .iter()
            .find(|s| (s.preset, s.router, s.micro_batch) == ("1.96b", router, 32))
    };
    let kernels = of("topk").zip(of("default")).map(|(topk, default)| {
        let table = kernels(topk, default).markdown();
        format!("\nThe kernels of a step of `1.96b` in micro-batches of 32, ms:\n\n{table}")
    });
    Ok(format!(
        "{SEQUENCES} sequences of 2,048 tokens a step on one H200, predicted and measured ({}). A prediction uses the cost model above for \
         matrix products, and assumes balanced routing. Other kernels reach the share of their roofline that they reached in the steps \
         timed on 2026-11-24 (7.33b: as 1.96b). 2 µs are added between two kernels. On 2026-11-24, `cross_entropy_rows` read the \
         logits twice; now it reads them once. On that date `qkv_rope_forward` was still part of `grouped_gemm_forward`. \
         `dispatch_choices` and `expert_mean` are counted as 4 µs a launch.\n\n{}{}",
        codes.join("; "),
        table.markdown(),
        kernels.unwrap_or_default()
    ))
}

/// Returns a table of the longest kernels of a step with `topk` and with `default`.
fn kernels(topk: &Predicted, default: &Predicted) -> Table {
    let mut table = Table::new(&[
        "launcher",
        "roofline, topk",
        "predicted",
        "measured",
        "roofline, default",
        "predicted",
        "measured",
    ]);
    let mut names: Vec<&str> = default.launchers.keys().copied().collect();
    let seconds =
        |step: &Predicted, name: &str| *step.measured_of(name).unwrap_or(&step.launchers[name]);
    names.sort_by(|a, b| seconds(default, b).total_cmp(&seconds(default, a)));
    let cells = |step: &Predicted, name: &str| {
        let measured = step.measured_of(name);
        let floor = step.costs.0.get(name).map(|l| l.floor);
        let predicted = step.launchers.get(name);
        let cell = |seconds: Option<&f64>| -> Cell {
            seconds.map_or("–".into(), |s| milliseconds(*s).into())
        };
        [cell(floor.as_ref()), cell(predicted), cell(measured)]
    };
    for name in names.into_iter().filter(|n| seconds(default, n) >= 1e-3) {
        let mut row = vec![format!("`{name}`").into()];
        row.extend(cells(topk, name).into_iter().chain(cells(default, name)));
        table.rows.push(row);
    }
    let mut row = vec!["between kernels".into()];
    for step in [topk, default] {
        let cells: [Cell; 3] = ["–".into(), milliseconds(step.between()).into(), "–".into()];
        row.extend(cells);
    }
    table.rows.push(row);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timed_steps_are_read_completely() {
        for (preset, router, ms) in [("557m", "topk", 552.69), ("1.96b", "default", 1052.73)] {
            let found = Recorded::of(preset, router).unwrap();
            assert!((1e3 * found.seconds - ms).abs() < 1e-9);
            let busy: f64 = found.launchers.values().sum();
            assert!(busy > 0.8 * found.seconds && busy < found.seconds, "{busy}");
        }
        assert!(Recorded::of("7.33b", "topk").is_none());
    }

    /// A prediction lies between the roofline and the time with the slower kernels of the timed step.
    #[test]
    fn predictions_lie_between_roofline_and_record() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
        let timed = crate::verify::bench::hardware_records::timed(&folder).unwrap();
        let model = Model::new(&timed).unwrap();
        let records = Records::open(&folder).unwrap();
        for router in ["topk", "default"] {
            let step =
                Predicted::new(&model, &records, "557m", router, RECORDED_MICRO_BATCH).unwrap();
            let recorded = step.recorded.as_ref().unwrap().seconds;
            assert!(step.seconds() > step.costs.floor(), "{router}");
            assert!(step.seconds() < recorded, "{router}: {}", step.seconds());
        }
    }
}
