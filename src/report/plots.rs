//! The plots of a run as SVG: `loss.svg` (training and validation loss), `load.svg` (the share of tokens of every expert
//! over time, one panel per MoE layer), and `tasks.svg` if the run scored benchmarks.

mod tasks;

use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::metrics::{self, Record};
use plotters::chart::MeshStyle;
use plotters::coord::Shift;
use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;
use std::path::Path;

/// Maximum number of points or columns in the width of a plot; the values of longer runs are averaged.
pub(crate) const COLUMNS: usize = 480;
const LOAD_COLUMNS: usize = 120;

pub(crate) const INK: RGBColor = RGBColor(51, 51, 51);
pub(crate) const GRID: RGBColor = RGBColor(230, 230, 230);
const TRAIN_RAW: RGBColor = RGBColor(190, 214, 235);
pub(crate) const TRAIN: RGBColor = RGBColor(31, 103, 168);
pub(crate) const VALIDATION: RGBColor = RGBColor(217, 95, 2);
pub(crate) const FONT: &str = "sans-serif";

/// Draws the plots of the log at `metrics`, whose losses are in `loss_unit`, and writes them to `folder`. Does nothing if
/// the log has no steps.
pub fn write(metrics: &Path, folder: &Path, loss_unit: &str) -> Result<()> {
    let records: Vec<Record> = metrics::read(metrics)?.collect();
    if records.is_empty() {
        return Ok(());
    }
    save(&folder.join("loss.svg"), (960, 540), |area| {
        draw_loss(area, &records, loss_unit)
    })?;
    let layers = records[0].load.len();
    let columns = layers.div_ceil(8);
    let rows = layers.div_ceil(columns.max(1));
    let height = 110 + 150 * rows as u32;
    save(&folder.join("load.svg"), (960, height), |area| {
        draw_load(area, &records, (rows, columns))
    })?;
    if records.iter().all(|r| r.tasks.is_empty()) {
        return Ok(());
    }
    save(&folder.join("tasks.svg"), (960, 540), |area| {
        tasks::draw(area, &records)
    })
}

pub(crate) type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Returns the text style with this font size in pixels.
pub(crate) fn font(size: i32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK)
}

/// Returns the axes of a chart with a light grid; numbers have this font size in pixels, and names are one pixel larger.
pub(crate) fn styled<'m, 'a, 'b, X: Ranged, Y: Ranged, B: DrawingBackend>(
    mesh: &'m mut MeshStyle<'a, 'b, X, Y, B>,
    size: i32,
) -> &'m mut MeshStyle<'a, 'b, X, Y, B> {
    mesh.bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(font(size))
        .axis_desc_style(font(size + 1))
}

/// Draws a picture on a white background; returns SVG text.
pub(crate) fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Drawn) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        area.fill(&WHITE)
            .map_err(|e| e.into())
            .and_then(|()| draw(&area))
            .map_err(|e| {
                Error::invalid("plot", "a picture", e.to_string(), "report this as a bug")
            })?;
    }
    Ok(text)
}

fn save(path: &Path, size: (u32, u32), draw: impl FnOnce(&Area) -> Drawn) -> Result<()> {
    publish(path, svg(size, draw)?)
}

/// Returns the smallest and the largest number; without numbers 0 and 1, so that only the frame is drawn.
pub(crate) fn range(numbers: impl Iterator<Item = f64>) -> (f64, f64) {
    let empty = (f64::INFINITY, f64::NEG_INFINITY);
    let (low, high) = numbers.fold(empty, |(low, high), x| (low.min(x), high.max(x)));
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

/// Divides `values` into at most `columns` runs of equal length and returns the mean of each: (x, mean).
pub(crate) fn thin(values: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    values
        .chunks(values.len().div_ceil(columns).max(1))
        .map(|run| {
            let n = run.len() as f64;
            let (x, y) = run.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
            (x / n, y / n)
        })
        .collect()
}

/// Returns the mean of each value and its neighbours within 2% of the run on either side.
fn smooth(values: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = values.len() / 50;
    (0..values.len())
        .map(|i| {
            // Near the ends there are fewer neighbours, equally many on both sides, so that the first and last values do
            // not change.
            let reach = reach.min(i).min(values.len() - 1 - i);
            let near = &values[i - reach..=i + reach];
            let mean = near.iter().map(|(_, y)| y).sum::<f64>() / near.len() as f64;
            (values[i].0, mean)
        })
        .collect()
}

fn draw_loss(area: &Area, records: &[Record], unit: &str) -> Drawn {
    let series = |f: fn(&Record) -> Option<f64>| -> Vec<(f64, f64)> {
        records
            .iter()
            .filter_map(|r| Some((r.step as f64, f(r)?)))
            .collect()
    };
    let train = series(|r| r.loss);
    let validation = series(|r| r.validation_loss);
    let last = records.last().map_or(1.0, |r| r.step as f64).max(2.0);
    let (low, high) = range(train.iter().chain(&validation).map(|(_, y)| *y));
    let margin = 0.05 * (high - low).max(0.1);

    let mut chart = ChartBuilder::on(area)
        .caption("Loss", font(22))
        .margin(16)
        .margin_right(96)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, low - margin..high + margin)?;
    styled(&mut chart.configure_mesh(), 14)
        .x_desc("step")
        .y_desc(format!("cross-entropy, {unit}"))
        .x_labels(9)
        .y_labels(9)
        .x_label_formatter(&|x| grouped(*x))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;

    chart.draw_series(LineSeries::new(
        thin(&train, COLUMNS),
        TRAIN_RAW.stroke_width(1),
    ))?;
    let smoothed = thin(&smooth(&train), COLUMNS);
    let mark = |color: RGBColor| {
        move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(3))
    };
    chart
        .draw_series(LineSeries::new(smoothed.clone(), TRAIN.stroke_width(2)))?
        .label("training, smoothed")
        .legend(mark(TRAIN));
    chart
        .draw_series(LineSeries::new(
            validation.clone(),
            VALIDATION.stroke_width(2),
        ))?
        .label("validation")
        .legend(mark(VALIDATION));
    chart.draw_series(
        validation
            .iter()
            .map(|p| Circle::new(*p, 3, VALIDATION.filled())),
    )?;
    let ends: Vec<_> = [(&smoothed, TRAIN), (&validation, VALIDATION)]
        .into_iter()
        .filter_map(|(s, color)| s.last().map(|p| (p.1, color)))
        .map(|(y, color)| (chart.backend_coord(&(last, y)), y, color))
        .collect();
    draw_last_values(area, &ends)?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(GRID)
        .label_font(font(15))
        .legend_area_size(32)
        .margin(12)
        .draw()?;
    Ok(())
}

/// Writes the last values at the right edge, each with its position and color; labels that would overlap are moved apart.
fn draw_last_values(area: &Area, ends: &[((i32, i32), f64, RGBColor)]) -> Drawn {
    let close = ends.len() == 2 && (ends[0].0.1 - ends[1].0.1).abs() < 16;
    for (i, ((x, y), value, color)) in ends.iter().enumerate() {
        let above =
            ends.len() == 2 && ends[i].1 >= ends[1 - i].1 && !(i == 1 && ends[0].1 == ends[1].1);
        let shift = match (close, above) {
            (false, _) => 0,
            (true, true) => -8,
            (true, false) => 8,
        };
        area.draw(&Text::new(
            format!("{value:.3}"),
            (x + 8, y - 7 + shift),
            (FONT, 15).into_font().color(color),
        ))?;
    }
    Ok(())
}

/// Formats 12345 as "12,345".
fn grouped(x: f64) -> String {
    let digits = format!("{:.0}", x.abs());
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Returns the color of an expert's load relative to a balanced load, on a logarithmic scale: white at 1, blue below,
/// orange above, saturated at one quarter and at four times.
fn load_color(relative: f64) -> RGBColor {
    diverging(relative.max(1e-9).log2() / 2.0)
}

/// Returns white at 0, blue towards −1 and orange towards 1; values beyond are saturated.
pub(crate) fn diverging(t: f64) -> RGBColor {
    let t = t.clamp(-1.0, 1.0);
    let end = if t < 0.0 { (24, 79, 149) } else { (190, 74, 0) };
    let mix = |full: u8| (255.0 + (f64::from(full) - 255.0) * t.abs()).round() as u8;
    RGBColor(mix(end.0), mix(end.1), mix(end.2))
}

fn draw_load(area: &Area, records: &[Record], (rows, columns): (usize, usize)) -> Drawn {
    let (header, panels) = area.split_vertically(64);
    header.draw(&Text::new(
        "Load of the experts over the steps, relative to a balanced one",
        (20, 22),
        font(22),
    ))?;
    draw_scale(&header, 640)?;
    if rows * columns == 0 {
        return Ok(());
    }
    let run = records
        .len()
        .div_ceil(LOAD_COLUMNS / columns.min(LOAD_COLUMNS));
    let last = records.last().map_or(1, |r| r.step) as f64;
    for (layer, panel) in panels.split_evenly((rows, columns)).iter().enumerate() {
        let experts = records[0].load.get(layer).map_or(0, Vec::len);
        if experts == 0 {
            continue;
        }
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("MoE layer {layer}"), font(15))
            .margin(6)
            .margin_right(20)
            .x_label_area_size(26)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..last, -0.5..experts as f64 - 0.5)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(INK)
            .label_style(font(12))
            .axis_desc_style(font(13))
            .x_labels(7)
            .y_labels(5)
            .y_desc("expert")
            .x_label_formatter(&|x| grouped(*x))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        for group in records.chunks(run) {
            let mut sums = vec![0u64; experts];
            for record in group {
                let counts = record.load.get(layer).into_iter().flatten();
                sums.iter_mut().zip(counts).for_each(|(s, c)| *s += c);
            }
            let total = sums.iter().sum::<u64>().max(1) as f64;
            let from = group[0].step as f64 - 1.0;
            let to = group[group.len() - 1].step as f64;
            chart.draw_series(sums.iter().enumerate().map(|(e, sum)| {
                let relative = *sum as f64 * experts as f64 / total;
                let corners = [(from, e as f64 - 0.5), (to, e as f64 + 0.5)];
                Rectangle::new(corners, load_color(relative).filled())
            }))?;
        }
    }
    Ok(())
}

/// Draws the legend of [`load_color`], from one quarter to four times.
fn draw_scale(area: &Area, left: i32) -> Drawn {
    const WIDTH: i32 = 240;
    for i in 0..WIDTH {
        let relative = 2f64.powf(4.0 * f64::from(i) / f64::from(WIDTH) - 2.0);
        let corners = [(left + i, 16), (left + i + 1, 32)];
        area.draw(&Rectangle::new(corners, load_color(relative).filled()))?;
    }
    area.draw(&Rectangle::new([(left, 16), (left + WIDTH, 32)], INK))?;
    for (i, label) in ["¼", "½", "1", "2", "4 ×"].iter().enumerate() {
        let x = left + i as i32 * WIDTH / 4;
        area.draw(&Text::new(*label, (x - 3, 38), font(14)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_plots_are_drawn_for_any_length_and_shape() {
        for (steps, layers, experts) in [(1, 1, 1), (7, 3, 8), (2000, 23, 32), (3, 0, 0)] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("metrics.jsonl");
            let mut log = metrics::Log::open(&path, 0).unwrap();
            for step in 1..=steps {
                let mut record = metrics::tests::record(step);
                record.load = vec![vec![step; experts]; layers];
                record.loss = record.loss.filter(|_| step % 3 != 0);
                log.append(&record).unwrap();
            }
            write(&path, dir.path(), "nats per byte").unwrap();
            for name in ["loss.svg", "load.svg"] {
                let svg = std::fs::read_to_string(dir.path().join(name)).unwrap();
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
                assert!(!svg.contains("NaN"), "{name}: a coordinate is not a number");
            }
        }
    }

    #[test]
    fn smoothing_keeps_a_line_and_both_its_ends() {
        let line: Vec<(f64, f64)> = (0..500)
            .map(|i| (f64::from(i), 3.0 * f64::from(i)))
            .collect();
        for ((_, a), (_, b)) in smooth(&line).iter().zip(&line) {
            assert!((a - b).abs() < 1e-9);
        }
        assert_eq!(thin(&line, 100).len(), 100);
        assert_eq!(thin(&line[..3], 100), line[..3]);
    }

    #[test]
    fn a_balanced_load_is_white_and_the_ends_saturate() {
        assert_eq!(load_color(1.0), RGBColor(255, 255, 255));
        assert_eq!(load_color(0.0), load_color(0.25));
        assert_eq!(load_color(8.0), load_color(4.0));
        assert_eq!(grouped(1234567.0), "1,234,567");
        assert_eq!(grouped(0.0), "0");
    }
}
