//! The report: one page with the roofline, the comparison with peers, all measurements, and cases that could not run.

use super::ceilings::Ceilings;
use super::figures;
use super::record::{CUBLAS, OURS, Record, Records, View, told};
use crate::device::machine::Chip;
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::page::{Cell, Page, Section, Table, document, replace_between};
use std::collections::BTreeSet;
use std::path::Path;

/// Family of the records that hold the measured ceilings.
pub const CEILINGS: &str = "ceilings";

/// Records of one device of one machine.
pub struct Report<'a> {
    machine: &'a str,
    device: &'a str,
    view: View<'a>,
}

impl<'a> Report<'a> {
    /// Returns a report for every machine and device with records, GPUs first.
    pub fn all(records: &'a Records) -> Vec<Self> {
        let places: BTreeSet<(usize, &str, &str)> = records
            .iter()
            .map(|r| {
                let rank = ["cuda", "cpu", "sim"].iter().position(|d| *d == r.device);
                (rank.unwrap_or(3), r.machine.as_str(), r.device.as_str())
            })
            .collect();
        let report = |(_, machine, device)| Report {
            machine,
            device,
            view: View(
                records
                    .iter()
                    .filter(|r| r.machine == machine && r.device == device)
                    .collect(),
            ),
        };
        places.into_iter().map(report).collect()
    }

    /// Returns the ceilings from which the floors of the newest record were computed.
    fn ceilings(&self) -> Option<Ceilings> {
        let ceilings = self.view.of(CEILINGS, OURS);
        match (ceilings, self.device) {
            (Some(record), _) => Some(Ceilings {
                flops: record.flops,
                bytes: record.bytes,
                of: record.detail.clone(),
            }),
            (None, "cuda") => Chip::of_driver(self.machine).map(|chip| {
                let (flops, bytes) = chip.ceilings();
                let how = match chip.is_measured() {
                    true => "measured before",
                    false => "by its data sheet",
                };
                let of = format!("one {}, {how}", chip.name);
                Ceilings { flops, bytes, of }
            }),
            _ => None,
        }
    }

    fn sections(&self) -> Result<Vec<Section>> {
        let mut sections = Vec::new();
        // One section, as its name is the anchor on the page.
        let mut all = Table::default();
        for peer in self.view.peers() {
            let mut table = self.summary(peer);
            table.columns.insert(0, "peer".into());
            all.columns = table.columns;
            for mut row in table.rows {
                row.insert(0, peer.into());
                all.rows.push(row);
            }
        }
        if !all.rows.is_empty() {
            sections.push(Section {
                name: "summary",
                title: "Summary",
                shows: "Geometric means over the shapes of a kernel; above 1, routegrad is faster than the peer.",
                table: all,
                ..Section::default()
            });
        }
        if let Some(ceilings) = self.ceilings() {
            sections.push(Section {
                name: "roofline",
                title: "Roofline",
                shows: "Each point is a kernel with one shape. The lines are the measured peak rates of the machine.",
                formula: "floor = max(FLOPs / product's rate, bytes / copy's rate)",
                notes: vec![format!("The peak rates are those of {}.", ceilings.of)],
                figure: Some(figures::roofline(&self.view, &ceilings)?),
                ..Section::default()
            });
        }
        sections.push(self.ratios()?);
        sections.push(self.numbers());
        sections.push(self.missing());
        sections.push(self.facts());
        Ok(sections)
    }

    fn ratios(&self) -> Result<Section> {
        let mut table = Table::new(&["case", "peer", "ours, µs", "peer, µs", "times as fast"]);
        let mut figures = String::new();
        for peer in self.view.peers() {
            figures.extend(figures::bars(&self.view, peer)?);
            for record in self.view.ours() {
                let theirs = self.view.of(&record.case, peer).and_then(Record::seconds);
                let (Some(ours), Some(theirs)) = (record.seconds(), theirs) else {
                    continue;
                };
                table.rows.push(vec![
                    record.case.as_str().into(),
                    peer.into(),
                    short(1e6 * ours, 1),
                    short(1e6 * theirs, 1),
                    short(theirs / ours, 3),
                ]);
            }
        }
        let mut notes = Vec::new();
        if table.rows.is_empty() {
            notes.push("No peer was measured.".into());
        } else if self.view.mixes_runs() {
            notes.push("These cases were not all measured in one run: see the dates.".into());
        }
        Ok(Section {
            name: "ratios",
            title: "Comparison with peers",
            shows: "Medians of interleaved runs with the same inputs; above 1, routegrad is faster.",
            notes,
            table,
            figure: (!figures.is_empty()).then_some(figures),
            ..Section::default()
        })
    }

    fn numbers(&self) -> Section {
        let mut table = Table::new(&[
            "case",
            "implementation",
            "µs",
            "TFLOP/s",
            "TB/s",
            "of the floor",
            "spread",
            "repeat",
            "date",
        ]);
        for record in self.view.0.iter().filter(|r| r.case != CEILINGS) {
            let Some(timing) = &record.timing else {
                continue;
            };
            let spread = timing.spread.iter().copied().fold(0.0, f64::max);
            table.rows.push(vec![
                record.case.as_str().into(),
                record.implementation.as_str().into(),
                short(1e6 * timing.seconds, 1),
                told(record.tflops()).into(),
                told(record.terabytes()).into(),
                told(record.share_of_floor()).into(),
                short(spread, 3),
                short(timing.repeat_ratio(), 3),
                record.date.as_str().into(),
            ]);
        }
        Section {
            name: "numbers",
            title: "All measurements",
            shows: "FLOPs are those of the mathematical definition; bytes are those that must be moved at least once. \
                    Spread is the interquartile range divided by the median; repeat is the time of the slower pass divided by that \
                    of the faster.",
            table,
            ..Section::default()
        }
    }

    fn missing(&self) -> Section {
        let mut table = Table::new(&["implementation", "why", "cases", "such as"]);
        let mut reasons: Vec<(&str, &str, usize, &str)> = Vec::new();
        for record in self
            .view
            .0
            .iter()
            .filter(|r| r.timing.is_none() && r.case != CEILINGS)
        {
            let key = (record.implementation.as_str(), record.detail.as_str());
            match reasons.iter_mut().find(|r| (r.0, r.1) == key) {
                Some(known) => known.2 += 1,
                None => reasons.push((key.0, key.1, 1, &record.case)),
            }
        }
        for (implementation, why, cases, example) in reasons {
            table.rows.push(vec![
                implementation.into(),
                why.into(),
                cases.into(),
                example.into(),
            ]);
        }
        let notes = match table.rows.is_empty() {
            true => vec!["All cases that were tried ran.".into()],
            false => Vec::new(),
        };
        Section {
            name: "missing",
            title: "Cases that could not run",
            shows: "A peer that is listed neither here nor above was not tried.",
            notes,
            table,
            ..Section::default()
        }
    }

    fn facts(&self) -> Section {
        let mut table = Table::new(&["fact", "value"]);
        let mut row = |fact: &str, value: String| {
            if !value.is_empty() {
                table.rows.push(vec![fact.into(), value.into()]);
            }
        };
        row("machine", self.machine.into());
        row("device", self.device.into());
        if let Some(c) = self.ceilings() {
            let rates = format!(
                "{:.4} TFLOP/s, {:.4} TB/s: {}",
                c.flops / 1e12,
                c.bytes / 1e12,
                c.of
            );
            row("ceilings", rates);
        }
        let distinct = |of: &dyn Fn(&Record) -> String| {
            let all: BTreeSet<String> = self
                .view
                .0
                .iter()
                .map(|r| of(r))
                .filter(|s| !s.is_empty())
                .collect();
            all.into_iter().collect::<Vec<_>>().join(", ")
        };
        row("driver", distinct(&|r| r.driver.clone()));
        row("system", distinct(&|r| r.system.clone()));
        row(
            "versions",
            distinct(&|r| format!("{} {}", r.implementation, r.version)),
        );
        row("runs", distinct(&|r| r.run.clone()));
        for field in [
            "clocks.sm",
            "clocks.mem",
            "temperature.gpu",
            "power.draw",
            "clocks_event_reasons.active",
        ] {
            row(field, self.range(field));
        }
        Section {
            name: "machine",
            title: "The machine",
            shows: "Clocks in MHz, temperature in °C, power in W, smallest and largest value that nvidia-smi reported before and after each case.",
            table,
            ..Section::default()
        }
    }

    /// Returns the range of a value of nvidia-smi as text.
    fn range(&self, field: &str) -> String {
        let states = self.view.0.iter().flat_map(|r| [&r.before, &r.after]);
        let values: BTreeSet<String> = states
            .filter_map(|state| state.get(field)?.as_str().map(String::from))
            .collect();
        let numbers: Vec<f64> = values.iter().filter_map(|v| v.parse().ok()).collect();
        let ends = |f: fn(f64, f64) -> f64| numbers.iter().copied().reduce(f);
        match (values.len(), ends(f64::min), ends(f64::max)) {
            (0, ..) => "no nvidia-smi".into(),
            (1, ..) => values.into_iter().collect(),
            (_, Some(least), Some(most)) => format!("{least} to {most}"),
            _ => values.into_iter().collect::<Vec<_>>().join(", "),
        }
    }

    /// Returns a table with one row per family of kernels, with its best and worst shape.
    fn summary(&self, peer: &str) -> Table {
        let mut table = Table::new(&[
            "kernel",
            "shapes",
            "of the floor",
            "speed relative to the peer",
            "minimum",
            "maximum",
        ]);
        let families: BTreeSet<&str> = self.view.ours().map(|r| r.family.as_str()).collect();
        for family in families {
            let cases: Vec<&Record> = self.view.ours().filter(|r| r.family == family).collect();
            let ratios: Vec<f64> = cases
                .iter()
                .filter_map(|r| self.view.ratio(&r.case, peer))
                .collect();
            let shares = cases.iter().filter_map(|r| r.share_of_floor());
            let cell = |x: Option<f64>| x.map_or("–".into(), |x| short(x, 2));
            if ratios.is_empty() {
                continue;
            }
            table.rows.push(vec![
                format!("`{family}`").into(),
                ratios.len().into(),
                cell(geometric_mean(shares)),
                cell(geometric_mean(ratios.iter().copied())),
                cell(ratios.iter().copied().reduce(f64::min)),
                cell(ratios.iter().copied().reduce(f64::max)),
            ]);
        }
        table
    }
}

fn short(x: f64, digits: usize) -> Cell {
    format!("{x:.digits$}").into()
}

/// Returns the page with all records as HTML.
///
/// # Errors
/// When there are no records, or a figure cannot be drawn.
pub fn html(records: &Records) -> Result<String> {
    let reports = nonempty(records)?;
    let sections = reports
        .iter()
        .map(Report::sections)
        .collect::<Result<Vec<_>>>()?;
    let pages = reports
        .iter()
        .zip(&sections)
        .map(|(report, sections)| Page {
            title: "routegrad bench".into(),
            heading: format!("{}, device {}", report.machine, report.device),
            introduction: vec![
                "Written by `routegrad bench --report` from the records under benches/results/."
                    .into(),
                headline(report),
            ],
            sections,
            open_rows: 20,
        });
    Ok(document(&pages.collect::<Vec<_>>()))
}

/// Returns one sentence with the main result.
fn headline(report: &Report) -> String {
    let cases = report.view.ours().filter(|r| r.case != CEILINGS).count();
    let peers = report.view.peers().into_iter().filter_map(|peer| {
        let ratios = report
            .view
            .ours()
            .filter_map(|r| report.view.ratio(&r.case, peer));
        let mean = geometric_mean(ratios)?;
        Some(format!(
            " {mean:.2} times as fast as {peer}, geometric mean of all cases that it ran."
        ))
    });
    format!("{cases} cases.{}", peers.collect::<String>())
}

/// Returns the geometric mean; `None` if there are no values.
fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = values.map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

fn nonempty(records: &Records) -> Result<Vec<Report<'_>>> {
    let reports = Report::all(records);
    if !reports.is_empty() {
        return Ok(reports);
    }
    let help = "run `routegrad bench`, or name the folder of the records with --out";
    Err(Error::invalid("bench --report", "records", "none", help))
}

/// Writes the figures of the first machine with records into `folder`: `bench-roofline.svg` and `bench-cublas.svg`.
///
/// # Errors
/// When there are no records, or the folder cannot be written.
pub fn write_pictures(records: &Records, folder: &Path) -> Result<()> {
    crate::report::page::create(folder)?;
    let report = &nonempty(records)?[0];
    if let Some(ceilings) = report.ceilings() {
        let picture = figures::roofline(&report.view, &ceilings)?;
        publish(&folder.join("bench-roofline.svg"), &picture)?;
    }
    if let Some(picture) = figures::bars(&report.view, CUBLAS)? {
        publish(&folder.join("bench-cublas.svg"), &picture)?;
    }
    Ok(())
}

/// Marks around the table in a README.
const MARKS: [&str; 2] = [
    "<!-- bench: routegrad bench --report FILE --update writes what follows -->",
    "<!-- end of bench -->",
];

/// Writes the table of the first machine with records, compared with cuBLAS, into a page.
///
/// # Errors
/// When there are no records, or the page has no marks.
pub fn update(records: &Records, page: &Path) -> Result<()> {
    let report = &nonempty(records)?[0];
    let table = report.summary(CUBLAS).markdown();
    replace_between(page, MARKS, &table)
}
