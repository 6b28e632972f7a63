//! Checks the statistics of an MoE layer (`kernels/layer_tally.cu`) against plain loops.

use super::numbers::{Errors, Random};
use super::{Buffer, Case, Problem, each, exactly, launch_of, values, with};
use crate::kernels::layer_tally::{
    LayerTally, LossfreeUpdate, RemoeFractions, RemoeUpdate, ShareEntropy,
};

/// One launch of `layer_tally`.
#[derive(Clone, Copy, Debug)]
struct Tally {
    experts: usize,
    trains: bool,
    first_of_stats: bool,
    first_of_step: bool,
    over_step: bool,
    /// Whether the entropy is given as partial sums.
    parts: bool,
    /// The first token with non-finite values, the first of the step before the launch, and the fault bits.
    bad: [i32; 2],
    fault: i32,
    /// Whether no token chose any expert.
    nobody: bool,
}

const TOKENS: usize = 211;
const FIRST_TOKEN: usize = 1000;
const FAULT_BEFORE: i32 = 2;
const PARTS: [f64; 3] = [1.5, 0.25, 100.0];
const MEAN_ENTROPY: f32 = 1.25;

fn tally(t: Tally) -> Problem {
    let e = t.experts;
    let mut random = Random(e as u64);
    let count = |i| match t.nobody || i % 3 == 1 {
        true => 0,
        false => (random.normal().abs() * 40.0) as i32,
    };
    let counts: Vec<i32> = (0..e).map(count).collect();
    let mut offsets = vec![0i32];
    offsets.extend(counts.iter().scan(0, |sum, n| {
        *sum += n;
        Some(*sum)
    }));
    let before = |n: usize| -> Vec<f64> { (0..n).map(|i| 10.0 + i as f64).collect() };
    let buffers = vec![
        Buffer::added_to("stats", &before(e + 2), !t.first_of_stats),
        Buffer::changed("load", &before(e + 1)),
        Buffer::changed("flags", &[t.bad[1], FAULT_BEFORE]),
        Buffer::output("fractions", 4 * e),
        Buffer::input("offsets", &offsets),
        Buffer::input("first_non_finite", &[t.bad[0]]),
        Buffer::input("fault", &[t.fault]),
        Buffer::input("mean_entropy", &[MEAN_ENTROPY]),
        Buffer::input("entropy_parts", &PARTS),
    ];
    Problem {
        label: format!("{t:?}"),
        buffers,
        launch: launch_of!(LayerTally {
            stats, load, flags, fractions, offsets, first_non_finite, fault,
            mean_entropy if !t.parts, entropy_parts;
            tokens: TOKENS, first_token: FIRST_TOKEN, parts: if t.parts { PARTS.len() } else { 0 },
            experts: e, trains: t.trains, first_of_stats: t.first_of_stats,
            first_of_step: t.first_of_step, over_step: t.over_step,
        }),
        judge: Box::new(move |out| judge_tally(t, &counts, out)),
    }
}

/// Checks stats, load, flags and fractions exactly.
fn judge_tally(t: Tally, counts: &[i32], out: &[Vec<u8>]) -> Result<Errors, String> {
    let e = t.experts;
    let old = |fresh: bool, i: usize| if fresh { 0.0 } else { 10.0 + i as f64 };
    let count = |i: usize| f64::from(counts[i]);
    let entropy = match t.parts {
        true => PARTS.iter().sum::<f64>(),
        false => TOKENS as f64 * f64::from(MEAN_ENTROPY),
    };
    let stat = |i: usize| match i < e {
        true => count(i),
        false => [TOKENS as f64, entropy][i - e],
    };
    exactly::<f64>("stats", &out[0], |i| stat(i) + old(t.first_of_stats, i))?;
    let load = |i: usize| match t.trains {
        true => stat(i) + old(t.first_of_step, i),
        false => old(false, i),
    };
    exactly::<f64>("load", &out[1], load)?;
    let token = match t.bad[0] {
        i32::MAX => i32::MAX,
        token => token + FIRST_TOKEN as i32,
    };
    let flags = match (t.trains, t.first_of_step) {
        (false, _) => [t.bad[1], FAULT_BEFORE],
        (true, true) => [token, t.fault],
        (true, false) => [token.min(t.bad[1]), t.fault | FAULT_BEFORE],
    };
    exactly::<i32>("flags", &out[2], |i| flags[i])?;
    let slots: Vec<f64> = match t.over_step && t.trains {
        true => (0..e).map(load).collect(),
        false => (0..e).map(count).collect(),
    };
    let all = slots.iter().sum::<f64>().max(1.0);
    exactly::<f32>("fractions", &out[3], |i| (slots[i] / all) as f32)
}

/// Entropies of random scores; some rows have no positive score.
fn entropy(tokens: usize, experts: usize) -> Problem {
    const PART: usize = 256;
    let mut random = Random((tokens * experts) as u64);
    let mut scores = random.normals(tokens * experts);
    for row in scores.chunks_mut(experts).step_by(5) {
        row.iter_mut().for_each(|s| *s = -s.abs());
    }
    Problem {
        label: format!("{tokens} tokens, {experts} experts"),
        buffers: vec![
            Buffer::output("parts", tokens.div_ceil(PART) * 8),
            Buffer::input("scores", &scores),
        ],
        launch: launch_of!(ShareEntropy { parts, scores; tokens, experts }),
        judge: Box::new(move |out| {
            let parts: Vec<&[f32]> = scores.chunks(PART * experts).collect();
            Errors::within("part", &values::<f64>(&out[0]), |i| {
                let part = parts[i];
                let entropies = part.chunks(experts).map(|row| {
                    let positive = row.iter().filter(|s| **s > 0.0).map(|s| f64::from(*s));
                    let sum: f64 = positive.clone().sum();
                    -positive.map(|s| s / sum * (s / sum).ln()).sum::<f64>()
                });
                // f32 logarithms, and sums of at most E terms per token.
                let bound = 1e-6 * (experts * (part.len() / experts)) as f64;
                (entropies.sum(), bound)
            })
        }),
    }
}

fn bias(experts: usize) -> Problem {
    const RATE: f32 = 1e-3;
    let mut random = Random(experts as u64 + 5);
    let before = random.normals(experts);
    // The mean is 10, since the counts of each pair lie symmetrically around it; some counts are equal to it.
    let load: Vec<f64> = (0..experts)
        .map(|i| match (i % 4, experts % 4) {
            (_, rest) if i >= experts - rest => 10.0,
            (0, _) => 7.0,
            (1, _) => 13.0,
            _ => 10.0,
        })
        .chain([1e9])
        .collect();
    Problem {
        label: format!("{experts} experts"),
        buffers: vec![
            Buffer::changed("bias", &before),
            Buffer::input("load", &load),
        ],
        launch: launch_of!(LossfreeUpdate { bias, load; experts, rate: RATE }),
        judge: Box::new(move |out| {
            exactly::<f32>("bias", &out[0], |i| {
                let sign = f32::from(load[i] < 10.0) - f32::from(load[i] > 10.0);
                before[i] + RATE * sign
            })
        }),
    }
}

/// λ n_e / slots for uneven offsets.
fn fractions(experts: usize) -> Problem {
    const LAMBDA: f32 = 3e-5;
    const SLOTS: usize = 1_000_003;
    let mut random = Random(experts as u64 + 6);
    let mut offsets = vec![0i32];
    for _ in 0..experts {
        let last = offsets[offsets.len() - 1];
        offsets.push(last + random.below(1000) as i32 * random.below(3) as i32);
    }
    Problem {
        label: format!("{experts} experts"),
        buffers: vec![
            Buffer::output("fractions", experts * 4),
            Buffer::input("lambda", &[LAMBDA]),
            Buffer::input("offsets", &offsets),
        ],
        launch: launch_of!(RemoeFractions { fractions, lambda, offsets; slots: SLOTS, experts }),
        judge: Box::new(move |out| {
            exactly::<f32>("fractions", &out[0], |i| {
                let n = f64::from(offsets[i + 1] - offsets[i]);
                (f64::from(LAMBDA) * n / SLOTS as f64) as f32
            })
        }),
    }
}

/// λ after a step with `layers` layers, in which tokens had K experts on average, plus `surplus` pairs.
fn lambda(layers: usize, experts: usize, surplus: i32) -> Problem {
    const BEFORE: f32 = 7.3e-9;
    const FACTOR: f64 = 1.2;
    const TOKENS: usize = 4096;
    let top_k = experts.div_ceil(3);
    // Each layer has K pairs per token, but a part is moved from one layer to the next.
    let mut load = vec![0.0; layers * (experts + 1)];
    for (l, row) in load.chunks_mut(experts + 1).enumerate() {
        row[experts] = (TOKENS + l) as f64;
        for pair in 0..top_k * (TOKENS + l) {
            row[pair % experts] += 1.0;
        }
        row[0] += if l == 0 { 40.0 } else { 0.0 };
        row[experts - 1] -= if l + 1 == layers { 40.0 } else { 0.0 };
    }
    load[experts / 2] += f64::from(surplus);
    Problem {
        label: format!("{layers} layers, {experts} experts, {surplus} pairs more than wanted"),
        buffers: vec![
            Buffer::changed("lambda", &[BEFORE]),
            Buffer::input("load", &load),
        ],
        launch: launch_of!(RemoeUpdate { lambda, load; layers, experts, top_k, factor: FACTOR }),
        judge: Box::new(move |out| {
            let change = match surplus {
                0 => 1.0,
                1.. => FACTOR,
                _ => 1.0 / FACTOR,
            };
            exactly::<f32>("lambda", &out[0], |_| (f64::from(BEFORE) * change) as f32)
        }),
    }
}

fn tallies() -> Vec<Tally> {
    let plain = Tally {
        experts: 8,
        trains: true,
        first_of_stats: false,
        first_of_step: false,
        over_step: true,
        parts: false,
        bad: [i32::MAX; 2],
        fault: 0,
        nobody: false,
    };
    vec![
        plain,
        with!(plain; experts: 1, first_of_stats: true, first_of_step: true),
        with!(plain; experts: 256, parts: true, over_step: false),
        with!(plain; experts: 33, trains: false, over_step: false, bad: [3, 900], fault: 1),
        with!(plain; experts: 32, bad: [17, 900], fault: 1),
        with!(plain; experts: 7, bad: [17, 2000], first_of_stats: true),
        with!(plain; first_of_step: true, bad: [0, 5]),
        with!(plain; nobody: true, over_step: false),
    ]
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let case = |launcher, problems| Case::small(launcher, "layer_tally", problems);
    let tokens = [(1, 1), (255, 8), (1000, 33), (2039, 64)];
    let layers = [
        (1, 1, 0),
        (1, 8, 1),
        (2, 8, -1),
        (3, 33, 0),
        (24, 256, 1),
        (24, 256, -1),
    ];
    vec![
        case("layer_tally", each(tallies(), tally)),
        case("share_entropy", each(tokens, |(t, e)| entropy(t, e))),
        case("lossfree_update", each([1, 8, 34, 256], bias)),
        case("remoe_fractions", each([1, 8, 33, 256], fractions)),
        case(
            "remoe_update",
            each(layers, |(l, e, more)| lambda(l, e, more)),
        ),
    ]
}
