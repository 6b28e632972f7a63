//! `tasks.svg`: benchmark scores over the steps.

use super::{Area, Drawn, FONT, font, grouped, styled};
use crate::report::metrics::Record;
use plotters::prelude::*;
use std::collections::BTreeMap;

/// Returns the accuracy of each task over the steps, in percent: `acc_norm` if the task has it, otherwise `acc`.
fn series(records: &[Record]) -> BTreeMap<&str, Vec<(f64, f64)>> {
    let mut found: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for record in records {
        for (task, scores) in &record.tasks {
            let score = scores.get("acc_norm").or_else(|| scores.get("acc"));
            let points = found.entry(task).or_default();
            points.extend(score.map(|s| (record.step as f64, 100.0 * s)));
        }
    }
    found.retain(|_, points| !points.is_empty());
    found
}

/// Draws a line for each task, labelled at its end.
pub(super) fn draw(area: &Area, records: &[Record]) -> Drawn {
    let series = series(records);
    let last = records.last().map_or(1.0, |r| r.step as f64);
    let scores = || series.values().flatten().map(|(_, y)| *y);
    let (low, high) = (scores().fold(100.0, f64::min), scores().fold(0.0, f64::max));
    let mut chart = ChartBuilder::on(area)
        .caption("Benchmark scores", font(22))
        .margin(16)
        .margin_right(150)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, (low - 2.0).max(0.0)..(high + 2.0).min(100.0))?;
    styled(&mut chart.configure_mesh(), 14)
        .x_desc("step")
        .y_desc("acc_norm, or acc, in percent")
        .x_label_formatter(&|x| grouped(*x))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    let mut ends = Vec::new();
    for (i, (task, points)) in series.iter().enumerate() {
        let color = HSLColor(i as f64 / series.len() as f64, 0.8, 0.38).to_rgba();
        chart.draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?;
        chart.draw_series(points.iter().map(|p| Circle::new(*p, 3, color.filled())))?;
        if let Some((_, score)) = points.last() {
            let (x, y) = chart.backend_coord(&(last, *score));
            ends.push((y, x, format!("{task} {score:.1}"), color));
        }
    }
    // Labels from top to bottom; labels that would overlap are moved apart.
    ends.sort_by_key(|end| end.0);
    let mut free = i32::MIN;
    for (y, x, name, color) in ends {
        let y = y.max(free);
        free = y + 16;
        let font = (FONT, 14).into_font().color(&color);
        area.draw(&Text::new(name, (x + 8, y - 7), font))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::tests::record;

    #[test]
    fn acc_norm_is_preferred_to_acc() {
        let scores = |acc_norm: Option<f64>| {
            let named = [("acc", Some(0.25)), ("acc_norm", acc_norm)];
            let there = named
                .into_iter()
                .filter_map(|(n, v)| Some((n.to_owned(), v?)));
            there.collect::<BTreeMap<_, _>>()
        };
        let mut records = vec![record(1), record(2)];
        records[1].tasks = BTreeMap::from([
            ("boolq".into(), scores(None)),
            ("piqa".into(), scores(Some(0.5))),
        ]);
        let found = series(&records);
        assert_eq!(found["boolq"], [(2.0, 25.0)]);
        assert_eq!(found["piqa"], [(2.0, 50.0)]);
        let svg = super::super::svg((960, 540), |area| draw(area, &records)).unwrap();
        assert!(svg.contains("piqa 50.0") && !svg.contains("NaN"));
    }
}
