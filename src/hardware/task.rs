//! What there is to prove and to measure on a GPU, most important first.

use super::timing;
use crate::check::kernels::{self, Case};

/// What is asked of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every problem agrees with its reference, and a second run gives the same bytes.
    Agrees,
    /// Captured as a graph and replayed, it gives the bytes of the eager run.
    Replays,
    /// `compute-sanitizer --tool memcheck` finds nothing.
    Memcheck,
    /// `compute-sanitizer --tool racecheck` finds nothing.
    Racecheck,
    /// How fast, beside cuBLAS.
    Timed,
}

impl Kind {
    fn verb(self) -> &'static str {
        match self {
            Kind::Agrees => "agrees",
            Kind::Replays => "replays",
            Kind::Memcheck => "memcheck",
            Kind::Racecheck => "racecheck",
            Kind::Timed => "timed",
        }
    }
}

/// One line of the queue.
#[derive(Clone, Debug)]
pub struct Task {
    pub kind: Kind,
    /// Name of the case.
    pub case: String,
    pub launcher: &'static str,
    /// The `.cu` file whose code it depends on.
    pub source: &'static str,
    /// Seconds that it should take, start of the process included.
    pub estimate: f64,
}

impl Task {
    /// Unique; part of the key of its record.
    pub fn name(&self) -> String {
        format!("{}: {}", self.kind.verb(), self.case)
    }

    /// Seconds after which it hangs.
    pub fn limit(&self) -> f64 {
        30.0 + 5.0 * self.estimate
    }
}

/// The whole queue: single instructions, then the kernels' cases; graphs; instruments; timings.
pub fn queue() -> Vec<Task> {
    let cases = kernels::cases();
    let of = |kind, case: &Case, estimate| Task {
        kind,
        case: case.name.clone(),
        launcher: case.launcher,
        source: case.source,
        estimate,
    };
    let mut tasks = Vec::new();
    // Seconds: opening the GPU takes about one, a small problem a few milliseconds, a covering one its float64 reference.
    let estimate =
        |case: &Case| 1.5 + case.problems.len() as f64 * if case.small { 0.01 } else { 0.1 };
    tasks.extend(
        cases
            .iter()
            .map(|case| of(Kind::Agrees, case, estimate(case))),
    );
    let small = || cases.iter().filter(|case| case.small);
    tasks.extend(small().map(|case| of(Kind::Replays, case, 1.0 + estimate(case))));
    // An instrument takes seconds to start and slows kernels a hundredfold and more.
    for kind in [Kind::Memcheck, Kind::Racecheck] {
        tasks.extend(small().map(|case| of(kind, case, 8.0 + 20.0 * (estimate(case) - 1.5))));
    }
    tasks.extend(timing::cases().into_iter().map(|case| Task {
        kind: Kind::Timed,
        launcher: case.product.launcher(),
        source: "grouped_gemm",
        estimate: case.estimate(),
        case: case.name,
    }));
    tasks
}

/// The hash of the compiled code of a `.cu` file; none in a build without nvcc.
pub fn code(source: &str) -> Option<&'static str> {
    let hashes = option_env!("ROUTEGRAD_CODE")?;
    hashes
        .split(';')
        .find_map(|entry| entry.strip_prefix(source)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_instructions_come_first() {
        let queue = queue();
        let names: std::collections::BTreeSet<String> = queue.iter().map(Task::name).collect();
        assert_eq!(names.len(), queue.len());
        let last_unit = queue
            .iter()
            .rposition(|t| t.kind == Kind::Agrees && t.source == "unit");
        let first_kernel = queue.iter().position(|t| t.source != "unit");
        assert!(last_unit < first_kernel, "{last_unit:?} {first_kernel:?}");
        assert_eq!(queue[0].launcher, "unit_wgmma");
        assert_eq!(queue.last().map(|t| t.kind), Some(Kind::Timed));
    }

    #[test]
    fn every_task_names_a_source_that_is_compiled() {
        for task in queue() {
            assert!(
                std::path::Path::new("kernels")
                    .join(task.source)
                    .with_extension("cu")
                    .is_file(),
                "{}",
                task.name()
            );
            if cfg!(routegrad_cuda) {
                assert_eq!(code(task.source).map(str::len), Some(16), "{}", task.name());
            }
        }
    }
}
