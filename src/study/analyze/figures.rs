//! Draws the figures: panels of lines, bars or heatmaps, as SVG.

use crate::error::Result;
use crate::report::plots::{Area, Drawn, GRID, TRAIN, VALIDATION, diverging, font, styled, svg};
use plotters::prelude::*;

/// Colors of the series; further series repeat them. The first two are the colors of a run's loss curves.
const COLORS: [RGBColor; 7] = [
    TRAIN,
    VALIDATION,
    RGBColor(27, 143, 96),
    RGBColor(148, 92, 180),
    RGBColor(200, 155, 20),
    RGBColor(120, 120, 120),
    RGBColor(214, 70, 130),
];

/// One series: a value at each x, none where it is not defined.
pub struct Series {
    pub name: String,
    pub points: Vec<(usize, Option<f64>)>,
}

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Line,
    Bar,
}

/// A panel of series, at integer values of x.
pub struct Chart {
    pub caption: String,
    pub series: Vec<Series>,
}

/// The labels of the axes x and y of all panels.
pub type Axes<'a> = [&'a str; 2];

fn color(i: usize) -> RGBColor {
    COLORS[i % COLORS.len()]
}

/// Returns the rows and columns of a grid of panels, with at most `across` columns.
fn grid(panels: usize, across: usize) -> (usize, usize) {
    let columns = panels.clamp(1, across);
    (panels.div_ceil(columns).max(1), columns)
}

/// Draws charts in a grid; none without charts. All have the same range of y, which includes 0.
pub fn charts(charts: &[Chart], axes: Axes, mark: Mark) -> Result<Option<String>> {
    let Some(first) = charts.first() else {
        return Ok(None);
    };
    let (rows, columns) = grid(charts.len(), 3);
    let values = || {
        let series = charts.iter().flat_map(|c| &c.series);
        series.flat_map(|s| s.points.iter().filter_map(|p| p.1))
    };
    let low = values().fold(0.0, f64::min);
    let high = values().fold(0.0, f64::max);
    let high = match high > low {
        true => high + 0.06 * (high - low),
        false => 1.0,
    };
    let low = match low < 0.0 {
        true => low - 0.06 * (high - low),
        false => 0.0,
    };
    let names = &first.series;
    let width = 320 * columns.max(2) as u32;
    let places = legend(names, width as i32);
    let header_height = 36 + places.last().map_or(0, |(_, top)| *top);
    let size = (width, 4 + header_height as u32 + 250 * rows as u32);
    let picture = svg(size, |area| {
        let (header, panels) = area.split_vertically(header_height);
        for ((i, series), (left, top)) in names.iter().enumerate().zip(&places) {
            let (left, top) = (*left, 12 + *top);
            let (corners, color) = ([(left, top), (left + 14, top + 14)], color(i));
            header.draw(&Rectangle::new(corners, color.filled()))?;
            header.draw(&Text::new(series.name.clone(), (left + 20, top), font(14)))?;
        }
        for (chart, panel) in charts.iter().zip(panels.split_evenly((rows, columns))) {
            draw_chart(&panel, chart, axes, mark, (low, high))?;
        }
        Ok(())
    })?;
    Ok(Some(picture))
}

/// Returns the position (left, top) of the name of each series, in pixels. The names are in columns that are 150 pixels
/// wide, or wider if the longest name needs it.
fn legend(names: &[Series], width: i32) -> Vec<(i32, i32)> {
    let longest = names.iter().map(|s| s.name.chars().count() as i32);
    let column = longest.max().map_or(150, |n| (40 + 7 * n).max(150));
    let across = ((width - 16) / column).max(1);
    (0..names.len() as i32)
        .map(|i| (16 + column * (i % across), 20 * (i / across)))
        .collect()
}

fn draw_chart(
    panel: &Area,
    chart: &Chart,
    [x, y]: Axes,
    mark: Mark,
    (low, high): (f64, f64),
) -> Drawn {
    let points = || chart.series.iter().flat_map(|s| &s.points);
    let first = points().map(|p| p.0).min().unwrap_or(0) as f64;
    let last = points().map(|p| p.0).max().unwrap_or(0) as f64;
    let mut context = ChartBuilder::on(panel)
        .caption(&chart.caption, font(15))
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(first - 0.6..last + 0.6, low..high)?;
    styled(&mut context.configure_mesh(), 12)
        .disable_x_mesh()
        .x_desc(x)
        .y_desc(y)
        .x_labels((last - first + 1.0).min(9.0) as usize)
        .y_labels(6)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    let width = 0.8 / chart.series.len().max(1) as f64;
    for (i, series) in chart.series.iter().enumerate() {
        let (color, points) = (color(i), series.points.iter());
        let known = points.filter_map(|(x, y)| Some((*x as f64, (*y)?)));
        match mark {
            Mark::Line => {
                let points: Vec<(f64, f64)> = known.collect();
                context.draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?;
                context.draw_series(points.iter().map(|p| Circle::new(*p, 3, color.filled())))?;
            }
            Mark::Bar => {
                context.draw_series(known.map(|(x, y)| {
                    let left = x - 0.4 + width * i as f64;
                    Rectangle::new([(left, 0.0), (left + 0.95 * width, y)], color.filled())
                }))?;
            }
        }
    }
    Ok(())
}

/// A matrix of values, none where they are not defined.
pub struct Heatmap {
    pub caption: String,
    pub rows: Vec<String>,
    pub columns: Vec<String>,
    pub values: Vec<Vec<Option<f64>>>,
}

/// Draws heatmaps in a grid; none without heatmaps. `color` maps a value to a number from −1 (blue) over 0 (white) to 1
/// (orange); `scale` is the text that explains these colors.
pub fn heatmaps(
    maps: &[Heatmap],
    axes: Axes,
    scale: &str,
    color: fn(f64) -> f64,
) -> Result<Option<String>> {
    if maps.is_empty() {
        return Ok(None);
    }
    let labels = maps.iter().flat_map(|m| &m.rows).map(|r| r.chars().count());
    let left = 30 + 7 * labels.max().unwrap_or(0).min(28) as u32;
    let most = |f: fn(&Heatmap) -> usize| maps.iter().map(f).max().unwrap_or(1).max(1) as u32;
    let (tall, wide) = (most(|m| m.rows.len()), most(|m| m.columns.len()));
    let cell = (260 / wide).clamp(8, 34);
    let across = (1100 / (left + cell * wide + 20)).max(1) as usize;
    let (rows, columns) = grid(maps.len(), across);
    let panel = (left + cell * wide + 20, 66 + cell * tall);
    let width = (panel.0 * columns as u32).max(420);
    let size = (width, 34 + panel.1 * rows as u32);
    let picture = svg(size, |area| {
        area.draw(&Text::new(scale, (12, 10), font(14)))?;
        for (i, map) in maps.iter().enumerate() {
            let (row, column) = ((i / columns) as u32, (i % columns) as u32);
            let at = ((panel.0 * column) as i32, (34 + panel.1 * row) as i32);
            draw_heatmap(area, map, axes, at, left as i32, cell as i32, color)?;
        }
        Ok(())
    })?;
    Ok(Some(picture))
}

/// Shortens a name to at most 28 characters: of a longer name, such as a path, it keeps the end.
fn shortened(name: &str) -> String {
    match name.chars().count().checked_sub(28) {
        None | Some(0) => name.into(),
        Some(more) => format!("…{}", name.chars().skip(more + 1).collect::<String>()),
    }
}

fn draw_heatmap(
    area: &Area,
    map: &Heatmap,
    [x_name, y_name]: Axes,
    (x, y): (i32, i32),
    left: i32,
    cell: i32,
    color: fn(f64) -> f64,
) -> Drawn {
    area.draw(&Text::new(map.caption.clone(), (x + left, y), font(15)))?;
    let top = y + 22;
    for (r, (name, values)) in map.rows.iter().zip(&map.values).enumerate() {
        let row = top + cell * r as i32;
        let cut = shortened(name);
        if cell >= 11 || r % 2 == 0 {
            area.draw(&Text::new(cut, (x + 22, row + cell / 2 - 6), font(12)))?;
        }
        for (c, value) in values.iter().enumerate() {
            let corner = (x + left + cell * c as i32, row);
            let fill = value.map_or(GRID, |v| diverging(color(v)));
            let square = [corner, (corner.0 + cell, corner.1 + cell)];
            area.draw(&Rectangle::new(square, fill.filled()))?;
            if let (Some(value), true) = (value, cell >= 28) {
                let style = match color(*value).abs() > 0.6 {
                    true => font(11).color(&WHITE),
                    false => font(11),
                };
                let at = (corner.0 + 4, row + cell / 2 - 5);
                area.draw(&Text::new(format!("{value:.2}"), at, style))?;
            }
        }
    }
    let bottom = top + cell * map.rows.len() as i32 + 3;
    for (c, name) in map.columns.iter().enumerate() {
        if cell >= 14 || c % 4 == 0 {
            let at = (x + left + cell * c as i32 + cell / 3, bottom);
            area.draw(&Text::new(name.clone(), at, font(12)))?;
        }
    }
    area.draw(&Text::new(x_name, (x + left, bottom + 14), font(13)))?;
    let turned = font(13).transform(FontTransform::Rotate270);
    area.draw(&Text::new(y_name, (x + 6, bottom - 4), turned))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_keeps_its_end() {
        assert_eq!(shortened("documents 1–19"), "documents 1–19");
        let long = "CC-MAIN-2024-10/part-00000-of-00512.parquet";
        assert!(
            shortened(long).starts_with('…') && long.ends_with(&shortened(long)['…'.len_utf8()..])
        );
        assert_eq!(shortened(long).chars().count(), 28);
        assert_eq!(shortened(&"é".repeat(28)), "é".repeat(28));
    }

    #[test]
    fn numbers_on_dark_cells_are_white() {
        let map = |value: f64| {
            let map = Heatmap {
                caption: String::new(),
                rows: vec!["row".into()],
                columns: vec!["0".into()],
                values: vec![vec![Some(value)]],
            };
            heatmaps(&[map], ["", ""], "", |v| v).unwrap().unwrap()
        };
        let white = |svg: String| {
            let mut texts = svg.split("<text").skip(1);
            texts.any(|text| text.contains("fill=\"#FFFFFF\""))
        };
        assert!(white(map(-0.9)) && white(map(0.9)) && !white(map(0.1)));
    }
}
