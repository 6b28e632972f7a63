//! The report of a grid: tables as CSV, figures as SVG, all of them on one HTML page, and the table of the groups as
//! Markdown.

use super::configurations;
use super::figures::{Line, Row, curves, final_losses};
use super::grid::{Grid, Plan};
use super::run::State;
use super::spikes::DEVIATIONS;
use super::summary::{Group, Point, RunSummary, Spread, Summary, crossing, spread};
use crate::error::Result;
use crate::report::files::publish;
use crate::report::page::{Cell, Page, Section, Table};
use std::collections::BTreeSet;
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
    let sections = report.sections()?;
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
    page.write(folder)?;
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

    /// Returns the sum of a number over the runs of a group.
    fn sum(&self, group: &Group, of: fn(&RunSummary) -> u64) -> Cell {
        let runs = group.runs.iter().map(|r| &self.summary.runs[*r]);
        runs.map(of).sum::<u64>().into()
    }

    /// Returns the numbers of the runs of a group that have one.
    fn numbers(&self, group: &Group, of: fn(&RunSummary) -> Option<f64>) -> Vec<f64> {
        let runs = group.runs.iter().map(|r| &self.summary.runs[*r]);
        runs.filter_map(of).collect()
    }

    /// Returns a curve of each group.
    fn lines(&self, of: impl Fn(&Group) -> Vec<Point>) -> Vec<Line> {
        let line = |g: &Group| Line {
            label: g.label.clone(),
            points: of(g),
        };
        self.groups().map(line).collect()
    }

    /// Returns the number of runs, their numbers of steps, and which runs have not finished.
    fn counts(&self) -> String {
        let runs = &self.summary.runs;
        let finished = runs.iter().filter(|r| r.state == State::Finished).count();
        let steps = self.plan.runs.iter().map(|r| r.config.train.steps);
        let steps: BTreeSet<u64> = steps.collect();
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
        // A baseline is not compared with itself.
        let compared = |g: &Group| !std::ptr::eq(self.baseline(g), g);
        let gain = |g: &Group| self.summary.gain(self.plan, g).filter(|_| compared(g));
        let target = |g: &Group| self.summary.tokens_to_target(g);
        Table::of(
            self.groups(),
            &[
                ("group", &|g| g.label.clone().into()),
                ("runs", &|g| {
                    format!("{}/{}", g.finished.len(), g.runs.len()).into()
                }),
                ("loss", &|g| mean(g.loss)),
                ("± loss", &|g| deviation(g.loss)),
                ("perplexity", &|g| g.loss.map(|l| l.mean.exp()).into()),
                ("gain", &|g| mean(gain(g))),
                ("± gain", &|g| deviation(gain(g))),
                ("gain %", &|g| {
                    percent(gain(g).map(|s| 1.0 - (-s.mean).exp()))
                }),
                ("tokens to target", &|g| tokens(target(g).0)),
                ("tokens saved %", &|g| {
                    percent(target(g).1.filter(|_| compared(g)))
                }),
                ("spikes", &|g| self.sum(g, loss_spikes)),
                ("load CV", &|g| mean(spread(&self.numbers(g, load_cv)))),
            ],
        )
    }

    fn sections(&self) -> Result<Vec<Section>> {
        Ok(vec![
            self.final_loss()?,
            self.validation_loss()?,
            self.training_loss()?,
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
        let names = self.groups().map(|g| self.baseline(g).label.as_str());
        let names: Vec<&str> = names.collect::<BTreeSet<_>>().into_iter().collect();
        if names.len() < self.groups().count() {
            notes.push(format!("Baseline: {}.", names.join("; ")));
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

    fn validation_loss(&self) -> Result<Section> {
        let section = Section {
            name: "validation-loss",
            title: "Validation loss",
            shows: "Validation loss: the mean over seeds and one standard deviation to either side, for the complete \
                    run and for its second half.",
            ..Section::default()
        };
        self.with_curves(section, |g| &g.validation)
    }

    fn training_loss(&self) -> Result<Section> {
        let section = Section {
            name: "training-loss",
            title: "Training loss",
            shows: "Training loss, averaged over each fiftieth of a run: the mean over seeds and one standard \
                    deviation to either side, for the complete run and for its second half.",
            ..Section::default()
        };
        self.with_curves(section, |g| &g.training)
    }

    /// Adds the table and the figure of a loss to its section.
    fn with_curves(&self, section: Section, of: fn(&Group) -> &[Point]) -> Result<Section> {
        let y = self.loss(&section.title.to_lowercase());
        let lines = self.lines(|g| of(g).to_vec());
        Ok(Section {
            table: table_of(&self.lines(|g| thinned(of(g))), ["loss", "± loss"]),
            figure: Some(curves(&lines, &y, &[0.0, 0.5])?),
            ..section
        })
    }

    fn gain(&self) -> Result<Section> {
        let lines = self.lines(|g| self.summary.gain_curve(self.plan, g));
        Ok(Section {
            name: "gain",
            title: "Gain over the baseline",
            shows: "The baseline's validation loss minus the group's during training: the mean over pairs of runs \
                    with the same seed, and one standard deviation. Above 0, the group is better.",
            formula: "L_baseline − L",
            table: table_of(&lines, ["gain", "± gain"]),
            figure: Some(curves(&lines, &self.loss("gain"), &[0.0])?),
            ..Section::default()
        })
    }

    fn stability(&self) -> Section {
        let score = |g: &Group, of| mean(spread(&self.numbers(g, of)));
        let table = Table::of(
            self.groups(),
            &[
                ("group", &|g| g.label.clone().into()),
                ("runs", &|g| self.sum(g, |r| u64::from(r.steps > 0))),
                ("loss spikes", &|g| self.sum(g, loss_spikes)),
                ("loss spike score %", &|g| score(g, |r| r.loss_spikes.score)),
                ("gradient spikes", &|g| self.sum(g, gradient_spikes)),
                ("gradient spike score %", &|g| {
                    score(g, |r| r.gradient_spikes.score)
                }),
                ("steps left out", &|g| self.sum(g, |r| r.left_out)),
                ("diverged", &|g| self.sum(g, diverged)),
            ],
        );
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
            ..Section::default()
        }
    }

    fn load(&self) -> Result<Section> {
        let means = |g: &Group| spread(&self.numbers(g, load_cv));
        let worst = |g: &Group| self.numbers(g, |r| r.load.map(|l| l.1));
        let table = Table::of(
            self.groups(),
            &[
                ("group", &|g| g.label.clone().into()),
                ("load CV", &|g| mean(means(g))),
                ("± load CV", &|g| deviation(means(g))),
                ("worst layer", &|g| {
                    worst(g).into_iter().reduce(f64::max).into()
                }),
            ],
        );
        let lines = self.lines(|g| g.load.clone());
        Ok(Section {
            name: "load-balance",
            title: "Load balance",
            shows: "Coefficient of variation of the numbers of rows per expert of an MoE layer, averaged over the \
                    layers: 0 is an even load. The table is for the last tenth of the steps, the figure for each \
                    fortieth of the run.",
            formula: "√(mean over i of (c_i − c̄)²) / c̄",
            table,
            figure: Some(curves(&lines, "coefficient of variation", &[0.0])?),
            ..Section::default()
        })
    }

    fn runs(&self) -> Section {
        let target = |i: usize| {
            let group = self.groups().find(|g| g.runs.contains(&i))?;
            self.summary.target(group)
        };
        let reached = |i: usize, s: &RunSummary| crossing(&s.validation, target(i)?);
        let rows = self.plan.runs.iter().zip(&self.summary.runs).enumerate();
        let table = Table::of(
            rows,
            &[
                ("run", &|(_, (run, _))| run.name.clone().into()),
                ("state", &|(_, (_, s))| state(&s.state, s.steps).into()),
                ("steps", &|(_, (_, s))| s.steps.into()),
                ("tokens", &|(_, (_, s))| s.tokens.into()),
                ("loss", &|(_, (_, s))| s.loss.into()),
                ("perplexity", &|(_, (_, s))| s.loss.map(f64::exp).into()),
                ("training loss", &|(_, (_, s))| s.training_loss.into()),
                ("tokens to target", &|(i, (_, s))| tokens(reached(*i, s))),
                ("loss spikes", &|(_, (_, s))| loss_spikes(s).into()),
                ("gradient spikes", &|(_, (_, s))| gradient_spikes(s).into()),
                ("left out", &|(_, (_, s))| s.left_out.into()),
                ("load CV", &|(_, (_, s))| load_cv(s).into()),
            ],
        );
        Section {
            name: "runs",
            title: "Runs",
            shows: "Every run separately. The training loss is the mean of the last twentieth of the steps.",
            table,
            ..Section::default()
        }
    }

    /// This section is the last because it is the only one that differs between two equal grids.
    fn timing(&self) -> Section {
        let tenths = |seconds: f64| (seconds * 10.0).round() / 10.0;
        let seconds = |s: &RunSummary| Some(tenths(s.seconds)).filter(|t| *t > 0.0);
        let rate = |s: &RunSummary| Some(s.tokens as f64 / s.seconds).filter(|r| r.is_finite());
        let table = Table::of(
            self.plan.runs.iter().zip(&self.summary.runs),
            &[
                ("run", &|(run, _)| run.name.clone().into()),
                ("seconds", &|(_, s)| seconds(s).into()),
                ("tokens/s", &|(_, s)| tokens(rate(s))),
            ],
        );
        Section {
            name: "timing",
            title: "Time",
            shows: "Wall time of each run's steps, without evaluations and saving, and tokens per second. The time \
                    depends on other work on the machine: use `routegrad bench` for comparisons.",
            table,
            ..Section::default()
        }
    }
}

fn loss_spikes(run: &RunSummary) -> u64 {
    run.loss_spikes.begins.len() as u64
}

fn gradient_spikes(run: &RunSummary) -> u64 {
    run.gradient_spikes.begins.len() as u64
}

fn diverged(run: &RunSummary) -> u64 {
    u64::from(matches!(run.state, State::Diverged(_)))
}

fn load_cv(run: &RunSummary) -> Option<f64> {
    run.load.map(|l| l.0)
}

/// Returns the table of the points of all curves; the names are those of the columns of means and deviations.
fn table_of(lines: &[Line], [mean, deviation]: [&'static str; 2]) -> Table {
    let points = lines
        .iter()
        .flat_map(|line| line.points.iter().map(move |p| (line.label.as_str(), p)));
    Table::of(
        points,
        &[
            ("group", &|(label, _)| (*label).into()),
            ("tokens", &|(_, p)| p.tokens.into()),
            (mean, &|(_, p)| p.value.mean.into()),
            (deviation, &|(_, p)| p.value.deviation.into()),
        ],
    )
}

/// Returns at most about 200 of the points, always including the last.
fn thinned(points: &[Point]) -> Vec<Point> {
    let step = points.len().div_ceil(200).max(1);
    let from_end = points.iter().rev().step_by(step);
    from_end.rev().copied().collect()
}
