//! Checks the gates of chosen experts (`kernels/gates.cu`) against float64.

use super::dispatch::{Batch, Named};
use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::routed::{Routed, covering_batches, small_batches};
use super::{BOTH, Buffer, Case, Launch, Problem, each, launch_of, pairs, values};
use crate::kernels::gates::{SelectedGates, SelectedGatesBackward};

/// The kind of gates, and whether to compute their gradient.
#[derive(Clone, Copy, Debug)]
struct Kind {
    renormalize: bool,
    /// How gradients of scores that were not chosen are computed; `None` in forward.
    through: Option<bool>,
}

/// Returns each gate, or gradient of a score, with the bound of its error; sums over the chosen experts are in float64.
fn row(kind: Kind, p: &[f32], dw: &[f32], chosen: &[bool]) -> Vec<(f64, f64)> {
    let on = || (0..p.len()).filter(|&e| chosen[e]);
    let exact = |x: f32| f64::from(x);
    let divisor = match kind.renormalize {
        true => on().map(|e| exact(p[e])).sum(),
        false => 1.0,
    };
    let roundings = (2 * on().count() + 8) as f64 * F32_ROUNDOFF;
    let Some(through) = kind.through else {
        let gate = |e: usize| match chosen[e] {
            true => (exact(p[e]) / divisor, roundings * (exact(p[e]) / divisor)),
            false => (0.0, 0.0),
        };
        return (0..p.len()).map(gate).collect();
    };
    let products = on().map(|e| exact(p[e]) / divisor * exact(dw[e]));
    let (mean, size) = match kind.renormalize {
        true => sums(products),
        false => (0.0, 0.0),
    };
    let gradient = |e: usize| match chosen[e] {
        true => (
            (exact(dw[e]) - mean) / divisor,
            roundings * (exact(dw[e]).abs() + size) / divisor,
        ),
        false if through => {
            let d = exact(dw[e]) / divisor;
            (d, roundings * d.abs())
        }
        false => (0.0, 0.0),
    };
    (0..p.len()).map(gradient).collect()
}

fn launch(kind: Kind, routed: &Routed) -> Launch {
    let (tokens, experts, slots) = (routed.tokens(), routed.experts(), routed.slots());
    let (has_choices, rows) = (routed.has_choices(), routed.rows_given);
    let renormalize = kind.renormalize;
    match kind.through {
        None => launch_of!(SelectedGates {
            w = "gates or gradients", p, slot_row, choices if has_choices;
            tokens, rows, experts, slots, renormalize,
        }),
        Some(through) => launch_of!(SelectedGatesBackward {
            dp = "gates or gradients", dw, p, slot_row, choices if has_choices;
            tokens, rows, experts, slots, renormalize, through,
        }),
    }
}

/// Values that must not matter because the expert is not chosen are NaN; some choices have no row and therefore do not
/// count. Buffers: w or dp, p, slot_row, choices, dw.
fn problem(batch: Batch, kind: Kind) -> Problem {
    let mut routed = Routed::new(batch);
    let slots = routed.slots();
    if slots > 1 {
        let choices = routed.sorted.slot_row.chunks_mut(slots);
        choices.step_by(7).for_each(|of_token| of_token[0] = -1);
    }
    let (tokens, experts) = (routed.tokens(), routed.experts());
    let mut random = Random((tokens * 3 + experts) as u64);
    let mut dw = random.normals(tokens * experts);
    let mut p = routed.gates.clone();
    let has_row = |t| {
        routed
            .row_of_expert(t)
            .iter()
            .map(Option::is_some)
            .collect()
    };
    let chosen: Vec<Vec<bool>> = (0..tokens).map(has_row).collect();
    for (i, chosen) in chosen.iter().flatten().enumerate() {
        if !chosen && i % 5 == 3 {
            p[i] = f32::NAN;
            if kind.through != Some(true) {
                dw[i] = f32::NAN;
            }
        }
    }
    let mut buffers = vec![
        Buffer::output("gates or gradients", 4 * tokens * experts),
        Buffer::input("p", &p),
    ];
    buffers.extend(routed.slot_buffers());
    buffers.push(Buffer::input("dw", &dw));
    Problem {
        label: format!("{kind:?}, {}", routed.label()),
        buffers,
        launch: launch(kind, &routed),
        judge: Box::new(move |out| {
            let got: Vec<f32> = values(&out[0]);
            let mut errors = Errors::default();
            for (t, chosen) in chosen.iter().enumerate() {
                let at = t * experts..(t + 1) * experts;
                let want = row(kind, &p[at.clone()], &dw[at.clone()], chosen);
                let name = format!("token {t}, expert");
                errors.merge(Errors::within(&name, &got[at], |e| want[e])?);
            }
            Ok(errors)
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let kind = |renormalize, through| Kind {
        renormalize,
        through,
    };
    let forward = BOTH.map(|renormalize| kind(renormalize, None)).to_vec();
    let backward = pairs(BOTH, BOTH).into_iter();
    let backward = backward.map(|(renormalize, through)| kind(renormalize, Some(through)));
    let mut all = Vec::new();
    for (launcher, kinds) in [
        ("selected_gates", forward),
        ("selected_gates_backward", backward.collect()),
    ] {
        let batches = [small_batches(), covering_batches()];
        all.extend(Case::both(launcher, "gates", batches, |mut batches| {
            // More slots than lanes of a warp.
            batches.push(Batch::random(9, 40, 36, 19));
            let mut shapes = pairs(kinds.clone(), batches);
            // For a token without experts, there is no sum to divide by.
            let lists = |b: &Batch| matches!(b.named, Named::Choices { .. });
            shapes.retain(|(kind, batch)| !kind.renormalize || lists(batch));
            each(shapes, |(kind, batch)| problem(batch, kind))
        }));
    }
    all
}
