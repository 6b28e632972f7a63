//! A step as the host sees it: after the first ones it asks for no memory, waits for nothing and gives its kernels the
//! addresses of the step before; a step that is not finite leaves no trace; the memory is what was planned.

use super::one::Outcome;
use super::steps::{memory_judged, planned, unplanned};
use crate::config::Config;
use crate::device::counters::{self, Counters};
use crate::device::take_peak;
use crate::error::Result;
use crate::step::StepReport;
use crate::training::Training;
use serde_json::{Value, json};

/// Takes the steps and judges them.
///
/// # Errors
/// When a step cannot be taken.
pub fn check(config: Config, planted: bool) -> Result<Outcome> {
    let planned = planned(&config);
    let device = config.train.device;
    take_peak(device);
    let before = take_peak(device);
    let mut training = Training::new(config)?;
    let held = planted.then(|| unplanned(&training)).transpose()?;
    for _ in 0..2 {
        training.step()?;
    }
    let third = counted(&mut training, planted)?.0;
    let fourth = counted(&mut training, planted)?.0;
    let peak = (take_peak(device) - before) as u64;
    drop(held);
    let (memory, unfit) = memory_judged(peak, planned);
    let (refusal, traces) = not_finite(&mut training, planted)?;
    let wrong: Vec<String> = [unsteady(third, fourth), unfit, traces]
        .into_iter()
        .flatten()
        .collect();
    let measured = json!({
        "third_step": of(third), "fourth_step": of(fourth), "refused": refusal,
        "peak_bytes": peak, "planned_bytes": planned,
    });
    let launches = third.launches;
    let right = format!(
        "{launches} launches, no wait, nothing allocated, the same addresses; a NaN leaves no trace; {memory}"
    );
    Ok(Outcome::judged(wrong, right, measured))
}

fn of(c: Counters) -> Value {
    json!({
        "launches": c.launches, "allocations": c.allocations, "reads": c.reads, "waits": c.waits, "uploads": c.uploads,
        "addresses": format!("{:016x}", c.addresses),
    })
}

/// A step, with what it counted up to its report. `planted`: the host reads a weight meanwhile.
fn counted(training: &mut Training, planted: bool) -> Result<(Counters, StepReport)> {
    counters::take();
    let launched = training.launch()?;
    if planted {
        training.model.parameters[0].value.bytes(0..1)?;
    }
    let counted = counters::take();
    Ok((counted, training.report(launched)?))
}

fn unsteady(third: Counters, fourth: Counters) -> Option<String> {
    let quiet = (third.reads, third.waits, third.allocations) == (0, 0, 0);
    (!quiet || third != fourth || third.launches == 0).then(|| {
        format!("a step should read, wait for and allocate nothing, and repeat its addresses: {third:?}, then {fourth:?}")
    })
}

/// What a step with a NaN was refused for, and what is wrong where it left a trace. `planted`: a weight is changed behind it.
fn not_finite(training: &mut Training, planted: bool) -> Result<(Option<String>, Option<String>)> {
    // The embedding of a token that the second micro-batch reads.
    let tokens = training.tokens();
    let (width, token) = (
        training.model.config().hidden,
        tokens[tokens.len() / 2 + 5] as usize,
    );
    let embedding = &mut training.model.parameters[0].value;
    let kept = embedding.clone();
    embedding.change(|w| w.slice_mut::<f32>()[token * width] = f32::NAN);
    let before = training.digests()?;
    let refused = counted(training, false)?.1.refused;
    if planted {
        let weight = &mut training.model.parameters[1].value;
        weight.change(|w| w.slice_mut::<f32>()[0] += 1.0);
    }
    let after = training.digests()?;
    let changed = before.iter().zip(&after).find(|(a, b)| a != b);
    let wrong = match (&refused, changed) {
        (None, _) => Some("a step with a NaN in the embedding was accepted".into()),
        (_, Some(((name, _), _))) => Some(format!("a refused step changed: {name}")),
        _ => None,
    };
    // And the next one is as if nothing had been.
    training.model.parameters[0].value = kept;
    training.step()?;
    Ok((refused, wrong))
}
