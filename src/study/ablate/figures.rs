//! The figures of a report: curves with bands of one standard deviation, and the final losses of all runs.

use super::summary::Point;
use crate::error::Result;
use crate::report::plots::{Area, COLUMNS, Drawn, INK, font, range, styled, svg, thin};
use plotters::prelude::*;

/// Colours of the groups, in order. They differ in hue and lightness, so that colour-blind readers can distinguish them
/// (the set of Okabe and Ito without its yellow, followed by darker colours).
const COLORS: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(60, 60, 60),
    RGBColor(120, 60, 140),
    RGBColor(140, 86, 40),
    RGBColor(110, 130, 0),
];

/// A curve with the standard deviation at each point.
pub struct Line {
    pub label: String,
    pub points: Vec<Point>,
}

fn color(i: usize) -> RGBColor {
    COLORS[i % COLORS.len()]
}

/// Formats 2457600 as "2.46M".
pub fn short_number(x: f64) -> String {
    let (scaled, unit) = match x.abs() {
        a if a >= 1e12 => (x / 1e12, "T"),
        a if a >= 1e9 => (x / 1e9, "B"),
        a if a >= 1e6 => (x / 1e6, "M"),
        a if a >= 1e3 => (x / 1e3, "k"),
        _ => (x, ""),
    };
    let text = match scaled.abs() {
        a if a >= 100.0 => format!("{scaled:.0}"),
        a if a >= 10.0 => format!("{scaled:.1}"),
        _ => format!("{scaled:.2}"),
    };
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text}{unit}")
}

/// Draws the curves over tokens, in one panel per entry of `from`: the share of the tokens at which the panel begins.
/// Returns SVG.
pub fn curves(lines: &[Line], y: &str, from: &[f64]) -> Result<String> {
    let tokens = lines.iter().flat_map(|l| &l.points).map(|p| p.tokens);
    let last = tokens.max().unwrap_or(0) as f64;
    let rows = legend_rows(lines);
    let header = 22 + 20 * rows.last().map_or(0, |r| r.1 + 1);
    svg((1000, header as u32 + 420), |area| {
        let (top, panels) = area.split_vertically(header);
        for ((i, line), (x, row)) in lines.iter().enumerate().zip(&rows) {
            let y = 12 + 20 * row;
            let corners = [(*x, y + 5), (x + 22, y + 9)];
            top.draw(&Rectangle::new(corners, color(i).filled()))?;
            top.draw(&Text::new(line.label.clone(), (x + 28, y), font(14)))?;
        }
        for (panel, share) in panels.split_evenly((1, from.len())).iter().zip(from) {
            draw_curves(panel, lines, y, (share * last, last))?;
        }
        Ok(())
    })
}

/// Returns the left edge and the row of each label in the legend.
fn legend_rows(lines: &[Line]) -> Vec<(i32, i32)> {
    let (mut x, mut row) = (20, 0);
    let mut places = Vec::new();
    for line in lines {
        let width = 50 + 8 * line.label.chars().count() as i32;
        if x + width > 990 && x > 20 {
            (x, row) = (20, row + 1);
        }
        places.push((x, row));
        x += width;
    }
    places
}

fn draw_curves(area: &Area, lines: &[Line], y: &str, (first, last): (f64, f64)) -> Drawn {
    // Tokens, mean and standard deviation.
    let numbers = |p: &Point| {
        let deviation = p.value.deviation.unwrap_or(0.0);
        (p.tokens as f64, p.value.mean, deviation)
    };
    let points = |line: &Line| -> Vec<(f64, f64, f64)> {
        let all = line.points.iter().map(numbers);
        all.filter(|p| p.0 >= first).collect()
    };
    let shown: Vec<_> = lines.iter().map(points).collect();
    let points = shown.iter().flatten();
    let (low, high) = range(points.flat_map(|p| [p.1 - p.2, p.1 + p.2]));
    let margin = 0.05 * (high - low).max(1e-3);
    let (low, high) = (low - margin, high + margin);
    let last = if last > first { last } else { first + 1.0 };
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(first..last, low..high)?;
    let places = if high - low < 0.1 { 3 } else { 2 };
    styled(&mut chart.configure_mesh(), 13)
        .x_desc("tokens")
        .y_desc(y)
        .x_labels(6)
        .y_labels(8)
        .x_label_formatter(&|x| short_number(*x))
        // Rounding can result in a negative zero.
        .y_label_formatter(&|y| format!("{:.places$}", if y.abs() < 1e-9 { 0.0 } else { *y }))
        .draw()?;
    for (i, points) in shown.iter().enumerate() {
        if points.iter().any(|p| p.2 > 0.0) {
            let edge = |sign: f64| {
                let side = points.iter().map(|p| (p.0, p.1 + sign * p.2));
                thin(&side.collect::<Vec<_>>(), COLUMNS / 2)
            };
            let mut outline = edge(1.0);
            outline.extend(edge(-1.0).into_iter().rev());
            chart.draw_series([Polygon::new(outline, color(i).mix(0.15).filled())])?;
        }
    }
    for (i, points) in shown.iter().enumerate() {
        let mean: Vec<(f64, f64)> = points.iter().map(|p| (p.0, p.1)).collect();
        let mean = thin(&mean, COLUMNS / 2);
        chart.draw_series(LineSeries::new(mean.clone(), color(i).stroke_width(2)))?;
        if mean.len() <= 20 {
            let dots = mean.iter().map(|p| Circle::new(*p, 3, color(i).filled()));
            chart.draw_series(dots)?;
        }
    }
    Ok(())
}

/// The final losses of a group.
pub struct Row {
    pub label: String,
    pub values: Vec<f64>,
    /// Mean and standard deviation of the values.
    pub spread: Option<(f64, f64)>,
    /// Mean of the baseline's values.
    pub baseline: Option<f64>,
}

/// Divides a label into lines that fit beside the plot.
fn pieces(label: &str) -> Vec<String> {
    const WIDEST: usize = 49;
    let letters: Vec<char> = label.chars().collect();
    letters.chunks(WIDEST).map(String::from_iter).collect()
}

/// Draws for each group a dot per run, a bar at the mean, a line of one standard deviation to either side, and a hollow
/// mark at the baseline's mean. Returns SVG.
pub fn final_losses(rows: &[Row], x: &str) -> Result<String> {
    let ends = rows.iter().filter_map(|r| r.spread);
    let ends = ends.flat_map(|(mean, deviation)| [mean - deviation, mean + deviation]);
    let values = rows.iter().flat_map(|r| r.values.iter().copied());
    let (low, high) = range(values.chain(ends));
    let margin = 0.06 * (high - low).max(1e-3);
    const LABELS: usize = 9;
    // Uses as many decimals as are needed to distinguish neighbouring labels.
    let apart = (high - low + 2.0 * margin) / LABELS as f64;
    let places = (-apart.log10()).ceil().clamp(2.0, 9.0) as usize;
    let labels: Vec<Vec<String>> = rows.iter().map(|r| pieces(&r.label)).collect();
    let longest = labels.iter().flatten().map(|l| l.chars().count()).max();
    let left = (24 + 8 * longest.unwrap_or(0) as i32).max(80);
    let lines = labels.iter().map(Vec::len).max().unwrap_or(1);
    let height = 80 + (34.max(16 * lines + 8) * rows.len()) as u32;
    svg((1000, height), |area| {
        let count = rows.len() as f64;
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .margin_left(left)
            .margin_right(90)
            .x_label_area_size(44)
            .build_cartesian_2d(low - margin..high + margin, -0.5..count - 0.5)?;
        styled(&mut chart.configure_mesh(), 13)
            .disable_y_mesh()
            .x_desc(x)
            .x_labels(LABELS)
            .x_label_formatter(&|x| format!("{x:.places$}"))
            .draw()?;
        for (i, row) in rows.iter().enumerate() {
            let place = (rows.len() - 1 - i) as f64;
            let at = |x: f64, up: f64| (x, place + up);
            if let Some(base) = row.baseline {
                let dash = [at(base, -0.42), at(base, 0.42)];
                chart.draw_series([PathElement::new(dash, INK.mix(0.35).stroke_width(2))])?;
            }
            if let Some((mean, deviation)) = row.spread {
                let line = [at(mean - deviation, 0.0), at(mean + deviation, 0.0)];
                chart.draw_series([PathElement::new(line, color(i).stroke_width(2))])?;
                let bar = [at(mean, -0.28), at(mean, 0.28)];
                chart.draw_series([PathElement::new(bar, color(i).stroke_width(4))])?;
            }
            let dot = |v: &f64| Circle::new(at(*v, 0.0), 4, color(i).mix(0.6).filled());
            chart.draw_series(row.values.iter().map(dot))?;
            let edge = chart.backend_coord(&(high + margin, place));
            let top = edge.1 - 6 - 8 * (labels[i].len() as i32 - 1);
            for (line, text) in labels[i].iter().enumerate() {
                let at = (12, top + 16 * line as i32);
                area.draw(&Text::new(text.clone(), at, font(14)))?;
            }
            let value = match row.spread {
                Some((mean, _)) => format!("{mean:.4}"),
                None => "none".into(),
            };
            area.draw(&Text::new(value, (edge.0 + 10, edge.1 - 6), font(14)))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::summary::Spread;
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 512.0, 2_457_600.0, 1e10, 20_000.0, 123_456.0].map(short_number);
        assert_eq!(shown, ["0", "512", "2.46M", "10B", "20k", "123k"]);
    }

    #[test]
    fn figures_are_drawn_with_no_run_one_and_many() {
        let point = |line: usize, k: u64| Point {
            tokens: 4096 * k,
            value: Spread {
                mean: 3.0 - line as f64,
                deviation: Some(0.1),
            },
        };
        for n in [0, 1, 23] {
            let line = |i: usize| Line {
                label: format!("method {i}"),
                points: (0..n as u64).map(|k| point(i, k)).collect(),
            };
            let lines: Vec<Line> = (0..n).map(line).collect();
            let picture = curves(&lines, "loss", &[0.0, 0.5]).unwrap();
            let row = |i: usize| Row {
                label: format!("method {i}"),
                values: vec![i as f64; i],
                spread: (i > 0).then_some((i as f64, 0.1)),
                baseline: Some(1.0),
            };
            let points = final_losses(&(0..n).map(row).collect::<Vec<_>>(), "loss").unwrap();
            for svg in [picture, points] {
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
                assert!(!svg.contains("NaN"), "a coordinate is not a number");
            }
        }
    }

    #[test]
    fn a_long_label_has_several_lines() {
        let row = |label: String| Row {
            label,
            values: vec![1.0],
            spread: None,
            baseline: None,
        };
        let long = "0123456789".repeat(14);
        let svg = final_losses(&[row(long.clone()), row("short".into())], "loss").unwrap();
        for text in [&long[..49], &long[49..98], &long[98..], "short"] {
            assert!(svg.lines().any(|line| line.trim() == text), "{text}: {svg}");
        }
        assert!(!svg.contains(&long));
    }
}
