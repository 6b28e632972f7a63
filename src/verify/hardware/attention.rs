//! Times attention, forward and backward, with the shapes of the models: with as many key heads as query heads, as in the
//! presets, and with a quarter of them.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::attention::AttentionSizes;
use crate::kernels::cost::Cost;
use crate::verify::bench::case::{Case, Group, Set, Work};
use crate::verify::bench::measure::Timing;
use crate::verify::bench::timed;
use serde_json::{Value, json};

/// Tokens per launch, and channels of all query heads: the attention of 7.33b.
const TOKENS: usize = 16_384;
const CHANNELS: usize = 2048;

/// Returns groups with sequences of 2048 and 8192 tokens, and heads of width 64 and 128.
pub fn groups() -> Vec<Group> {
    let mut groups = Vec::new();
    for queries_a_key in [1, 4] {
        for (sequence, width) in [(2048, 64), (2048, 128), (8192, 64), (8192, 128)] {
            let heads = CHANNELS / width;
            let sizes = AttentionSizes {
                sequences: TOKENS / sequence,
                sequence,
                heads,
                key_value_heads: heads / queries_a_key,
                width,
            };
            let name = match queries_a_key {
                1 => format!("{sequence} x {width}"),
                _ => format!(
                    "{sequence} x {width} grouped {heads} on {}",
                    sizes.key_value_heads
                ),
            };
            groups.push(group(name, sizes));
        }
    }
    groups
}

fn group(name: String, sizes: AttentionSizes) -> Group {
    Group {
        name,
        set: Set::Core,
        work: Work::Attention(sizes),
    }
}

/// Returns the cases of forward and backward for each group; a case's name begins with the launcher's name.
///
/// # Errors
/// As [`Group::cases`].
pub fn cases() -> Result<Vec<Case>> {
    let cases = groups()
        .iter()
        .map(Group::cases)
        .collect::<Result<Vec<_>>>()?;
    Ok(cases.into_iter().flatten().collect())
}

/// Times the case called `name`. Returns a sentence and the measurements.
///
/// # Errors
/// When there is no such case, or it cannot run.
pub fn time(name: &str, device: Device) -> Result<(String, Value)> {
    for group in groups() {
        if let Some(found) = time_in(&group, name, device)? {
            return Ok(found);
        }
    }
    Err(Error::invalid(
        "hardware-check",
        "a case of attention",
        name,
        "see --list",
    ))
}

/// Times a case of a group; returns `None` if it is not a case of this group.
fn time_in(group: &Group, name: &str, device: Device) -> Result<Option<(String, Value)>> {
    let wanted = |case: &Case| case.name == name;
    let mut found = None;
    if group.cases()?.iter().any(wanted) {
        timed::visit(group, device, &wanted, &mut |mut ready| {
            let timings = ready.time()?;
            found = Some(report(&ready.cases[0], &timings[0], ready.sets));
            Ok(())
        })?;
    }
    Ok(found)
}

/// Returns the results in the format that `timing` uses for a product.
fn report(case: &Case, timing: &Timing, sets: usize) -> (String, Value) {
    let seconds = timing.seconds();
    let floor: f64 = case.costs.iter().map(Cost::floor).sum();
    let tflops = case.flops / seconds / 1e12;
    let each = |of: fn(&(f64, f64)) -> f64| timing.passes.iter().map(of).collect::<Vec<_>>();
    let ours = json!({
        "microseconds_of_each_pass": each(|p| p.0 * 1e6), "spread_of_each_pass": each(|p| p.1),
        "tflops": tflops, "share_of_floor": floor / seconds, "samples": timing.plan.samples, "launches": timing.plan.launches,
    });
    let detail = format!(
        "{:.0} us, {tflops:.0} TFLOP/s of the causal half, {:.0}% of the floor",
        seconds * 1e6,
        100.0 * floor / seconds
    );
    let measured = json!({
        "ours": ours, "floor_microseconds": floor * 1e6, "flops": case.flops, "bytes": case.bytes(), "sets": sets,
    });
    (detail, measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_timed_on_the_simulator_and_reported_in_causal_flops() {
        let sizes = AttentionSizes {
            sequences: 1,
            sequence: 128,
            heads: 4,
            key_value_heads: 1,
            width: 64,
        };
        let group = group("128 x 64 grouped 4 on 1".into(), sizes);
        for (direction, products) in [("forward", 2.0), ("backward", 5.0)] {
            let name = format!("attention_{direction} {}", group.name);
            let (detail, measured) = time_in(&group, &name, Device::Sim).unwrap().unwrap();
            assert!(detail.contains("of the causal half"), "{detail}");
            let flops = products * 4.0 * 128.0 * 128.0 * 64.0;
            assert_eq!(measured["flops"], flops, "{name}");
            let passes = measured["ours"]["microseconds_of_each_pass"].as_array();
            assert_eq!(passes.map(Vec::len), Some(2));
        }
        assert!(
            time_in(&group, "attention_forward", Device::Sim)
                .unwrap()
                .is_none()
        );
        assert!(time("attention_forward of nothing", Device::Sim).is_err());
    }
}
