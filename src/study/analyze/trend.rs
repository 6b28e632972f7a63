//! The default vectors over the steps of training: the scale of the default vectors and the similarity of the
//! estimators at the model's own K, from every analysis in the folder of a run, as one CSV file and one figure.

use super::estimators::ESTIMATORS;
use super::figures::{Chart, Mark, Series, charts};
use super::sections::SCALE;
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::page::Table;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Numbers of a layer after a step, in the order of [`columns`].
type Row = Vec<Option<f64>>;

/// Returns the names of the numbers: those of the scale, then the cosine of dW of each estimator.
fn columns() -> Vec<String> {
    let scale = SCALE.iter().map(|name| name.to_string());
    let cosines = ESTIMATORS.iter().map(|name| format!("cosine_dw of {name}"));
    scale.chain(cosines).collect()
}

/// Writes `gradients-over-training.csv` and `.svg` to `folder`, from the files `step-N/analysis.json` in it. Writes
/// nothing if there are no such files.
///
/// # Errors
/// Returns an error when a file cannot be read or written.
pub fn write(folder: &Path) -> Result<()> {
    let steps = read(folder)?;
    if steps.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&["step", "moe_layer"]);
    table.columns.extend(columns().into_iter().map(Into::into));
    for (step, layers) in &steps {
        for (layer, row) in layers.iter().enumerate() {
            let mut cells = vec![(*step).into(), layer.into()];
            cells.extend(row.iter().map(|x| (*x).into()));
            table.rows.push(cells);
        }
    }
    let name = |extension: &str| folder.join(format!("gradients-over-training.{extension}"));
    publish(&name("csv"), table.csv())?;
    match figure(&steps)? {
        Some(figure) => publish(&name("svg"), figure),
        None => Ok(()),
    }
}

/// Reads the rows of all MoE layers after each analyzed step.
fn read(folder: &Path) -> Result<BTreeMap<u64, Vec<Row>>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))?;
    let mut steps = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io("read", folder, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let file = path.join("analysis.json");
        let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) else {
            continue;
        };
        if !file.exists() {
            continue;
        }
        let text = fs::read_to_string(&file).map_err(|e| Error::io("read", &file, e))?;
        let report: Value = serde_json::from_str(&text).map_err(|e| {
            Error::file(
                &file,
                "the JSON of an analysis",
                e.to_string(),
                "remove the folder",
            )
        })?;
        let rows = rows_of(&report);
        if !rows.is_empty() {
            steps.insert(step, rows);
        }
    }
    Ok(steps)
}

/// Returns the numbers of the layers at the model's own K. An analysis of an earlier version of the program has none.
fn rows_of(report: &Value) -> Vec<Row> {
    let table = |name: &str| -> Vec<&Value> {
        let analyses = report["analyses"].as_array().into_iter().flatten();
        let found = analyses.filter(|a| a["name"] == name);
        let rows = found.filter_map(|a| a["table"]["rows"].as_array());
        rows.flatten()
            .filter(|row| row[1] == report["top_k"])
            .collect()
    };
    let estimators = table("estimator-similarity");
    let layer = |scale: &&Value| {
        let scales = (0..SCALE.len()).map(|i| scale[2 + i].as_f64());
        let cosines = ESTIMATORS.iter().map(|name| {
            let mut rows = estimators.iter();
            let row = rows.find(|row| row[0] == scale[0] && row[2] == *name);
            row.and_then(|row| row[3].as_f64())
        });
        scales.chain(cosines).collect()
    };
    table("default-vector-scale").iter().map(layer).collect()
}

/// Draws a panel for each MoE layer, with c* of dz and the cosines of dW.
fn figure(steps: &BTreeMap<u64, Vec<Row>>) -> Result<Option<String>> {
    let layers = steps.values().map(Vec::len).max().unwrap_or(0);
    let series = |layer: usize, column: usize, name: &str| Series {
        name: name.into(),
        points: steps
            .iter()
            .map(|(step, rows)| {
                let value = rows.get(layer).and_then(|row| row[column]);
                (*step as usize, value)
            })
            .collect(),
    };
    let first = SCALE.len();
    let panel = |layer: usize| {
        let scale = std::iter::once(series(layer, 0, "c*"));
        let cosines = ESTIMATORS[..ESTIMATORS.len() - 1].iter().enumerate();
        let cosines = cosines.map(|(n, name)| series(layer, first + n, &format!("cos, {name}")));
        Chart {
            caption: format!("MoE layer {layer}"),
            series: scale.chain(cosines).collect(),
        }
    };
    let panels: Vec<Chart> = (0..layers).map(panel).collect();
    charts(&panels, ["step", ""], Mark::Line)
}
