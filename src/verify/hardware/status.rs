//! Tables that show, for kernels and complete steps, what the records prove.

use super::code::code;
use super::kind::Kind;
use super::record::{Ending, Record, Records};
use super::task::{self, Task};
use crate::device::Device;
use crate::error::Result;
use crate::report::page;
use crate::verify::kernels;
use std::path::Path;

/// The header with the list of launchers.
const HEADER: &str = include_str!("../../../kernels/routegrad.h");

/// Returns the launchers in the order of the header, without those that only test single instructions or faults.
fn launchers() -> Vec<&'static str> {
    let rows = HEADER
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("X("));
    rows.filter_map(|row| row.split(',').next())
        .filter(|name| !name.starts_with("unit_") && *name != "name")
        .collect()
}

/// Returns a Markdown table with one row per kernel. "Proven" counts the tasks that have passed on a GPU with the code of
/// this build; "measured" is the best rate over all shapes, with its share of the floor and its ratio to cuBLAS.
pub fn table(records: &Records) -> String {
    let queue = task::queue(Device::Cuda);
    let mut text = String::from(
        "| kernel | reference | simulator | compiled | proven on GPU | measured |\n|---|---|---|---|---|---|\n",
    );
    let with_cases: Vec<&str> = kernels::cases().iter().map(|case| case.launcher).collect();
    for launcher in launchers()
        .into_iter()
        .filter(|launcher| with_cases.contains(launcher))
    {
        let tasks: Vec<&Task> = queue
            .iter()
            .filter(|task| task.launcher == Some(launcher))
            .collect();
        let compiled = match tasks.first().and_then(|task| code(task.source)) {
            Some(_) => built_for(),
            None => "not in this build".into(),
        };
        // Every case has a float64 or exact reference, and the tests run every case on the simulator.
        let cells = [
            &format!("`{launcher}`"),
            "yes",
            "yes",
            &compiled,
            &proven(&tasks, records),
            &measured(&tasks, records),
        ];
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text
}

/// Returns the architectures for which the kernels of this build are compiled, such as "sm_80, sm_90a".
fn built_for() -> String {
    let archs = crate::device::built_for().map(|arch| format!("sm_{arch}"));
    archs.collect::<Vec<_>>().join(", ")
}

/// Returns a Markdown table with one row per task of complete steps, with the latest record of this build's code on each
/// GPU.
pub fn steps(records: &Records) -> String {
    let mut text = String::from("| whole steps | on | ending | what it saw |\n|---|---|---|---|\n");
    let queue = task::queue(Device::Cuda);
    for task in queue.iter().filter(|task| task.launcher.is_none()) {
        let mut rows = current(task, records).peekable();
        if rows.peek().is_none() {
            text += &format!("| {} | no | | |\n", task.name());
        }
        for record in rows {
            let (ending, date) = (super::label(record.ending), &record.date);
            let (name, gpu, detail) = (&record.task, &record.gpu, &record.detail);
            text += &format!("| {name} | {gpu} | {ending}, {date} | {detail} |\n");
        }
    }
    text
}

/// Returns the records of one task with the code of this build.
fn current<'a>(task: &'a Task, records: &'a Records) -> impl Iterator<Item = &'a Record> {
    let (name, code) = (task.name(), code(task.source));
    records
        .iter()
        .filter(move |record| record.task == name && Some(&record.code) == code.as_ref())
}

fn proven(tasks: &[&Task], records: &Records) -> String {
    let needed: Vec<&&Task> = tasks
        .iter()
        .filter(|task| matches!(task.kind, Kind::Agrees | Kind::Replays))
        .collect();
    let mut gpus: Vec<&str> = records.iter().map(|record| record.gpu.as_str()).collect();
    gpus.dedup(); // they are sorted
    let mut cells = Vec::new();
    for gpu in gpus {
        let count = |ending| {
            needed
                .iter()
                .filter(|task| current(task, records).any(|r| r.gpu == gpu && r.ending == ending))
                .count()
        };
        let (passed, failed) = (
            count(Ending::Passed),
            count(Ending::Failed) + count(Ending::TimedOut),
        );
        match (passed, failed) {
            (0, 0) => {}
            (_, 0) if passed == needed.len() => cells.push(gpu.to_string()),
            (_, 0) => cells.push(format!("{gpu}: {passed} of {}", needed.len())),
            _ => cells.push(format!("{gpu}: {failed} of {} fail", needed.len())),
        }
    }
    if cells.is_empty() {
        "no".into()
    } else {
        cells.join("; ")
    }
}

fn measured(tasks: &[&Task], records: &Records) -> String {
    let timed = tasks.iter().filter(|task| task.kind == Kind::Timed);
    let passed = timed
        .flat_map(|task| current(task, records))
        .filter(|record| record.ending == Ending::Passed);
    let best = passed
        .filter_map(|record| Some((record.measured["ours"]["tflops"].as_f64()?, record)))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let Some((tflops, record)) = best else {
        return "no".into();
    };
    let share = record.measured["ours"]["share_of_floor"]
        .as_f64()
        .unwrap_or(f64::NAN);
    let mut cell = format!("{tflops:.0} TFLOP/s, {:.0}% of the floor", 100.0 * share);
    if let Some(ratio) = record.measured["ratio_to_cublas"].as_f64() {
        cell += &format!(", {ratio:.2} × cuBLAS");
    }
    cell
}

const BEGIN: &str = "<!-- kernel status: routegrad status --update writes what follows -->";
const END: &str = "<!-- end of kernel status -->";

/// Replaces the table between the two marks of a page.
///
/// # Errors
/// When the page cannot be read or written, or has no marks.
pub fn update(page: &Path, table: &str) -> Result<()> {
    page::replace_between(page, [BEGIN, END], table)
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn nothing_is_proven_without_records_and_every_kernel_with_cases_has_a_row() {
        let records = Records::open(Path::new("/nonexistent")).unwrap();
        let table = table(&records);
        for launcher in [
            "dispatch_choices",
            "grouped_gemm_forward",
            "grouped_gemm_weight_gradient",
        ] {
            let row = table.lines().find(|line| line.contains(launcher)).unwrap();
            assert!(row.ends_with("| no | no |"), "{row}");
        }
        assert!(!table.contains("unit_"));
        let steps = steps(&records);
        assert!(
            steps.contains("| trains: 7.33b default | no | | |"),
            "{steps}"
        );
        assert!(!steps.contains("grouped_gemm"), "{steps}");
    }

    #[test]
    fn a_kernel_is_proven_when_every_case_passed_with_this_code() {
        if !cfg!(routegrad_cuda) {
            return; // without compiled code nothing can be proven
        }
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(folder.path()).unwrap();
        let queue = task::queue(Device::Cuda);
        let tasks: Vec<&Task> = queue
            .iter()
            .filter(|task| task.launcher == Some("dispatch_positive"))
            .collect();
        let record = |task: &Task, code: &str| record(&task.name(), code, "");
        let code = &code("dispatch").unwrap();
        let needed: Vec<&&Task> = tasks
            .iter()
            .filter(|t| matches!(t.kind, Kind::Agrees | Kind::Replays))
            .collect();
        for task in &needed {
            records.insert(record(task, "of an older build"));
        }
        for task in &needed[1..] {
            records.insert(record(task, code));
        }
        assert_eq!(
            proven(&tasks, &records),
            format!("NVIDIA H200: {} of {}", needed.len() - 1, needed.len())
        );
        let passed = record(needed[0], code);
        records.insert(passed.clone());
        assert_eq!(proven(&tasks, &records), "NVIDIA H200");
        records.insert(Record {
            ending: Ending::Failed,
            ..passed
        });
        assert_eq!(
            proven(&tasks, &records),
            format!("NVIDIA H200: 1 of {} fail", needed.len())
        );
    }

    #[test]
    fn a_page_keeps_the_text_around_the_table() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("README.md");
        std::fs::write(&page, format!("before\n{BEGIN}\nold\n{END}\nafter\n")).unwrap();
        update(&page, "| new |\n").unwrap();
        assert_eq!(
            std::fs::read_to_string(&page).unwrap(),
            format!("before\n{BEGIN}\n| new |\n{END}\nafter\n")
        );
        std::fs::write(&page, "no marks").unwrap();
        assert!(
            update(&page, "")
                .unwrap_err()
                .to_string()
                .contains("kernel status")
        );
    }
}
