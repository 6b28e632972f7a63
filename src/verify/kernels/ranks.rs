//! Checks the sums of values gathered from ranks (`kernels/ranks.cu`): every result is exact, since the order of the
//! additions is fixed.

use super::numbers::{Errors, Random};
use super::{Buffer, Case, Problem, each, exactly, launch_of};
use crate::kernels::ranks::{LoadShares, RankFlags, RankSums, RankSumsF64, RankSumsI32};

/// The sum that the kernels compute: terms 0 and 1, 2 and 3 and so on are added, then their sums in the same way.
fn sum_in_pairs<T: Copy>(mut terms: Vec<T>, add: fn(T, T) -> T) -> Option<T> {
    while terms.len() > 1 {
        let pairs = terms.chunks(2);
        terms = pairs
            .filter_map(|p| p.iter().copied().reduce(add))
            .collect();
    }
    terms.pop()
}

/// Problems of a sum over ranks. Arguments: its kernel, the type of its elements, the element of a rank (`$draw`), and the
/// addition.
macro_rules! sums {
    ($name:ident, $kernel:ident, $number:ty, $draw:expr, $add:expr) => {
        fn $name(ranks: usize, stride: usize, elements: usize) -> Problem {
            let mut random = Random((ranks * stride) as u64);
            let draw: fn(f32, usize) -> $number = $draw;
            let rows = (0..ranks * stride).map(|i| draw(random.normal(), i / stride));
            let rows: Vec<$number> = rows.collect();
            Problem {
                label: format!("{ranks} ranks, {elements} of {stride}"),
                buffers: vec![
                    Buffer::output("out", size_of::<$number>() * elements),
                    Buffer::input("rows", &rows),
                ],
                launch: launch_of!($kernel { out, rows; ranks, stride, elements }),
                judge: Box::new(move |out| {
                    exactly::<$number>("out", &out[0], |i| {
                        let terms = (0..ranks).map(|r| rows[r * stride + i]).collect();
                        sum_in_pairs(terms, $add).unwrap_or_default()
                    })
                }),
            }
        }
    };
}

// Elements of different magnitude, so that another order or a sum in f64 would be detected.
sums!(
    sums,
    RankSums,
    f32,
    |x, rank| x * if rank == 0 { 1e6 } else { 1.0 },
    |a, b| a + b
);
sums!(
    sums_f64,
    RankSumsF64,
    f64,
    |x, _| f64::from(x) / 3.0,
    |a, b| a + b
);
sums!(
    sums_i32,
    RankSumsI32,
    i32,
    |x, _| (x * 1e9) as i32,
    i32::wrapping_add
);

/// Every layer has no fault on some ranks; the last layer on all.
fn flags(ranks: usize, layers: usize) -> Problem {
    let flag = |r: usize, layer: usize| match (r + 2 * layer) % 3 {
        _ if layer + 1 == layers => [i32::MAX, 0],
        0 => [(100 * r + layer) as i32, 0],
        1 => [i32::MAX, 1 << (r % 4)],
        _ => [i32::MAX, 0],
    };
    let rows: Vec<[i32; 2]> = (0..ranks * layers)
        .map(|i| flag(i / layers, i % layers))
        .collect();
    Problem {
        label: format!("{ranks} ranks, {layers} layers"),
        buffers: vec![
            Buffer::output("flags", 8 * layers),
            Buffer::input("rows", rows.as_flattened()),
        ],
        launch: launch_of!(RankFlags { flags, rows; ranks, layers }),
        judge: Box::new(move |out| {
            exactly::<i32>("flags", &out[0], |i| {
                let all = (0..ranks).map(|r| rows[r * layers + i / 2][i % 2]);
                match i % 2 {
                    0 => all.fold(i32::MAX, i32::min),
                    _ => all.fold(0, |bits, other| bits | other),
                }
            })
        }),
    }
}

/// Shares of loads, including the case that no expert was chosen.
fn shares(experts: usize, load: f64) -> Problem {
    let load: Vec<f64> = (0..experts).map(|e| load * (e % 7) as f64).collect();
    Problem {
        label: format!("{experts} experts, {} slots", load.iter().sum::<f64>()),
        buffers: vec![
            Buffer::output("fractions", 4 * experts),
            Buffer::input("load", &load),
        ],
        launch: launch_of!(LoadShares { fractions, load; experts }),
        judge: Box::new(move |out| -> Result<Errors, String> {
            let all = load.iter().sum::<f64>().max(1.0);
            exactly::<f32>("fractions", &out[0], |e| (load[e] / all) as f32)
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    const SIZES: [(usize, usize, usize); 7] = [
        (1, 5, 5),
        (2, 1024, 1024),
        (3, 2080, 2077),
        (8, 3000, 1),
        (5, 1025, 1025),
        (7, 1030, 1030),
        (21, 520, 515),
    ];
    let case = |launcher, problems| Case::small(launcher, "ranks", problems);
    let layers = [(1, 1), (4, 3), (3, 300)];
    let loads = [(1, 3.0), (8, 2.0), (256, 1.0), (64, 0.0)];
    vec![
        case("rank_sums", each(SIZES, |(r, s, n)| sums(r, s, n))),
        case("rank_sums_f64", each(SIZES, |(r, s, n)| sums_f64(r, s, n))),
        case("rank_sums_i32", each(SIZES, |(r, s, n)| sums_i32(r, s, n))),
        case("rank_flags", each(layers, |(r, l)| flags(r, l))),
        case("load_shares", each(loads, |(e, n)| shares(e, n))),
    ]
}
