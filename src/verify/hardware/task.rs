//! The list of everything to prove and measure on a GPU, most important first.

use super::benchmark;
use super::code::STEP;
use super::kind::Kind;
use super::steps::{self, StepCase};
use super::timing;
use crate::device::Device;
use crate::verify::bench::case::Work;
use crate::verify::kernels::{self, Case};

/// One task of the queue.
#[derive(Clone, Debug)]
pub struct Task {
    /// What the task checks or measures.
    pub kind: Kind,
    /// Name of the case.
    pub case: String,
    /// The launcher, if the task checks a single kernel.
    pub launcher: Option<&'static str>,
    /// The `.cu` file on whose code the task depends, or [`STEP`].
    pub source: &'static str,
    /// What the machine must have in addition to the GPU.
    pub needs: String,
    /// Estimated time in seconds, including the start of the process.
    pub estimate: f64,
}

impl Task {
    /// Returns the unique name of the task, which is part of the key of its record.
    pub fn name(&self) -> String {
        format!("{}: {}", self.kind.verb(), self.case)
    }

    /// Returns the time in seconds after which the task is considered to hang.
    pub fn limit(&self) -> f64 {
        30.0 + 5.0 * self.estimate
    }

    fn of_kernel(kind: Kind, case: &Case) -> Self {
        // Seconds with an H200: opening the GPU, small problems of some milliseconds, and large ones with a float64
        // reference.
        let of_problem = if case.small { 0.005 } else { 0.03 };
        let seconds = 0.4 + case.problems.len() as f64 * of_problem;
        // The sanitizers slow down a kernel, racecheck by far the most.
        let (needs, slower) = match kind {
            Kind::Memcheck => ("compute-sanitizer", 1.5),
            Kind::Racecheck => ("compute-sanitizer", 8.0),
            _ => ("", 1.0),
        };
        Task {
            kind,
            case: case.name.clone(),
            launcher: Some(case.launcher),
            source: case.source,
            needs: needs.into(),
            estimate: slower * seconds,
        }
    }

    fn of_step(case: StepCase) -> Self {
        Task {
            kind: case.kind,
            needs: case.needs(),
            case: case.name,
            launcher: None,
            source: STEP,
            estimate: case.estimate,
        }
    }
}

/// Returns all tasks for a GPU: single instructions, then the kernels' cases; graphs; complete steps; memory accesses;
/// timings of steps and kernels; the benchmark; races. For the simulator, only complete steps and the benchmark at small
/// sizes, since the tests run the kernels there.
pub fn queue(device: Device) -> Vec<Task> {
    let (correct, timed): (Vec<StepCase>, Vec<StepCase>) = steps::cases(device)
        .into_iter()
        .partition(|case| !matches!(case.kind, Kind::Throughput | Kind::Resume));
    let (correct, timed) = (correct.into_iter(), timed.into_iter());
    let (correct, timed) = (correct.map(Task::of_step), timed.map(Task::of_step));
    let mut tasks = Vec::new();
    if device == Device::Sim {
        tasks.extend(correct.chain(timed));
        tasks.push(bench("small", 10.0));
        return tasks;
    }
    let cases = kernels::cases();
    let all = cases.iter().map(|case| Task::of_kernel(Kind::Agrees, case));
    let of_small = |kind| {
        let small = cases.iter().filter(|case| case.small);
        small.map(move |case| Task::of_kernel(kind, case))
    };
    tasks.extend(all);
    tasks.extend(of_small(Kind::Replays));
    tasks.extend(correct);
    tasks.extend(of_small(Kind::Memcheck));
    tasks.extend(timed);
    tasks.extend(timings());
    // Starting its parts and writing the report take additional time.
    tasks.push(bench("core", benchmark::SECONDS + 30.0));
    tasks.extend(of_small(Kind::Racecheck));
    tasks
}

fn timings() -> Vec<Task> {
    let tasks = timing::groups().into_iter().flat_map(|group| {
        // Unsupported sizes cause an error when the task runs.
        let cases = group.cases().unwrap_or_default().into_iter();
        cases.map(move |case| {
            let (source, needs) = match group.work {
                Work::Gemm { .. } => ("grouped_gemm", "cuBLAS, to compare with"),
                _ => ("attention", ""),
            };
            Task {
                kind: Kind::Timed,
                launcher: Some(case.family),
                source,
                needs: needs.into(),
                estimate: timing::estimate(&group, &case),
                case: case.name,
            }
        })
    });
    tasks.collect()
}

fn bench(set: &str, estimate: f64) -> Task {
    Task {
        kind: Kind::Bench,
        case: format!("{set} set"),
        launcher: None,
        source: STEP,
        needs: "Python with PyTorch, for the peers".into(),
        estimate,
    }
}

#[cfg(test)]
mod tests {
    use super::super::code::code;
    use super::*;

    #[test]
    fn names_are_unique_and_instructions_come_first() {
        let queue = queue(Device::Cuda);
        let names: std::collections::BTreeSet<String> = queue.iter().map(Task::name).collect();
        assert_eq!(names.len(), queue.len());
        let last_unit = queue
            .iter()
            .rposition(|t| t.kind == Kind::Agrees && t.source == "unit");
        let first_kernel = queue.iter().position(|t| t.source != "unit");
        assert!(last_unit < first_kernel, "{last_unit:?} {first_kernel:?}");
        assert_eq!(queue[0].launcher, Some("unit_wgmma"));
        // The kinds are in the order of their definition, so that correctness comes before speed.
        let kinds: Vec<Kind> = queue.iter().map(|t| t.kind).collect();
        assert!(kinds.windows(2).all(|w| w[0] as u8 <= w[1] as u8));
        assert_eq!(kinds.last(), Some(&Kind::Racecheck));
    }

    #[test]
    fn every_task_names_code_that_is_compiled() {
        for task in queue(Device::Cuda) {
            let file = std::path::Path::new("kernels").join(task.source);
            let known = task.source == STEP || file.with_extension("cu").is_file();
            assert!(known, "{}", task.name());
            if cfg!(routegrad_cuda) {
                let code = code(task.source);
                assert_eq!(code.map(|c| c.len()), Some(16), "{}", task.name());
            }
        }
    }

    #[test]
    fn every_kind_without_another_test_runs_on_the_simulator() {
        let kinds = |device| -> Vec<Kind> { queue(device).iter().map(|t| t.kind).collect() };
        let rehearsed = kinds(Device::Sim);
        for kind in kinds(Device::Cuda) {
            let of_a_kernel = matches!(
                kind,
                Kind::Agrees | Kind::Replays | Kind::Memcheck | Kind::Racecheck | Kind::Timed
            );
            assert!(of_a_kernel || rehearsed.contains(&kind), "{kind:?}");
        }
    }
}
