//! Runs one task in the process that was started for it.

use super::kind::Kind;
use super::outcome::Outcome;
use super::place::Place;
use super::record::Ending;
use super::steps::{self, StepCase, planned};
use super::{benchmark, connects, determinism, loss_parity, no_host_sync, resume, scales};
use super::{task, throughput};
use crate::error::{Error, Result};

/// Runs the task called `name` and prints its outcome.
///
/// # Errors
/// When the outcome cannot be printed.
pub fn run(name: &str, place: &Place) -> Result<()> {
    let outcome = outcome(name, place).unwrap_or_else(|why| Outcome::new(Ending::Failed, why));
    let line = serde_json::to_string(&outcome);
    say!(
        "{}",
        line.map_err(|e| Error::io("write", "the outcome", e.into()))?
    );
    Ok(())
}

fn outcome(name: &str, place: &Place) -> Result<Outcome, String> {
    let task = task::queue(place.device)
        .into_iter()
        .find(|task| task.name() == name)
        .ok_or(format!("there is no task \"{name}\""))?;
    if task.launcher.is_some() {
        return of_kernel(&task);
    }
    if task.kind == Kind::Bench {
        return benchmark::check(place).map_err(|e| e.to_string());
    }
    let case = steps::cases(place.device)
        .into_iter()
        .find(|case| case.kind == task.kind && case.name == task.case)
        .ok_or("there is no such case")?;
    whole_steps(&case, place).map_err(|e| e.to_string())
}

/// Runs a task of complete steps.
///
/// # Errors
/// When a step fails.
fn whole_steps(case: &StepCase, place: &Place) -> Result<Outcome> {
    let config = case.config(place.device)?;
    match case.kind {
        Kind::Resume => return resume::check(case, place),
        Kind::Scales => return scales::check(case, place),
        _ => {}
    }
    place.device.prepare()?;
    if let Err(why) = crate::device::reserve(place.device, planned(&config)? as usize) {
        return Ok(Outcome::new(Ending::Unavailable, why.to_string()));
    }
    match case.kind {
        Kind::NoHostSync => no_host_sync::check(config, place.planted),
        Kind::Determinism => determinism::check(&config, case.steps, place.planted),
        Kind::LossParity => loss_parity::check(case, place),
        Kind::Connects => connects::check(&config, case.steps, place.planted),
        Kind::Throughput => throughput::time(config, case.steps, place.planted),
        _ => Err(Error::invalid(
            "hardware-check",
            "a kind of whole steps",
            case.name.as_str(),
            "a bug",
        )),
    }
}

#[cfg(not(feature = "cuda"))]
fn of_kernel(_task: &task::Task) -> Result<Outcome, String> {
    super::place::gpu_name().map(|gpu| Outcome::new(Ending::Failed, gpu))
}

#[cfg(feature = "cuda")]
fn of_kernel(task: &task::Task) -> Result<Outcome, String> {
    use super::timing;
    use crate::device::Device;
    use crate::verify::bench::case::Work;
    let gpu = crate::device::cuda::gpu().map_err(|e| e.to_string())?;
    let no_case = "there is no such case";
    if task.kind == Kind::Timed {
        let group = timing::group_of(&task.case).ok_or(no_case)?;
        let (detail, measured) = match &group.work {
            Work::Gemm { product, shape } => timing::product(gpu, *product, shape)?,
            _ => timing::attention_of(&group, &task.case, Device::Cuda)
                .map_err(|e| e.to_string())?
                .ok_or(no_case)?,
        };
        return Ok(Outcome::judged(None, detail, measured));
    }
    let case = crate::verify::kernels::cases()
        .into_iter()
        .find(|case| case.name == task.case)
        .ok_or(no_case)?;
    if case.source == "unit" && !crate::kernels::launchers::on_hopper() {
        let why = "single instructions of Hopper, which this GPU does not have";
        return Ok(Outcome::new(Ending::Unavailable, why));
    }
    match task.kind {
        Kind::Replays => cases::replays(gpu, &case),
        _ => cases::agrees(gpu, &case),
    }
}

#[cfg(feature = "cuda")]
mod cases {
    use super::{Ending, Outcome};
    use crate::device::cuda::Gpu;
    use crate::verify::kernels::{Case, Errors, Run};
    use serde_json::json;

    /// Runs every problem twice: results must be within the bounds, and the bytes must be equal.
    pub fn agrees(gpu: &Gpu, case: &Case) -> Result<Outcome, String> {
        let mut errors = Errors::default();
        let mut worst_relative = 0.0f64;
        for make in &case.problems {
            let problem = make().map_err(|e| e.to_string())?;
            let mut run = Run::new(gpu, &problem).map_err(|e| e.to_string())?;
            let first = run.fresh_outputs()?;
            let judged = problem.judged(&first)?;
            worst_relative = worst_relative.max(judged.relative());
            errors.merge(judged);
            if run.fresh_outputs()? != first {
                return Err(format!("{}: a second run gives other bytes", problem.label));
            }
        }
        let problems = case.problems.len();
        let measured = json!({
            "problems": problems, "values": errors.values, "worst_share_of_bound": errors.worst(),
            "worst_relative_error": worst_relative,
        });
        let values = errors.values;
        let detail = format!("{problems} problems, {values} values, equal bytes twice");
        Ok(Outcome::judged(None, detail, measured))
    }

    /// Captures every problem and replays it twice: the bytes must be those of the eager run.
    pub fn replays(gpu: &Gpu, case: &Case) -> Result<Outcome, String> {
        for make in &case.problems {
            let problem = make().map_err(|e| e.to_string())?;
            let label = &problem.label;
            let text = |e: crate::error::Error| format!("{label}: {e}");
            let mut run = Run::new(gpu, &problem).map_err(text)?;
            let eager = run.fresh_outputs()?;
            run.reset().map_err(text)?;
            let untouched = run.outputs()?;
            let graph = gpu.capture(|| run.launch()).map_err(text)?;
            if run.outputs()? != untouched {
                return Err(format!("{label}: the captured launch ran at once"));
            }
            for _ in 0..2 {
                run.reset().map_err(text)?;
                gpu.replay(&graph).map_err(text)?;
                if run.outputs()? != eager {
                    return Err(format!(
                        "{label}: the graph gives other bytes than the launch"
                    ));
                }
            }
        }
        let detail = format!("{} problems captured, replayed twice", case.problems.len());
        Ok(Outcome::new(Ending::Passed, detail))
    }
}
