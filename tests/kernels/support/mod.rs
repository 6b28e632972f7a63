//! What the kernel tests share: the library's cases run on the simulator, and ways to run a launcher under one schedule
//! after another.
#![allow(dead_code)]

pub mod refusals;
pub mod schedules;
pub mod tape;

use routegrad::kernels::cost::Cost;
use routegrad::verify::kernels::{Case, Problem, Simulator, cases};
use schedules::{counted, is_plain, schedules};

/// The simulator, or the instrumented build that ROUTEGRAD_SIM_LIBRARY names.
pub fn simulator() -> Simulator {
    Simulator::new().unwrap_or_else(|e| panic!("{e}"))
}

/// What the problem's outputs hold after one run; guard bands and inputs are as they were.
pub fn outputs(problem: &Problem) -> Vec<Vec<u8>> {
    problem
        .outputs(&simulator())
        .unwrap_or_else(|e| panic!("{e}"))
}

/// Runs the problem and holds it against its reference.
pub fn check(problem: &Problem) {
    problem
        .check(&simulator())
        .unwrap_or_else(|e| panic!("{e}"));
}

/// The cases of a launcher; the instrumented builds are slow and run the small ones.
fn cases_of(launcher: &str) -> Vec<Case> {
    let wanted = |case: &Case| case.launcher == launcher && (case.small || is_plain());
    let cases: Vec<Case> = cases().into_iter().filter(wanted).collect();
    assert!(!cases.is_empty(), "{launcher} has no case");
    cases
}

/// The problems of the launcher's small cases, or of its others.
pub fn problems_of(launcher: &str, small: bool) -> impl Iterator<Item = Problem> {
    let wanted = move |case: &Case| case.small == small;
    let makers = cases_of(launcher).into_iter().filter(wanted);
    makers
        .flat_map(|case| case.problems)
        .map(|make| make().unwrap_or_else(|e| panic!("{e}")))
}

/// Every problem of the launcher agrees with its reference.
pub fn check_cases(launcher: &str) {
    for make in cases_of(launcher).iter().flat_map(|case| &case.problems) {
        check(&make().unwrap_or_else(|e| panic!("{e}")));
    }
}

/// Every small problem of the launcher gives the same bytes, which agree, under every schedule.
pub fn check_schedules(launcher: &str) {
    let cases = cases_of(launcher);
    for make in cases
        .iter()
        .filter(|case| case.small)
        .flat_map(|case| &case.problems)
    {
        let problem = make().unwrap_or_else(|e| panic!("{e}"));
        let first = outputs(&problem);
        problem.judged(&first).unwrap_or_else(|e| panic!("{e}"));
        for schedule in schedules() {
            let other = schedule.run(|| outputs(&problem));
            assert!(other == first, "{} under {schedule:?}", problem.label);
        }
    }
}

/// What the simulator counts of one run is the formula's: operations exactly, bytes within 2 percent. The instrumented
/// builds count the same, slowly.
pub fn counts_agree(problem: &Problem, cost: Cost) {
    if !is_plain() {
        return;
    }
    let counters = counted(|| drop(outputs(problem)));
    let (flops, bytes) = (
        counters.tensor_flops as f64,
        (counters.bytes_read + counters.bytes_written) as f64,
    );
    let label = &problem.label;
    assert_eq!(flops, cost.flops, "{label}: operations");
    assert!(
        (bytes - cost.bytes).abs() <= 0.02 * cost.bytes,
        "{label}: {bytes} bytes, {} by the formula",
        cost.bytes
    );
}
