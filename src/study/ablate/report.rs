//! The report of a grid: tables as CSV, figures as SVG, all of them on one HTML page, and the table of the groups as
//! Markdown.

use super::configurations;
use super::figures::{Line, Row, curves, final_losses};
use super::grid::{Grid, Plan};
use super::run::State;
use super::spikes::DEVIATIONS;
use super::summary::{Group, Point, Spread, Summary, crossing};
use crate::error::Result;
use crate::report::files::publish;
use crate::report::page::{Cell, Page, Section, Table, create, write_files};
use std::path::Path;

/// The input of [`write`].
pub struct Report<'a> {
    pub grid: &'a Grid,
    pub plan: &'a Plan,
    pub summary: &'a Summary,
}

/// Writes `report.html`, `summary.md`, and a CSV and an SVG for each section that has them. Returns the table of the
/// groups, as in `summary.md`.
///
/// # Errors
/// When the folder cannot be written.
pub fn write(report: &Report, folder: &Path) -> Result<String> {
    create(folder)?;
    let sections = report.sections()?;
    write_files(&sections, folder)?;
    let title = match report.grid.title.is_empty() {
        true => "An ablation".to_string(),
        false => report.grid.title.clone(),
    };
    let mut introduction = report.summary.verdicts(report.plan);
    if !report.grid.description.is_empty() {
        introduction.push(report.grid.description.clone());
    }
    introduction.push(report.counts());
    let page = Page {
        heading: title.clone(),
        title,
        introduction,
        sections: &sections,
        open_rows: 24,
    };
    publish(&folder.join("report.html"), page.html())?;
    let summary = report.markdown();
    publish(&folder.join("summary.md"), &summary)?;
    Ok(summary)
}

fn mean(spread: Option<Spread>) -> Cell {
    spread.map(|s| s.mean).into()
}

fn deviation(spread: Option<Spread>) -> Cell {
    spread.and_then(|s| s.deviation).into()
}

fn percent(share: Option<f64>) -> Cell {
    share.map(|s| 100.0 * s).into()
}

/// A cell with a whole number of tokens; empty if they are not reached.
fn tokens(x: Option<f64>) -> Cell {
    match x {
        Some(x) => Cell::Count(x.round() as u64),
        None => Cell::Number(None),
    }
}

fn state(state: &State, steps: u64) -> String {
    match state {
        State::New => "not begun".into(),
        State::Unfinished(_) => format!("unfinished after step {steps}"),
        State::Finished => "finished".into(),
        State::Diverged(what) => format!("diverged after step {steps}: {what}"),
        State::Failed(what) => format!("failed after step {steps}: {what}"),
    }
}

impl Report<'_> {
    fn groups(&self) -> impl Iterator<Item = &Group> {
        self.summary.groups.iter()
    }

    /// Returns the name of a loss with its unit, for an axis.
    fn loss(&self, name: &str) -> String {
        format!("{name}, {}", self.plan.loss_unit())
    }

    fn baseline(&self, group: &Group) -> &Group {
        &self.summary.groups[group.baseline]
    }

    /// Returns the number of runs, their numbers of steps, and which runs have not finished.
    fn counts(&self) -> String {
        let runs = &self.summary.runs;
        let finished = runs.iter().filter(|r| r.state == State::Finished).count();
        let mut steps: Vec<u64> = self
            .plan
            .runs
            .iter()
            .map(|r| r.config.train.steps)
            .collect();
        steps.sort_unstable();
        steps.dedup();
        let steps: Vec<String> = steps.iter().map(u64::to_string).collect();
        format!(
            "{finished} of {} runs are finished, of {} steps. Losses are cross-entropies in {}; ± and bands are one sample standard deviation over seeds.",
            runs.len(),
            steps.join(", "),
            self.plan.loss_unit(),
        )
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        if !self.grid.title.is_empty() {
            text = format!("{}\n\n", self.grid.title);
        }
        for verdict in self.summary.verdicts(self.plan) {
            text.push_str(&format!("{verdict}\n\n"));
        }
        text.push_str(&self.group_table().markdown());
        for (run, summary) in self.plan.runs.iter().zip(&self.summary.runs) {
            if summary.state != State::Finished {
                let state = state(&summary.state, summary.steps);
                text.push_str(&format!("\n{}: {state}", run.name));
            }
        }
        text.trim_end().to_string() + "\n"
    }

    fn group_table(&self) -> Table {
        let mut table = Table::new(&[
            "group",
            "runs",
            "loss",
            "± loss",
            "perplexity",
            "gain",
            "± gain",
            "gain %",
            "tokens to target",
            "tokens saved %",
            "spikes",
            "load CV",
        ]);
        for group in self.groups() {
            let gain = self.summary.gain(self.plan, group);
            let (reached, saved) = self.summary.tokens_to_target(group);
            let runs = || group.runs.iter().map(|r| &self.summary.runs[*r]);
            let spikes: usize = runs().map(|r| r.loss_spikes.begins.len()).sum();
            let loads: Vec<f64> = runs().filter_map(|r| Some(r.load?.0)).collect();
            let ours = std::ptr::eq(self.baseline(group), group);
            let other = |cell: Cell| if ours { Cell::Number(None) } else { cell };
            table.rows.push(vec![
                group.label.clone().into(),
                format!("{}/{}", group.finished.len(), group.runs.len()).into(),
                mean(group.loss),
                deviation(group.loss),
                group.loss.map(|l| l.mean.exp()).into(),
                other(mean(gain)),
                other(deviation(gain)),
                other(percent(gain.map(|g| 1.0 - (-g.mean).exp()))),
                tokens(reached),
                other(percent(saved)),
                spikes.into(),
                mean(super::summary::spread(&loads)),
            ]);
        }
        table
    }

    fn sections(&self) -> Result<Vec<Section>> {
        Ok(vec![
            self.final_loss()?,
            self.curves("validation-loss", |g| &g.validation)?,
            self.curves("training-loss", |g| &g.training)?,
            self.gain()?,
            self.stability(),
            self.load()?,
            self.runs(),
            configurations::differences(self.plan),
            configurations::shared(self.plan),
            self.timing(),
        ])
    }

    fn final_loss(&self) -> Result<Section> {
        let row = |g: &Group| Row {
            label: g.label.clone(),
            values: g
                .finished
                .iter()
                .filter_map(|r| self.summary.runs[*r].loss)
                .collect(),
            spread: g.loss.map(|l| (l.mean, l.deviation.unwrap_or(0.0))),
            baseline: self.baseline(g).loss.map(|l| l.mean),
        };
        let rows: Vec<Row> = self.groups().map(row).collect();
        let mut notes = Vec::new();
        let names: Vec<&str> = self
            .groups()
            .map(|g| self.baseline(g).label.as_str())
            .collect();
        let mut distinct = names.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.len() < names.len() {
            notes.push(format!("Baseline: {}.", distinct.join("; ")));
        }
        if let Some(target) = self.summary.target {
            notes.push(format!("Target perplexity: {target}."));
        }
        Ok(Section {
            name: "final-loss",
            title: "Final validation loss",
            shows: "Validation loss after the last step: a dot for each run, a thick bar for the mean over seeds, a \
                    line of one standard deviation to either side, and a grey line at the baseline's mean. \
                    The gain is the baseline's loss minus the group's, over pairs of runs with the same seed; in \
                    percent of perplexity it is 1 − e^(−gain). The target is the baseline's final \
                    perplexity unless one was set; tokens to target are read from the mean curve by \
                    linear interpolation between evaluations. Loads are those of the last tenth of the steps.",
            formula: "gain = mean over seeds of L_baseline − L; perplexity = e^L",
            notes,
            table: self.group_table(),
            figure: Some(final_losses(&rows, &self.loss("validation loss"))?),
        })
    }

    fn curves(&self, name: &'static str, of: fn(&Group) -> &Vec<Point>) -> Result<Section> {
        let validation = name == "validation-loss";
        let lines: Vec<Line> = self
            .groups()
            .map(|g| Line {
                label: g.label.clone(),
                points: of(g).iter().map(three).collect(),
            })
            .collect();
        let mut table = Table::new(&["group", "tokens", "loss", "± loss"]);
        for group in self.groups() {
            for p in thinned(of(group)) {
                table.rows.push(vec![
                    group.label.clone().into(),
                    p.tokens.into(),
                    p.value.mean.into(),
                    p.value.deviation.into(),
                ]);
            }
        }
        let (title, shows, y) = match validation {
            true => (
                "Validation loss",
                "Validation loss: the mean over seeds and one standard deviation to either side, for the complete \
                 run and for its second half.",
                self.loss("validation loss"),
            ),
            false => (
                "Training loss",
                "Training loss, averaged over each fiftieth of a run: the mean over seeds and one standard \
                 deviation to either side, for the complete run and for its second half.",
                self.loss("training loss"),
            ),
        };
        Ok(Section {
            name,
            title,
            shows,
            formula: "",
            notes: Vec::new(),
            table,
            figure: Some(curves(&lines, &y, &[0.0, 0.5])?),
        })
    }

    fn gain(&self) -> Result<Section> {
        let mut table = Table::new(&["group", "tokens", "gain", "± gain"]);
        let mut lines = Vec::new();
        for group in self.groups() {
            let points = self.summary.gain_curve(self.plan, group);
            for p in &points {
                table.rows.push(vec![
                    group.label.clone().into(),
                    p.tokens.into(),
                    p.value.mean.into(),
                    p.value.deviation.into(),
                ]);
            }
            lines.push(Line {
                label: group.label.clone(),
                points: points.iter().map(three).collect(),
            });
        }
        Ok(Section {
            name: "gain",
            title: "Gain over the baseline",
            shows: "The baseline's validation loss minus the group's during training: the mean over pairs of runs \
                    with the same seed, and one standard deviation. Above 0, the group is better.",
            formula: "L_baseline − L",
            notes: Vec::new(),
            table,
            figure: Some(curves(&lines, &self.loss("gain"), &[0.0])?),
        })
    }

    fn stability(&self) -> Section {
        let mut table = Table::new(&[
            "group",
            "runs",
            "loss spikes",
            "loss spike score %",
            "gradient spikes",
            "gradient spike score %",
            "steps left out",
            "diverged",
        ]);
        for group in self.groups() {
            let runs = || group.runs.iter().map(|r| &self.summary.runs[*r]);
            let begun = runs().filter(|r| r.steps > 0).count();
            let score = |f: fn(&super::summary::RunSummary) -> Option<f64>| {
                let scores: Vec<f64> = runs().filter_map(f).collect();
                mean(super::summary::spread(&scores))
            };
            let count = |f: fn(&super::summary::RunSummary) -> usize| -> Cell {
                runs().map(f).sum::<usize>().into()
            };
            table.rows.push(vec![
                group.label.clone().into(),
                begun.into(),
                count(|r| r.loss_spikes.begins.len()),
                score(|r| r.loss_spikes.score),
                count(|r| r.gradient_spikes.begins.len()),
                score(|r| r.gradient_spikes.score),
                runs().map(|r| r.left_out).sum::<u64>().into(),
                count(|r| usize::from(matches!(r.state, State::Diverged(_)))),
            ]);
        }
        Section {
            name: "stability",
            title: "Stability",
            shows: "Spikes of the training loss and of the gradient's norm. A step is a spike if its value is at least \
                    seven standard deviations above the mean of the last W steps; consecutive steps are one spike. \
                    The score is the percentage of such steps, averaged over runs, as in OLMo 2 (2501.00656, \
                    section 3.2) with two changes: decreases do not count, and W is a tenth of the run, from 20 to \
                    1,000 steps.",
            formula: "x_t − mean ≥ 7 σ, over x_(t−W) … x_(t−1), W = min(1000, max(20, ⌊N/10⌋))",
            notes: vec![format!("Threshold: {DEVIATIONS} standard deviations.")],
            table,
            figure: None,
        }
    }

    fn load(&self) -> Result<Section> {
        let mut table = Table::new(&["group", "load CV", "± load CV", "worst layer"]);
        let mut lines = Vec::new();
        for group in self.groups() {
            let loads = group.runs.iter().filter_map(|r| self.summary.runs[*r].load);
            let (means, worst): (Vec<f64>, Vec<f64>) = loads.unzip();
            let spread = super::summary::spread(&means);
            let worst = worst.into_iter().reduce(f64::max);
            table.rows.push(vec![
                group.label.clone().into(),
                mean(spread),
                deviation(spread),
                worst.into(),
            ]);
            lines.push(Line {
                label: group.label.clone(),
                points: group.load.iter().map(three).collect(),
            });
        }
        Ok(Section {
            name: "load-balance",
            title: "Load balance",
            shows: "Coefficient of variation of the numbers of rows per expert of an MoE layer, averaged over the \
                    layers: 0 is an even load. The table is for the last tenth of the steps, the figure for each \
                    fortieth of the run.",
            formula: "√(mean over i of (c_i − c̄)²) / c̄",
            notes: Vec::new(),
            table,
            figure: Some(curves(&lines, "coefficient of variation", &[0.0])?),
        })
    }

    fn runs(&self) -> Section {
        let mut table = Table::new(&[
            "run",
            "state",
            "steps",
            "tokens",
            "loss",
            "perplexity",
            "training loss",
            "tokens to target",
            "loss spikes",
            "gradient spikes",
            "left out",
            "load CV",
        ]);
        for (i, (run, s)) in self.plan.runs.iter().zip(&self.summary.runs).enumerate() {
            let group = self.groups().find(|g| g.runs.contains(&i));
            let target = group.and_then(|g| self.summary.target(g));
            table.rows.push(vec![
                run.name.clone().into(),
                state(&s.state, s.steps).into(),
                s.steps.into(),
                s.tokens.into(),
                s.loss.into(),
                s.loss.map(f64::exp).into(),
                s.training_loss.into(),
                tokens(target.and_then(|t| crossing(&s.validation, t))),
                s.loss_spikes.begins.len().into(),
                s.gradient_spikes.begins.len().into(),
                s.left_out.into(),
                s.load.map(|l| l.0).into(),
            ]);
        }
        Section {
            name: "runs",
            title: "Runs",
            shows: "Every run separately. The training loss is the mean of the last twentieth of the steps.",
            formula: "",
            notes: Vec::new(),
            table,
            figure: None,
        }
    }

    /// This section is the last because it is the only one that differs between two equal grids.
    fn timing(&self) -> Section {
        let mut table = Table::new(&["run", "seconds", "tokens/s"]);
        for (run, s) in self.plan.runs.iter().zip(&self.summary.runs) {
            let rate = s.tokens as f64 / s.seconds;
            table.rows.push(vec![
                run.name.clone().into(),
                Some((s.seconds * 10.0).round() / 10.0)
                    .filter(|t| *t > 0.0)
                    .into(),
                tokens(Some(rate).filter(|r| r.is_finite())),
            ]);
        }
        Section {
            name: "timing",
            title: "Time",
            shows: "Wall time of each run's steps, without evaluations and saving, and tokens per second. The time \
                    depends on other work on the machine: use `routegrad bench` for comparisons.",
            formula: "",
            notes: Vec::new(),
            table,
            figure: None,
        }
    }
}

fn three(p: &Point) -> (f64, f64, f64) {
    (
        p.tokens as f64,
        p.value.mean,
        p.value.deviation.unwrap_or(0.0),
    )
}

/// Returns at most about 200 of the points, always including the last.
fn thinned(points: &[Point]) -> impl Iterator<Item = &Point> {
    let step = points.len().div_ceil(200).max(1);
    let n = points.len();
    points
        .iter()
        .enumerate()
        .filter(move |(i, _)| (n - 1 - i) % step == 0)
        .map(|(_, p)| p)
}
