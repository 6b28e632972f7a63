//! A model of the time of a grouped product, fitted to the timings of `hardware-check`.
//!
//! The kernels are persistent: the busiest multiprocessor processes w = ⌈tiles / multiprocessors⌉ tiles, one after
//! another. A tile takes a·K for an inner extent K (its main loop) plus b (first loads, epilogue); the kernel takes c in
//! addition (launch, last stores): `T = w (a K + b) + c`. The three coefficients are at least 0 and are fitted to all
//! recorded timings of one product, tile and compiled code by least squares of relative errors.

use super::hardware_records::TIMED;
use super::step_costs::Product;
use crate::device::machine::{Chip, H200_MULTIPROCESSORS, h200};
use crate::error::{Error, Result};
use crate::report::page::{Cell, Table, replace_between};
use crate::verify::hardware::record::Record;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Minimum number of timings for a fit: twice the number of its parameters.
const ENOUGH: usize = 6;

/// Marks around the table in a page.
const MARKS: [&str; 2] = [
    "<!-- predictions: routegrad bench --predict --update writes what follows -->",
    "<!-- end of predictions -->",
];

/// The timing of a product with one of its tiles.
#[derive(Clone, Debug)]
struct Timing {
    case: String,
    tile: String,
    /// Number of tiles that the busiest multiprocessor processes, w.
    waves: f64,
    /// Average number of tiles per multiprocessor.
    mean: f64,
    /// Inner extent K.
    inner: f64,
    flops: f64,
    seconds: f64,
    /// Relative error of the fit to all other timings.
    unseen: f64,
}

impl Timing {
    /// Describes a product with equal groups and a tile, without a time; returns `None` for a launcher that is not a
    /// product, or a tile without a size.
    fn of(launcher: &str, p: &Product, tile: &str) -> Option<Timing> {
        let (_, size) = tile.split_once(' ')?;
        let (tile_height, tile_width) = size.split_once('x')?;
        let rows = p.rows.div_ceil(p.groups);
        let [height, width, inner] = match launcher.rsplit_once("grouped_gemm_")?.1 {
            "forward" => [rows, p.n, p.k],
            "input_gradient" => [rows, p.k, p.n],
            "weight_gradient" => [p.n, p.k, rows],
            _ => return None,
        };
        let across = |extent: usize, tile: &str| Some(extent.div_ceil(tile.parse().ok()?));
        let tiles = p.groups * across(height, tile_height)? * across(width, tile_width)?;
        let mean = tiles as f64 / H200_MULTIPROCESSORS as f64;
        Some(Timing {
            case: String::new(),
            tile: tile.into(),
            waves: mean.ceil(),
            mean,
            inner: inner as f64,
            flops: 2.0 * (p.rows * p.n * p.k) as f64,
            seconds: 0.0,
            unseen: f64::NAN,
        })
    }

    /// Returns the factors of a, b and c.
    fn terms(&self) -> [f64; 3] {
        [self.waves * self.inner, self.waves, 1.0]
    }
}

/// The coefficients a, b and c in seconds: per unit of K in a tile's main loop, per tile, and per kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Fit([f64; 3]);

impl Fit {
    /// Minimises the squared relative errors with coefficients of at least 0; returns `None` if there are too few timings.
    fn of(timings: &[&Timing]) -> Option<Fit> {
        let candidates = (1..8usize).filter_map(|used| {
            let fit = Fit::with(timings, used)?;
            let errors = timings.iter().map(|t| fit.error(t).powi(2));
            Some((errors.sum::<f64>(), fit))
        });
        let best = candidates.min_by(|(a, _), (b, _)| a.total_cmp(b));
        best.map(|(_, fit)| fit)
    }

    /// Fits the coefficients whose bits are set in `used`; the others are 0. Returns `None` if one would be negative.
    fn with(timings: &[&Timing], used: usize) -> Option<Fit> {
        let free: Vec<usize> = (0..3).filter(|i| used >> i & 1 == 1).collect();
        let mut rows = vec![vec![0.0; free.len() + 1]; free.len()];
        for timing in timings {
            let terms = timing.terms().map(|term| term / timing.seconds);
            for (row, &i) in rows.iter_mut().zip(&free) {
                for (cell, &j) in row.iter_mut().zip(&free) {
                    *cell += terms[i] * terms[j];
                }
                row[free.len()] += terms[i];
            }
        }
        let mut fit = Fit::default();
        for (&i, x) in free.iter().zip(solved(rows)?) {
            fit.0[i] = x;
        }
        (timings.len() >= free.len() && fit.0.iter().all(|x| *x >= 0.0)).then_some(fit)
    }

    fn seconds(&self, timing: &Timing) -> f64 {
        let terms = timing.terms();
        terms.iter().zip(self.0).map(|(term, x)| term * x).sum()
    }

    /// Returns the relative error of the fit for a timing.
    fn error(&self, timing: &Timing) -> f64 {
        self.seconds(timing) / timing.seconds - 1.0
    }

    /// Returns the parts of the time, by cause, in seconds.
    fn losses(&self, timing: &Timing, chip: &Chip) -> [(&'static str, f64); 4] {
        let [a, b, c] = self.0;
        let peak = timing.flops / chip.peak;
        let idle = (timing.waves - timing.mean) * (a * timing.inner + b);
        [
            ("main loop", timing.mean * a * timing.inner - peak),
            ("epilogue", timing.mean * b),
            ("idle multiprocessors", idle),
            ("launch", c),
        ]
    }
}

/// Solves a small system of linear equations by Gaussian elimination with pivoting; the last number of each row is its
/// right side. Returns `None` if the system is singular.
fn solved(mut rows: Vec<Vec<f64>>) -> Option<Vec<f64>> {
    let n = rows.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|&a, &b| rows[a][i].abs().total_cmp(&rows[b][i].abs()))?;
        rows.swap(i, pivot);
        let upper = rows[i].clone();
        if upper[i].abs() < 1e-12 * upper.iter().fold(0.0, |m: f64, x| m.max(x.abs())) {
            return None;
        }
        for row in &mut rows[i + 1..] {
            let factor = row[i] / upper[i];
            for (x, up) in row.iter_mut().zip(&upper) {
                *x -= factor * up;
            }
        }
    }
    let mut solution = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| rows[i][j] * solution[j]).sum();
        solution[i] = (rows[i][n] - known) / rows[i][i];
    }
    Some(solution)
}

/// The timings of one product, tile and compiled code, and their fit.
struct FittedTimings {
    launcher: String,
    timings: Vec<Timing>,
    fit: Fit,
}

impl FittedTimings {
    fn of((launcher, mut timings): (String, Vec<Timing>)) -> Option<FittedTimings> {
        let all: Vec<&Timing> = timings.iter().collect();
        let fit = Fit::of(&all)?;
        let unseen = (0..all.len()).map(|i| {
            let mut others = all.clone();
            let left_out = others.remove(i);
            Fit::of(&others).map_or(f64::NAN, |fit| fit.error(left_out))
        });
        let unseen: Vec<f64> = unseen.collect();
        for (timing, unseen) in timings.iter_mut().zip(unseen) {
            timing.unseen = unseen;
        }
        Some(FittedTimings {
            launcher,
            timings,
            fit,
        })
    }
}

/// A timing and the fit that predicts it.
type Prediction<'a> = (&'a Timing, &'a Fit);

/// Returns the number of timings, the largest error of their fits, and the largest error of a timing that was left out of
/// its fit; errors in percent.
fn errors<'a>(all: impl Iterator<Item = Prediction<'a>>) -> (usize, f64, f64) {
    all.fold((0, 0.0, 0.0), |(count, fitted, unseen), (timing, fit)| {
        let worse = |most: f64, error: f64| most.max(100.0 * error.abs());
        (
            count + 1,
            worse(fitted, fit.error(timing)),
            worse(unseen, timing.unseen),
        )
    })
}

/// The model, and its predictions for all timings.
pub struct Model {
    fitted: Vec<FittedTimings>,
}

impl Model {
    /// Fits the timings on an H200 among `records`.
    ///
    /// # Errors
    /// When no product has enough timings.
    pub fn new(records: &[Record]) -> Result<Self> {
        let mut groups: BTreeMap<(String, String, String), Vec<Timing>> = BTreeMap::new();
        for record in records.iter().filter(|r| r.gpu == h200().name) {
            for (product, timing) in timings(record).into_iter().flatten() {
                let key = (product, timing.tile.clone(), record.code.clone());
                groups.entry(key).or_default().push(timing);
            }
        }
        let enough = groups
            .into_iter()
            .filter(|(_, timings)| timings.len() >= ENOUGH)
            .map(|((launcher, _, _), timings)| (launcher, timings));
        let fitted: Vec<FittedTimings> = enough.filter_map(FittedTimings::of).collect();
        if fitted.is_empty() {
            return Err(Error::invalid(
                "bench --predict",
                format!("{ENOUGH} timings or more of one product with one tile"),
                "none in this folder",
                "name a folder with records of a GPU with --out; routegrad hardware-check writes them",
            ));
        }
        Ok(Model { fitted })
    }

    /// Returns the seconds of a product with the fastest tile of the model; `None` if the launcher was not timed.
    pub(super) fn seconds(&self, launcher: &str, product: &Product) -> Option<f64> {
        let fits = self.fitted.iter().filter(|f| f.launcher == launcher);
        let seconds = fits.filter_map(|fitted| {
            let timing = Timing::of(launcher, product, &fitted.timings[0].tile)?;
            Some(fitted.fit.seconds(&timing))
        });
        seconds.min_by(f64::total_cmp)
    }

    /// Returns the predictions for all timings.
    fn predictions(&self) -> impl Iterator<Item = Prediction<'_>> {
        let fitted = self.fitted.iter();
        fitted.flat_map(|f| f.timings.iter().map(move |timing| (timing, &f.fit)))
    }

    /// Returns for each case the prediction for its fastest tile.
    fn fastest(&self) -> impl Iterator<Item = Prediction<'_>> {
        let mut fastest: BTreeMap<&str, Prediction> = BTreeMap::new();
        for prediction in self.predictions() {
            let best = fastest.entry(&prediction.0.case).or_insert(prediction);
            if prediction.0.seconds < best.0.seconds {
                *best = prediction;
            }
        }
        fastest.into_values()
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            "product",
            "tile",
            "recorded µs",
            "model µs",
            "error",
            "error unseen",
            "at the peak",
            "main loop",
            "epilogue",
            "idle",
            "launch",
            "limit",
        ]);
        for (timing, fit) in self.fastest() {
            let seconds = fit.seconds(timing);
            let share = |part: f64| Cell::from(format!("{:.0}%", 100.0 * part / seconds));
            let error = |e: f64| Cell::from(format!("{:+.1}%", 100.0 * e));
            let micro = |s: f64| Cell::from(format!("{:.1}", 1e6 * s));
            let losses = fit.losses(timing, h200());
            let limit = losses.iter().max_by(|(_, a), (_, b)| a.total_cmp(b));
            let mut row: Vec<Cell> = vec![
                format!("`{}`", timing.case).into(),
                timing.tile.clone().into(),
                micro(timing.seconds),
                micro(seconds),
                error(fit.error(timing)),
                error(timing.unseen),
                share(timing.flops / h200().peak),
            ];
            row.extend(losses.iter().map(|(_, part)| share(*part)));
            row.push(limit.map_or("", |(name, _)| *name).into());
            table.rows.push(row);
        }
        table
    }

    /// Returns the table with an explanation, in Markdown.
    pub fn markdown(&self) -> String {
        let [(all, fitted, unseen), (cases, fastest, _)] =
            [errors(self.predictions()), errors(self.fastest())];
        let table = self.table();
        format!(
            "The model `T = w (a K + b) + c` (w tiles in a row, inner extent K) is fitted to {all} timings of products on an \
             H200: the largest error is {fitted:.1}%, and {unseen:.1}% for a timing that its fit did not see; {fastest:.1}% among \
             the {cases} below, each product with its fastest tile. The shares say where the time of the model goes: the \
             operations at the peak of the data sheet, the main loop above that (the clock under load, waits for operands, \
             padded rows), epilogues, multiprocessors without a tile in the last wave, and the launch. The largest of the last \
             four is the limit.\n\n{}",
            table.markdown()
        )
    }

    /// Writes the table and its explanation into a page, between its marks.
    ///
    /// # Errors
    /// When the page has no marks, or cannot be written.
    pub fn update(&self, page: &Path) -> Result<()> {
        replace_between(page, MARKS, &self.markdown())
    }
}

/// Returns the timings in a record: (launcher, timing) for each tile; `None` if it is not a record of a product.
fn timings(record: &Record) -> Option<Vec<(String, Timing)>> {
    let case = record.task.strip_prefix(TIMED)?;
    let launcher = case.split(' ').next()?;
    let number = |key: &str| record.measured[key].as_f64().map(|n| n as usize);
    // The groups of the timed cases are equal.
    let product = Product {
        rows: number("rows")?,
        groups: number("experts")?,
        n: number("n")?,
        k: number("k")?,
    };
    let timing = |(tile, microseconds): (&String, &Value)| {
        let timing = Timing {
            case: case.into(),
            seconds: microseconds.as_f64()? * 1e-6,
            ..Timing::of(launcher, &product, tile)?
        };
        Some((launcher.to_string(), timing))
    };
    let tiles = record.measured["microseconds_of_each_tile"].as_object()?;
    Some(tiles.iter().filter_map(timing).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::bench::hardware_records::timed;

    #[test]
    fn a_fit_finds_the_coefficients_that_generated_the_timings() {
        let timing = |waves: f64, inner: f64, [a, b, c]: [f64; 3]| Timing {
            case: String::new(),
            tile: String::new(),
            waves,
            mean: waves - 0.5,
            inner,
            flops: 1.0,
            seconds: waves * (a * inner + b) + c,
            unseen: f64::NAN,
        };
        for coefficients in [[1e-8, 2e-6, 3e-6], [1e-8, 0.0, 3e-6], [1e-8, 2e-6, 0.0]] {
            let sizes = [
                (1.0, 512.0),
                (2.0, 512.0),
                (3.0, 2048.0),
                (9.0, 1024.0),
                (20.0, 4096.0),
                (7.0, 64.0),
            ];
            let made = sizes.map(|(waves, inner)| timing(waves, inner, coefficients));
            let fit = Fit::of(&made.iter().collect::<Vec<_>>()).unwrap();
            for (found, made) in fit.0.iter().zip(coefficients) {
                assert!(
                    (found - made).abs() < 1e-6 * (made + 1e-9),
                    "{fit:?} {coefficients:?}"
                );
            }
            // The parts add up to the total time.
            let losses = fit
                .losses(&made[3], h200())
                .iter()
                .map(|(_, part)| part)
                .sum::<f64>();
            let whole = losses + made[3].flops / h200().peak;
            assert!((whole / fit.seconds(&made[3]) - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_predictions_for_recorded_products_are_within_a_tenth() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
        let model = Model::new(&timed(&folder).unwrap()).unwrap();
        let (count, fitted, unseen) = errors(model.predictions());
        assert!(count >= 150, "{count}");
        assert!(fitted < 10.5 && unseen < 12.5, "{fitted} {unseen}");
        let (_, fastest, unseen) = errors(model.fastest());
        assert!(fastest < 10.0 && unseen < 10.0, "{fastest} {unseen}");
        assert!(Model::new(&[]).is_err());
    }
}
