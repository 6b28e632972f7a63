//! Detection of values that are not finite in a step.

use crate::error::Result;
use crate::model::Model;
use crate::train::optimizer::Outcome;
use std::cmp::Ordering;

/// Returns the name of the value that was not finite in a step on a device with kernels, if any.
pub fn of_outcome(outcome: &Outcome) -> Option<String> {
    if outcome.accepted != 0 {
        return None;
    }
    Some(match outcome {
        o if o.layer >= 0 && o.token < i32::MAX => logits_of(o.layer as usize, o.token as usize),
        o if o.layer >= 0 => format!("the dispatch of MoE layer {} (fault {})", o.layer, o.fault),
        o if !o.losses[0].is_finite() => "the loss".into(),
        _ => "the gradient".into(),
    })
}

fn logits_of(layer: usize, token: usize) -> String {
    format!("router logits of MoE layer {layer}, token {token}")
}

/// Returns the name of the first value that is not finite on any rank: logits (with layer and token), the loss, or
/// the gradient.
pub fn first_of_ranks(model: &Model, loss: f64, norm: f64) -> Result<Option<String>> {
    let states = model.layer_states();
    let flagged = states
        .iter()
        .enumerate()
        .find_map(|(l, s)| Some([l as f64, s.first_non_finite()? as f64]));
    let all = model
        .dist()
        .gather(&flagged.unwrap_or([f64::INFINITY; 2]))?;
    let first = all.chunks(2).map(|f| (f[0], f[1]));
    let first = first.min_by(|a, b| a.partial_cmp(b).unwrap_or(Ordering::Equal));
    Ok(match first {
        Some((layer, token)) if layer.is_finite() => {
            Some(logits_of(layer as usize, token as usize))
        }
        _ if !loss.is_finite() => Some("the loss".into()),
        _ => (!norm.is_finite()).then(|| "the gradient".into()),
    })
}
