//! Checks the kernels that run before and after the optimizer's update (`kernels/step.cu`) against float64, and exactly
//! where results are exact.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::{BOTH, Buffer, Case, Problem, bind, each, exactly, launch_of, pairs, with};
use crate::kernels::bindings::{routegrad_state, routegrad_step_outcome, routegrad_step_settings};
use crate::kernels::step::{LossesAdd, StateCommit, StepDecide};
use crate::kernels::table::{bytes_of, row_of};

const SETTINGS: routegrad_step_settings = routegrad_step_settings {
    rate: 1e-3,
    clip: 1.0,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};

/// The sums of the losses after one micro-batch.
fn losses(first: bool, with_balance: bool) -> Problem {
    const BEFORE: [f64; 3] = [3.0, 0.25, -1.0];
    const SHARE: f64 = 0.25;
    let terms = [2.5f32, 0.0625, 1.5];
    let buffers = vec![
        Buffer::added_to("sums", &BEFORE, !first),
        Buffer::input("terms", &terms),
    ];
    Problem {
        label: format!("first {first}, balance losses {with_balance}"),
        buffers,
        launch: Box::new(move |p, stream| {
            let term = |i| with_balance.then(|| p.named("terms").input().from_element(i));
            bind!(p, LossesAdd {
                sums, cross_entropy = "terms";
                auxiliary: term(1), z: term(2), share: SHARE, first,
            })
            .launch(stream)
        }),
        judge: Box::new(move |out| {
            // All values here are exact.
            exactly::<f64>("sums", &out[0], |i| {
                let given = i == 0 || with_balance;
                let term = SHARE * f64::from(if given { terms[i] } else { 0.0 });
                term + if first { 0.0 } else { BEFORE[i] }
            })
        }),
    }
}

/// The input of the decision about a step.
#[derive(Clone, Copy)]
struct Decision {
    parts: usize,
    /// Factor of every partial sum.
    size: f64,
    loss: f64,
    /// A layer and the value of its flags.
    flag: Option<(usize, [i32; 2])>,
    clip: f64,
}

const LAYERS: usize = 5;

fn decide(d: Decision) -> Problem {
    let mut random = Random(d.parts as u64);
    let parts: Vec<f64> = (0..d.parts)
        .map(|_| d.size * f64::from(random.normal()).powi(2))
        .collect();
    let mut flags = [[i32::MAX, 0]; LAYERS];
    if let Some((layer, flag)) = d.flag {
        flags[layer] = flag;
        flags[LAYERS - 1] = [3, 0];
    }
    let settings = routegrad_step_settings {
        clip: d.clip,
        ..SETTINGS
    };
    let before = routegrad_step_outcome {
        updates: 6,
        ..Default::default()
    };
    let losses = [d.loss, 0.5, 0.0];
    let buffers = vec![
        Buffer::changed("outcome", bytes_of(&[before])),
        Buffer::table("settings", 1, move |_| vec![settings]),
        Buffer::input("losses", &losses),
        Buffer::input("flags", flags.as_flattened()),
        Buffer::input("parts", &parts),
    ];
    let count = parts.len();
    Problem {
        label: format!(
            "{} parts, loss {}, flag {:?}, clip {}",
            d.parts, d.loss, d.flag, d.clip
        ),
        buffers,
        launch: launch_of!(StepDecide {
            outcome, settings, losses, flags, parts;
            count, layers: LAYERS,
        }),
        judge: Box::new(move |out| {
            let got: routegrad_step_outcome = row_of(&out[0]);
            let sum: f64 = parts.iter().sum();
            judge(d, got, sum.sqrt())
        }),
    }
}

fn judge(d: Decision, got: routegrad_step_outcome, norm: f64) -> Result<Errors, String> {
    let accepted = d.flag.is_none() && d.loss.is_finite() && norm.is_finite();
    let (layer, [token, fault]) = d.flag.map_or((-1, [0, 0]), |(l, f)| (l as i32, f));
    let facts = (
        got.accepted != 0,
        got.updates,
        got.layer,
        got.token,
        got.fault,
    );
    let want = (accepted, 6 + u64::from(accepted), layer, token, fault);
    if facts != want {
        return Err(format!(
            "(accepted, updates, layer, token, fault) is {facts:?} instead of {want:?}"
        ));
    }
    if got.losses[0].to_bits() != d.loss.to_bits() || got.losses[1..] != [0.5, 0.0] {
        return Err(format!("the losses are {:?}", got.losses));
    }
    let mut errors = Errors::default();
    if norm.is_finite() {
        errors.add(got.norm, norm, 1e-12 * norm, || "norm".into())?;
    } else if got.norm.is_finite() {
        return Err(format!("the norm is {}", got.norm));
    }
    for decays in [false, true] {
        let clipped = d.clip > 0.0 && norm > d.clip;
        let decay = SETTINGS.rate * SETTINGS.weight_decay;
        let want = [
            SETTINGS.beta1,
            SETTINGS.beta2,
            SETTINGS.rate / (1.0 - SETTINGS.beta1.powi(7)),
            1.0 / (1.0 - SETTINGS.beta2.powi(7)),
            SETTINGS.eps,
            if decays { 1.0 - decay } else { 1.0 },
            if clipped { d.clip / norm } else { 1.0 },
        ];
        let found = got.coefficients[usize::from(decays)];
        for (i, (got, want)) in found.into_iter().zip(want).enumerate() {
            let want = if accepted { want } else { 0.0 };
            let place = || format!("coefficient {i}, decays {decays}");
            errors.add(f64::from(got), want, 2.0 * F32_ROUNDOFF * want, place)?;
        }
    }
    Ok(errors)
}

/// Tensors with these numbers of words, which are committed or restored.
fn commit(sizes: &'static [usize], accepted: bool) -> Problem {
    let numbers = |seed: u64, n: usize| Random(seed).normals(n);
    let mut buffers = Vec::new();
    for (i, &n) in sizes.iter().enumerate() {
        buffers.push(Buffer::changed("committed", &numbers(2 * i as u64, n)));
        buffers.push(Buffer::changed("pending", &numbers(2 * i as u64 + 1, n)));
    }
    let outcome = routegrad_step_outcome {
        accepted: accepted.into(),
        ..Default::default()
    };
    buffers.push(Buffer::table("states", sizes.len(), move |addresses| {
        let pairs = addresses.chunks(2).zip(sizes);
        let row = |(pair, &words): (&[*mut u8], &usize)| routegrad_state {
            committed: pair[0].cast(),
            pending: pair[1].cast(),
            words: words as i64,
        };
        pairs.map(row).collect()
    }));
    buffers.push(Buffer::table("outcome", 1, move |_| vec![outcome]));
    let (count, most) = (sizes.len(), sizes.iter().max().copied().unwrap_or(1));
    Problem {
        label: format!("words {sizes:?}, accepted {accepted}"),
        buffers,
        launch: launch_of!(StateCommit { states, outcome; count, most_words: most }),
        judge: Box::new(move |out| {
            for (i, (pair, &n)) in out.chunks(2).zip(sizes).enumerate() {
                let kept = numbers(2 * i as u64 + u64::from(accepted), n);
                for (name, bytes) in [("committed", &pair[0]), ("pending", &pair[1])] {
                    exactly::<f32>(name, bytes, |at| kept[at])?;
                }
            }
            Ok(Errors::none(out.len()))
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let plain = Decision {
        parts: 300,
        size: 1e-4,
        loss: 2.5,
        flag: None,
        clip: 1.0,
    };
    let decisions = [
        plain,
        with!(plain; parts: 1, clip: 0.0, size: 4.0),
        with!(plain; parts: 2049, size: 1.0),
        with!(plain; loss: f64::NAN),
        with!(plain; loss: f64::INFINITY),
        with!(plain; size: f64::NAN),
        with!(plain; size: f64::INFINITY),
        with!(plain; flag: Some((2, [77, 0]))),
        with!(plain; flag: Some((0, [i32::MAX, 2]))),
    ];
    let sizes = pairs(BOTH, [&[1usize][..], &[8, 20_000, 3]]);
    let case = |launcher, problems| Case::small(launcher, "step", problems);
    vec![
        case(
            "losses_add",
            each(pairs(BOTH, BOTH), |(first, balance)| losses(first, balance)),
        ),
        case("step_decide", each(decisions, decide)),
        case(
            "state_commit",
            each(sizes, |(accepted, sizes)| commit(sizes, accepted)),
        ),
    ]
}
