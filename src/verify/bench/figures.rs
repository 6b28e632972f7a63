//! The figures of a benchmark as SVG: a roofline plot of all kernels, and bars with ratios to a peer.

use super::ceilings::Ceilings;
use super::record::{Record, View};
use crate::error::Result;
use crate::report::plots::{Area, Drawn, GRID, INK, font, styled, svg};
use plotters::prelude::*;
use std::collections::BTreeMap;

/// Kinds of kernels with their colours, in the order of the legend.
const KINDS: [(&str, RGBColor); 6] = [
    ("forward product", RGBColor(31, 103, 168)),
    ("input gradient", RGBColor(27, 140, 110)),
    ("weight gradient", RGBColor(217, 95, 2)),
    ("MoE layer", RGBColor(117, 72, 160)),
    ("attention", RGBColor(190, 40, 80)),
    ("other", RGBColor(110, 110, 110)),
];

fn kind(family: &str) -> usize {
    match family {
        "grouped_gemm_forward" | "linear" => 0,
        "grouped_gemm_input_gradient" => 1,
        "grouped_gemm_weight_gradient" => 2,
        "attention_forward" | "attention_backward" | "attention" => 4,
        "experts" => 3,
        _ if family.contains("layer_") => 3,
        _ => 5,
    }
}

/// Returns the coordinates of a record: FLOPs per byte, and TFLOP/s. A kernel without products has the x coordinate 1, and
/// as its y coordinate its TB/s.
fn point(record: &Record) -> Option<(f64, f64)> {
    match record.tflops() {
        Some(tflops) if record.bytes > 0.0 => Some((record.flops / record.bytes, tflops)),
        _ if record.flops == 0.0 => Some((1.0, record.terabytes()?)),
        _ => None,
    }
}

/// Draws a roofline plot of all measured kernels.
///
/// # Errors
/// When the figure cannot be drawn.
pub fn roofline(view: &View, ceilings: &Ceilings) -> Result<String> {
    let points: Vec<(usize, (f64, f64))> = view
        .ours()
        .filter_map(|record| Some((kind(&record.family), point(record)?)))
        .collect();
    svg((960, 560), |area| draw_roofline(area, &points, ceilings))
}

fn draw_roofline(area: &Area, points: &[(usize, (f64, f64))], ceilings: &Ceilings) -> Drawn {
    let (flops, bytes) = (ceilings.flops / 1e12, ceilings.bytes / 1e12);
    let ridge = flops / bytes;
    let all = |of: fn(&(f64, f64)) -> f64| points.iter().map(move |p| of(&p.1));
    let right = all(|p| p.0).fold(4.0 * ridge, f64::max) * 1.5;
    let low = all(|p| p.1).fold(0.5 * bytes, f64::min) / 2.0;
    let mut chart = ChartBuilder::on(area)
        .caption("Roofline of the kernels", font(22))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d((0.5..right).log_scale(), (low..3.0 * flops).log_scale())?;
    let number = |x: &f64| {
        if *x >= 1.0 {
            format!("{x:.0}")
        } else {
            format!("{x}")
        }
    };
    styled(&mut chart.configure_mesh(), 14)
        .x_desc("FLOPs per byte (1 for kernels without products)")
        .y_desc("TFLOP/s (without products: TB/s)")
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .draw()?;
    let roof = [(0.5, 0.5 * bytes), (ridge, flops), (right, flops)];
    chart.draw_series(LineSeries::new(roof, INK.stroke_width(2)))?;
    let label = format!("{flops:.3} TFLOP/s, {bytes:.3} TB/s");
    let at = chart.backend_coord(&(right, flops));
    area.draw(&Text::new(label, (at.0 - 190, at.1 - 22), font(14)))?;
    for (number, (name, color)) in KINDS.iter().enumerate() {
        let of_kind: Vec<(f64, f64)> = points
            .iter()
            .filter(|p| p.0 == number)
            .map(|p| p.1)
            .collect();
        if of_kind.is_empty() {
            continue;
        }
        let fill = color.mix(0.75).filled();
        chart
            .draw_series(of_kind.iter().map(|&p| Circle::new(p, 5, fill)))?
            .label(*name)
            .legend(move |(x, y)| Circle::new((x + 10, y), 5, fill));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.9))
        .border_style(GRID)
        .label_font(font(15))
        .margin(12)
        .draw()?;
    Ok(())
}

/// Ratios of one shape: (kind, how many times as fast as the peer).
type Bars = Vec<(usize, f64)>;

/// Returns the shapes for which both implementations were measured, sorted by name.
pub fn ratios(view: &View, peer: &str) -> BTreeMap<String, Bars> {
    let mut shapes: BTreeMap<String, Bars> = BTreeMap::new();
    for record in view.ours() {
        let Some(ratio) = view.ratio(&record.case, peer) else {
            continue;
        };
        let kind = kind(&record.family);
        let shape = record
            .case
            .strip_prefix(record.family.as_str())
            .unwrap_or(&record.case);
        // Families without a kind of their own are named in the label.
        let shape = match kind {
            0..=2 => shape.trim().to_owned(),
            _ => record.case.clone(),
        };
        shapes.entry(shape).or_default().push((kind, ratio));
    }
    for bars in shapes.values_mut() {
        bars.sort_by_key(|bar| bar.0);
    }
    shapes
}

/// Draws bars with the ratios to one peer, a group of bars per shape; returns `None` if no case was measured for both.
///
/// # Errors
/// When the figure cannot be drawn.
pub fn bars(view: &View, peer: &str) -> Result<Option<String>> {
    let shapes = ratios(view, peer);
    if shapes.is_empty() {
        return Ok(None);
    }
    let rows: usize = shapes.values().map(|bars| bars.len() + 1).sum();
    let height = 110 + ROW * rows as u32;
    let longest = shapes.keys().map(|shape| shape.chars().count()).max();
    // A line of labels is 13 pixels high; the legend needs the full width.
    let left = (30 + 8 * longest.unwrap_or(0) as i32).max(180);
    let size = ((left + WIDTH + 70) as u32, height);
    svg(size, |area| draw_bars(area, &shapes, peer, left)).map(Some)
}

/// Height in pixels of a bar with its gap, and length of the longest bar.
const ROW: u32 = 12;
const WIDTH: i32 = 640;

/// Draws the bars; they begin `left` pixels from the edge.
fn draw_bars(area: &Area, shapes: &BTreeMap<String, Bars>, peer: &str, left: i32) -> Drawn {
    let all = || shapes.values().flatten();
    let largest = all().map(|bar| bar.1).fold(1.0, f64::max) * 1.1;
    let x = |ratio: f64| left + (ratio / largest * f64::from(WIDTH)) as i32;
    area.draw(&Text::new(
        format!("Speed relative to {peer}"),
        (20, 14),
        font(22),
    ))?;
    let bottom = area.dim_in_pixel().1 as i32 - 30;
    // Draws a line at each tenth of a power of ten, or at a multiple of it, so that there are about eight.
    let step = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 50.0];
    let step = step
        .into_iter()
        .find(|s| largest / s <= 12.0)
        .unwrap_or(100.0);
    for i in 0..=(largest / step) as usize {
        let at = x(i as f64 * step);
        let style = if (i as f64 * step - 1.0).abs() < 1e-9 {
            INK.stroke_width(2)
        } else {
            GRID.stroke_width(1)
        };
        area.draw(&PathElement::new([(at, 66), (at, bottom)], style))?;
        let digits = if step < 0.5 { 2 } else { 1 };
        area.draw(&Text::new(
            format!("{:.digits$}", i as f64 * step),
            (at - 10, bottom + 6),
            font(13),
        ))?;
    }
    let mut place = 20;
    for (number, (name, color)) in KINDS.iter().enumerate() {
        if all().any(|bar| bar.0 == number) {
            area.draw(&Rectangle::new(
                [(place, 48), (place + 14, 58)],
                color.filled(),
            ))?;
            area.draw(&Text::new(*name, (place + 20, 45), font(14)))?;
            place += 130;
        }
    }
    let mut y = 70;
    for (shape, bars) in shapes {
        let middle = y + ROW as i32 * bars.len() as i32 / 2 - 7;
        area.draw(&Text::new(shape.as_str(), (20, middle), font(13)))?;
        for (kind, ratio) in bars {
            let bar = [(left, y), (x(*ratio), y + ROW as i32 - 2)];
            area.draw(&Rectangle::new(bar, KINDS[*kind].1.filled()))?;
            // Places the text beside the line at 1 so that it does not cover the line.
            let end = x(*ratio);
            let at = if end < x(1.0) && end + 30 > x(1.0) {
                x(1.0)
            } else {
                end
            };
            let label = Text::new(format!("{ratio:.2}"), (at + 4, y - 1), font(11));
            area.draw(&label)?;
            y += ROW as i32;
        }
        y += ROW as i32;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::record::OURS;
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn the_y_coordinate_of_a_kernel_without_products_is_its_bandwidth() {
        let mut copy = record("norm_forward x", OURS, 1e-3);
        copy.flops = 0.0;
        assert_eq!(point(&copy), Some((1.0, 1.0)));
        assert_eq!(
            point(&record("grouped_gemm_forward x", OURS, 2e-3)),
            Some((1000.0, 500.0))
        );
        assert_eq!(point(&record("grouped_gemm_forward x", OURS, -1.0)), None);
    }

    #[test]
    fn bars_are_grouped_by_shape_and_products_share_one_group() {
        let all: Vec<Record> = [
            "grouped_gemm_weight_gradient a",
            "grouped_gemm_forward a",
            "combine b",
            "combine c",
        ]
        .into_iter()
        .map(|case| record(case, OURS, 1.0))
        .chain([
            record("grouped_gemm_weight_gradient a", "p", 0.5),
            record("grouped_gemm_forward a", "p", 2.0),
            record("combine b", "p", 3.0),
        ])
        .collect();
        let view = View(all.iter().collect());
        let shapes: Vec<(String, Bars)> = ratios(&view, "p").into_iter().collect();
        let expected = [
            ("a".to_owned(), vec![(0, 2.0), (2, 0.5)]),
            ("combine b".to_owned(), vec![(5, 3.0)]),
        ];
        assert_eq!(shapes, expected);
        assert!(bars(&view, "nobody").unwrap().is_none());
        let picture = bars(&view, "p").unwrap().unwrap();
        assert!(picture.contains("Speed relative to p") && !picture.contains("NaN"));
        // The bars begin after the longest name.
        let long = "default_layer_backward sonic 4096 x 1024 64c4";
        let all = [record(long, OURS, 1.0), record(long, "p", 3.0)];
        let picture = bars(&View(all.iter().collect()), "p").unwrap().unwrap();
        assert!(picture.starts_with("<svg width=\"1100\""), "{picture}");
    }

    #[test]
    fn the_roofline_is_drawn_for_any_measurements() {
        let ceilings = Ceilings {
            flops: crate::device::machine::H200_FLOPS_PER_SECOND,
            bytes: crate::device::machine::H200_BYTES_PER_SECOND,
            of: String::new(),
        };
        for seconds in [-1.0, 1e-3, 1e-9] {
            let one = record("grouped_gemm_forward x", OURS, seconds);
            let picture = roofline(&View(vec![&one]), &ceilings).unwrap();
            assert!(picture.starts_with("<svg") && !picture.contains("NaN"));
        }
    }
}
