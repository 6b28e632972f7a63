//! Sums of what ranks gathered (`kernels/ranks.cu`): every number is exact, since each sum is formed in f64 in rank order.

use super::numbers::{Errors, Random};
use super::{Buffer, Case, MakeProblem, Problem, exactly};
use crate::kernels::ranks::{LoadShares, RankFlags, RankSums, RankSumsF64, RankSumsI32};

/// Rows of f32 that cancel, so that another order or a sum in f32 shows.
fn sums(ranks: usize, stride: usize, elements: usize) -> Problem {
    let mut random = Random((ranks * stride) as u64);
    let mut number = |r: usize| random.normal() * if r == 0 { 1e6 } else { 1.0 };
    let rows: Vec<f32> = (0..ranks * stride).map(|i| number(i / stride)).collect();
    Problem {
        label: format!("{ranks} ranks, {elements} of {stride}"),
        buffers: vec![
            Buffer::output("out", 4 * elements),
            Buffer::input("rows", &rows),
        ],
        launch: Box::new(move |p, stream| {
            let kernel = RankSums {
                out: p[0].output(),
                rows: p[1].input(),
                ranks,
                stride,
                elements,
            };
            kernel.launch(stream)
        }),
        judge: Box::new(move |out| {
            exactly::<f32>("out", &out[0], |i| {
                let terms = (1..ranks).map(|r| f64::from(rows[r * stride + i]));
                terms.fold(f64::from(rows[i]), |sum, x| sum + x) as f32
            })
        }),
    }
}

fn sums_f64(ranks: usize, stride: usize, elements: usize) -> Problem {
    let mut random = Random((ranks * stride) as u64 + 1);
    let rows: Vec<f64> = (0..ranks * stride)
        .map(|_| f64::from(random.normal()) / 3.0)
        .collect();
    Problem {
        label: format!("{ranks} ranks, {elements} of {stride}"),
        buffers: vec![
            Buffer::output("out", 8 * elements),
            Buffer::input("rows", &rows),
        ],
        launch: Box::new(move |p, stream| {
            let kernel = RankSumsF64 {
                out: p[0].output(),
                rows: p[1].input(),
                ranks,
                stride,
                elements,
            };
            kernel.launch(stream)
        }),
        judge: Box::new(move |out| {
            exactly::<f64>("out", &out[0], |i| {
                (1..ranks).fold(rows[i], |sum, r| sum + rows[r * stride + i])
            })
        }),
    }
}

fn sums_i32(ranks: usize, stride: usize, elements: usize) -> Problem {
    let mut random = Random((ranks * stride) as u64 + 2);
    let rows: Vec<i32> = (0..ranks * stride)
        .map(|_| (random.normal() * 1e9) as i32)
        .collect();
    Problem {
        label: format!("{ranks} ranks, {elements} of {stride}"),
        buffers: vec![
            Buffer::output("out", 4 * elements),
            Buffer::input("rows", &rows),
        ],
        launch: Box::new(move |p, stream| {
            let kernel = RankSumsI32 {
                out: p[0].output(),
                rows: p[1].input(),
                ranks,
                stride,
                elements,
            };
            kernel.launch(stream)
        }),
        judge: Box::new(move |out| {
            exactly::<i32>("out", &out[0], |i| {
                (1..ranks).fold(rows[i], |sum, r| sum.wrapping_add(rows[r * stride + i]))
            })
        }),
    }
}

/// Every layer is well on some ranks; the last one on all.
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
        launch: Box::new(move |p, stream| {
            let kernel = RankFlags {
                flags: p[0].output(),
                rows: p[1].input(),
                ranks,
                layers,
            };
            kernel.launch(stream)
        }),
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

/// Shares of loads; of none, where nobody chose an expert.
fn shares(experts: usize, load: f64) -> Problem {
    let load: Vec<f64> = (0..experts).map(|e| load * (e % 7) as f64).collect();
    Problem {
        label: format!("{experts} experts, {} slots", load.iter().sum::<f64>()),
        buffers: vec![
            Buffer::output("fractions", 4 * experts),
            Buffer::input("load", &load),
        ],
        launch: Box::new(move |p, stream| {
            let kernel = LoadShares {
                fractions: p[0].output(),
                load: p[1].input(),
                experts,
            };
            kernel.launch(stream)
        }),
        judge: Box::new(move |out| -> Result<Errors, String> {
            let all = load.iter().sum::<f64>().max(1.0);
            exactly::<f32>("fractions", &out[0], |e| (load[e] / all) as f32)
        }),
    }
}

pub fn cases() -> Vec<Case> {
    const SIZES: [(usize, usize, usize); 5] = [
        (1, 5, 5),
        (2, 1024, 1024),
        (3, 2080, 2077),
        (8, 3000, 1),
        (5, 1025, 1025),
    ];
    let of = |launcher: &'static str, problems: Vec<MakeProblem>| Case {
        name: format!("{launcher} small"),
        launcher,
        source: "ranks",
        problems,
        small: true,
    };
    let sized = |make: fn(usize, usize, usize) -> Problem| -> Vec<MakeProblem> {
        let all = SIZES.into_iter();
        all.map(|(r, s, n)| Box::new(move || Ok(make(r, s, n))) as MakeProblem)
            .collect()
    };
    let flagged = [(1, 1), (4, 3), (3, 300)].into_iter();
    let shared = [(1, 3.0), (8, 2.0), (256, 1.0), (64, 0.0)].into_iter();
    vec![
        of("rank_sums", sized(sums)),
        of("rank_sums_f64", sized(sums_f64)),
        of("rank_sums_i32", sized(sums_i32)),
        of(
            "rank_flags",
            flagged
                .map(|(r, l)| Box::new(move || Ok(flags(r, l))) as MakeProblem)
                .collect(),
        ),
        of(
            "load_shares",
            shared
                .map(|(e, n)| Box::new(move || Ok(shares(e, n))) as MakeProblem)
                .collect(),
        ),
    ]
}
