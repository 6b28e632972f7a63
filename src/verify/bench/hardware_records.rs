//! Reads the timings of `hardware-check` from before `bench` existed, ours and cuBLAS with equal groups, as records of the
//! benchmark.

use super::groups;
use super::record::{CUBLAS, Measured, OURS, Record, Records};
use crate::error::Result;
use crate::verify::bench::measure::HARDWARE_PLAN;
use crate::verify::hardware::record::{self as hardware, Ending};
use serde_json::Value;
use std::path::Path;

/// Start of the names of the tasks with timings.
pub(super) const TIMED: &str = "timed: ";

/// Returns all records of a folder: those of `bench`, and the timings of `hardware-check`.
///
/// # Errors
/// When a file cannot be read.
pub fn read_all(folder: &Path) -> Result<Records> {
    let mut records = Records::open(folder)?;
    for old in timed(folder)? {
        let case = old.task.strip_prefix(TIMED).unwrap_or_default();
        let floor = old.measured["floor_microseconds"].as_f64();
        let bytes = bytes_of(case).unwrap_or(0.0);
        let day = old.date.get(..10).unwrap_or_default();
        for (implementation, side, version) in
            [(OURS, "ours", &*old.commit), (CUBLAS, "cublas", "")]
        {
            let side = &old.measured[side];
            let Some(timing) = old_timing(side) else {
                continue;
            };
            let rate = side["tflops"].as_f64().unwrap_or(0.0) * 1e12;
            records.insert(Record {
                machine: old.gpu.clone(),
                device: "cuda".into(),
                case: case.into(),
                family: case.split(' ').next().unwrap_or_default().into(),
                implementation: implementation.into(),
                version: version.into(),
                run: format!("hardware-check, {day}"),
                date: old.date.clone(),
                flops: rate * timing.seconds,
                bytes,
                timing: Some(timing),
                floor_seconds: floor.map(|us| us * 1e-6),
                detail: "timed by hardware-check".into(),
                system: old.system.clone(),
                driver: old.driver.clone(),
                before: old.before.clone(),
                after: old.after.clone(),
            });
        }
    }
    Ok(records)
}

/// Returns the timings of `hardware-check` in the files of a folder, without failed ones.
///
/// # Errors
/// When a file cannot be read, or a line is not a record.
pub(super) fn timed(folder: &Path) -> Result<Vec<hardware::Record>> {
    let records = hardware::Records::open(folder)?;
    let timed = |record: &&hardware::Record| {
        record.task.starts_with(TIMED) && record.ending == Ending::Passed
    };
    Ok(records.iter().filter(timed).cloned().collect())
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
