//! The configurations of a grid's runs: the keys in which they differ, and the keys that are equal in all runs.

use super::grid::Plan;
use super::names::{keys, short};
use crate::report::page::{Cell, Section, Table};
use std::collections::BTreeMap;

/// Returns every key of any run with the value of each run; `None` for a run without the key.
fn all(plan: &Plan) -> BTreeMap<String, Vec<Option<String>>> {
    let mut found = BTreeMap::new();
    for (i, run) in plan.runs.iter().enumerate() {
        for (key, value) in keys(&run.config) {
            let values = found.entry(key).or_insert(vec![None; plan.runs.len()]);
            values[i] = Some(value);
        }
    }
    found
}

fn same(values: &[Option<String>]) -> bool {
    values.iter().all(|v| *v == values[0])
}

/// Returns a section with the keys in which two runs differ.
pub fn differences(plan: &Plan) -> Section {
    let all = all(plan);
    let differing = || all.iter().filter(|(_, values)| !same(values));
    let mut table = Table::new(&["run"]);
    let names = differing().map(|(key, _)| key.clone().into());
    table.columns.extend(names);
    for (i, run) in plan.runs.iter().enumerate() {
        let mut row: Vec<Cell> = vec![run.name.clone().into()];
        row.extend(differing().map(|(_, values)| match &values[i] {
            Some(value) => value.as_str().into(),
            None => Cell::Number(None),
        }));
        table.rows.push(row);
    }
    let axes: Vec<&str> = plan.axes.iter().map(|a| short(a)).collect();
    Section {
        name: "differences",
        title: "Differences between the configurations",
        shows: "Every key in which two of the runs differ, and the value in each run.",
        notes: vec![format!("Axes of the grid: {}.", axes.join(", "))],
        table,
        ..Section::default()
    }
}

/// Returns a section with the keys that are equal in all runs.
pub fn shared(plan: &Plan) -> Section {
    let mut table = Table::new(&["key", "value"]);
    for (key, values) in all(plan) {
        if let (true, Some(Some(value))) = (same(&values), values.first()) {
            table.rows.push(vec![key.into(), value.as_str().into()]);
        }
    }
    Section {
        name: "configuration",
        title: "Settings that all runs share",
        shows: "Every key that has the same value in all runs.",
        table,
        ..Section::default()
    }
}
