//! Checks a step from the host's side. After the first steps, a step allocates no memory, does not wait, and passes the
//! same addresses to its kernels as the previous step; a step with non-finite values changes no state; and the memory
//! equals the planned amount.

use super::outcome::Outcome;
use super::steps::{
    WARM, first_difference, memory_judged, planned, strict_trainer, uncaptured, unplanned,
};
use crate::config::Config;
use crate::device::counters::{self, Counters};
use crate::device::take_peak;
use crate::error::Result;
use crate::train::Trainer;
use crate::train::step::StepReport;
use serde_json::{Value, json};

/// Runs the steps and checks them.
///
/// # Errors
/// When a step fails.
pub fn check(config: Config, planted: bool) -> Result<Outcome> {
    let planned = planned(&config)?;
    let (device, graph) = (config.train.device, config.train.graph);
    take_peak(device);
    let before = take_peak(device);
    let mut training = strict_trainer(config)?;
    let held = planted.then(|| unplanned(&training)).transpose()?;
    for _ in 0..WARM {
        training.step()?;
    }
    let one = counted(&mut training, planted)?.0;
    let next = counted(&mut training, planted)?.0;
    let peak = (take_peak(device) - before) as u64;
    drop(held);
    let (memory, unfit) = memory_judged(peak, planned);
    let (refusal, traces) = not_finite(&mut training, planted)?;
    let uncaptured = uncaptured(&training);
    let wrong = [uncaptured, unsteady(one, next, graph), unfit, traces];
    let measured = json!({
        "step": of(one), "next_step": of(next), "refused": refusal,
        "peak_bytes": peak, "planned_bytes": planned,
    });
    let did = match graph {
        true => "replayed".to_string(),
        false => format!("{} launches", one.launches),
    };
    let right = format!(
        "{did}, no wait, nothing allocated, the same addresses; a NaN leaves no trace; {memory}"
    );
    Ok(Outcome::judged(
        wrong.into_iter().flatten(),
        right,
        measured,
    ))
}

fn of(c: Counters) -> Value {
    json!({
        "launches": c.launches, "allocations": c.allocations, "reads": c.reads, "waits": c.waits, "uploads": c.uploads, "replays": c.replays,
        "addresses": format!("{:016x}", c.addresses),
    })
}

/// Runs a step and returns its counters up to its report. `planted`: the host reads a weight in the meantime.
fn counted(training: &mut Trainer, planted: bool) -> Result<(Counters, StepReport)> {
    counters::take();
    let launched = training.launch()?;
    if planted {
        training.model.parameters[0].value.bytes(0..1)?;
    }
    let counted = counters::take();
    Ok((counted, training.finish(launched)?))
}

fn unsteady(one: Counters, next: Counters, graph: bool) -> Option<String> {
    let quiet = (one.reads, one.waits, one.allocations) == (0, 0, 0);
    let (done, how) = match graph {
        true => (one.replays == 1 && one.launches == 0, "replay its graph"),
        false => (one.replays == 0 && one.launches > 0, "launch its kernels"),
    };
    (!quiet || !done || one != next).then(|| {
        format!(
            "a step should {how}, read, wait for and allocate nothing, and repeat its addresses: {one:?}, then {next:?}"
        )
    })
}

/// Returns the reason why a step with a NaN was skipped, and an error if the step changed state. `planted`: a weight is
/// changed after the step.
fn not_finite(training: &mut Trainer, planted: bool) -> Result<(Option<String>, Option<String>)> {
    // The embedding of a token that the second micro-batch reads.
    let tokens = training.next_batch().tokens;
    let (width, token) = (
        training.model.config().hidden,
        tokens[tokens.len() / 2 + 5] as usize,
    );
    let embedding = &mut training.model.parameters[0].value;
    let kept = embedding.clone();
    embedding.change(|w| w.slice_mut::<f32>()[token * width] = f32::NAN);
    let before = training.digests()?;
    let refused = counted(training, false)?.1.skipped;
    if planted {
        let weight = &mut training.model.parameters[1].value;
        weight.change(|w| w.slice_mut::<f32>()[0] += 1.0);
    }
    let after = training.digests()?;
    let wrong = match (&refused, first_difference(&before, &after)) {
        (None, _) => Some("a step with a NaN in the embedding was accepted".into()),
        (_, Some(name)) => Some(format!("a refused step changed: {name}")),
        _ => None,
    };
    // The next step must be the same as if the skipped step had not happened.
    training.model.parameters[0].value = kept;
    training.step()?;
    Ok((refused, wrong))
}
