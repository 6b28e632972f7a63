//! What the runs of a grid were told: where their configurations differ, and what they share.

use super::grid::Plan;
use super::names::keys;
use super::names::short;
use crate::report::page::{Cell, Section, Table};
use std::collections::BTreeMap;

/// Every key of any run, with each run's value, none where it lacks the key.
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

/// The keys in which two runs differ.
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
        shows: "Every key in which two of the runs differ, and each run's value.",
        formula: "",
        notes: vec![format!("Axes of the grid: {}.", axes.join(", "))],
        table,
        figure: None,
    }
}

/// The keys that are the same in all runs.
pub fn shared(plan: &Plan) -> Section {
    let mut table = Table::new(&["key", "value"]);
    for (key, values) in all(plan) {
        if let (true, Some(Some(value))) = (same(&values), values.first()) {
            table.rows.push(vec![key.into(), value.as_str().into()]);
        }
    }
    Section {
        name: "configuration",
        title: "What all runs share",
        shows: "Every key that is the same in all of them.",
        formula: "",
        notes: Vec::new(),
        table,
        figure: None,
    }
}
