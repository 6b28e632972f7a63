//! Reads the timings of `hardware-check` from before `bench` existed, ours and cuBLAS with equal groups, as records of the
//! benchmark.

use super::groups;
use super::record::{CUBLAS, Measured, OURS, Record, Records};
use crate::error::{Error, Result};
use crate::verify::bench::measure::HARDWARE_PLAN;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Returns all records of a folder: those of `bench`, and the timings of `hardware-check`.
///
/// # Errors
/// When a file cannot be read.
pub fn read_all(folder: &Path) -> Result<Records> {
    let mut records = Records::open(folder)?;
    for value in timed(folder)? {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let task = text("task");
        let case = task.strip_prefix("timed: ").unwrap_or_default();
        let measured = &value["measured"];
        for (implementation, side) in [(OURS, "ours"), (CUBLAS, "cublas")] {
            let Some(timing) = old_timing(&measured[side]) else {
                continue;
            };
            let floor = measured["floor_microseconds"].as_f64().map(|us| us * 1e-6);
            let rate = measured[side]["tflops"].as_f64().unwrap_or(0.0) * 1e12;
            let flops = rate * timing.seconds;
            records.insert(Record {
                machine: text("gpu"),
                device: "cuda".into(),
                case: case.into(),
                family: case.split(' ').next().unwrap_or_default().into(),
                implementation: implementation.into(),
                version: if side == "ours" {
                    text("commit")
                } else {
                    String::new()
                },
                run: format!(
                    "hardware-check, {}",
                    &text("date").get(..10).unwrap_or_default()
                ),
                date: text("date"),
                flops,
                bytes: bytes_of(case).unwrap_or(0.0),
                timing: Some(timing),
                floor_seconds: floor,
                detail: "timed by hardware-check".into(),
                system: text("system"),
                driver: text("driver"),
                before: value["before"].clone(),
                after: value["after"].clone(),
            });
        }
    }
    Ok(records)
}

/// Returns the timings of `hardware-check` in the files of a folder, without failed ones.
///
/// # Errors
/// When a file cannot be read, or a line is not a record.
pub(super) fn timed(folder: &Path) -> Result<Vec<Value>> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("hardware-") || !name.ends_with(".jsonl") {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        for (i, line) in text.lines().enumerate() {
            let value: Value = serde_json::from_str(line).map_err(|e| {
                let place = format!("line {}: {e}", i + 1);
                Error::file(&path, "one record a line", place, "remove the line")
            })?;
            let task = value["task"].as_str().unwrap_or_default();
            if task.starts_with("timed: ") && value["ending"] == "passed" {
                found.push(value);
            }
        }
    }
    Ok(found)
}

fn old_timing(side: &Value) -> Option<Measured> {
    let numbers = |key: &str, unit: f64| -> Option<Vec<f64>> {
        let all = side[key].as_array()?.iter();
        all.map(|x| Some(x.as_f64()? * unit)).collect()
    };
    // A product is timed with one plan, which the records do not repeat.
    let count = |key: &str, plan: usize| side[key].as_u64().map_or(plan, |n| n as usize);
    let passes = numbers("microseconds_of_each_pass", 1e-6)?;
    Some(Measured {
        seconds: passes.iter().copied().reduce(f64::min)?,
        spread: numbers("spread_of_each_pass", 1.0)?,
        passes,
        samples: count("samples", HARDWARE_PLAN.samples),
        launches: count("launches", HARDWARE_PLAN.launches),
        sets: 0,
        graph: false,
    })
}

/// Returns the minimum number of bytes that a case must move.
fn bytes_of(name: &str) -> Option<f64> {
    let groups = groups::groups().into_iter();
    let mut cases = groups.filter_map(|group| group.cases().ok()).flatten();
    Some(cases.find(|case| case.name == name)?.bytes())
}
