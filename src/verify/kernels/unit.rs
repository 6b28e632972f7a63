//! Checks single instructions (`kernels/unit.cu`) against their definition. They run first on a GPU: wgmma descriptors and
//! fragments, the layout of TMA data in shared memory, stores that end inside a box, clusters with multicast, and arrivals
//! of a part of a warp (the two lanes that free a multicast buffer).

use super::numbers::{Errors, Random};
use super::{Buffer, Case, Problem, each, exactly, launch_of, pairs, values};
use crate::kernels::bindings::routegrad_unit_box;
use crate::kernels::unit::{
    UnitGather, UnitMulticast, UnitSoftmax, UnitTmaLoad, UnitTmaStore, UnitWgmma,
};
use half::bf16;

/// Elements of a swizzle span, indexed by the swizzle mode: none, 128, 64, 32 bytes.
const SPAN: [usize; 4] = [8, 64, 32, 16];

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let case = |name, launcher, problems| Case::new(launcher, "unit", name, true, problems);
    let inside = boxes()
        .into_iter()
        .filter(|b| b.at.iter().all(|&at| at >= 0));
    // Each block to both; each to itself; each to the other; both to the first.
    let masks = [[3, 3], [1, 2], [2, 1], [1, 1]];
    let gathers = [
        (64, false, false),
        (64, true, false),
        (37, false, true),
        (37, true, true),
        (0, false, false),
    ];
    let gathers = each(gathers, |(columns, transpose, by_mbarrier)| {
        gather(columns, transpose, by_mbarrier)
    });
    vec![
        case("every layout", "unit_wgmma", each(layouts(), wgmma)),
        case(
            "boxes across every edge",
            "unit_tma_load",
            each(boxes(), tma_load),
        ),
        case(
            "boxes across every edge",
            "unit_tma_store",
            each(inside, tma_store),
        ),
        case(
            "masks of a cluster of two",
            "unit_multicast",
            each(masks, multicast),
        ),
        case("rows whole, cut and absent", "unit_gather", gathers),
        case(
            "shuffles, barriers, atomics",
            "unit_softmax",
            each([()], |()| softmax()),
        ),
    ]
}

fn small_integers(random: &mut Random, len: usize) -> Vec<bf16> {
    (0..len)
        .map(|_| bf16::from_f32(random.below(15) as f32 - 7.0))
        .collect()
}

/// Returns n, the swizzle, whether A and B are mn-major, and whether A is in registers.
fn layouts() -> Vec<(usize, usize, bool, bool, bool)> {
    let mut all = pairs([16, 64, 96, 128, 176, 256], 0..24)
        .into_iter()
        .map(|(n, layout)| {
            let bit = |divisor: usize| layout / divisor % 2 == 1;
            (n, 1 + layout % 3, bit(3), bit(6), bit(12))
        })
        .collect::<Vec<_>>();
    all.retain(|&(n, swizzle, a_mn, b_mn, registers)| {
        !((b_mn && n % SPAN[swizzle] != 0) || (registers && a_mn))
    });
    all
}

/// C[64, n] = A[64, 64] B[64, n] with small integers, which is exact in f32.
fn wgmma((n, swizzle, a_mn, b_mn, registers): (usize, usize, bool, bool, bool)) -> Problem {
    let mut random = Random((n * 4 + swizzle) as u64);
    let (a, b) = (
        small_integers(&mut random, 64 * 64),
        small_integers(&mut random, 64 * n),
    );
    let at = move |a: &[bf16], b: &[bf16], i: usize, j: usize| -> f32 {
        let x = |k: usize| a[if a_mn { k * 64 + i } else { i * 64 + k }].to_f32();
        let y = |k: usize| b[if b_mn { k * n + j } else { j * 64 + k }].to_f32();
        (0..64).map(|k| x(k) * y(k)).sum()
    };
    Problem {
        label: format!(
            "n {n}, swizzle {swizzle}, A mn-major {a_mn}, B mn-major {b_mn}, A in registers {registers}"
        ),
        buffers: vec![
            Buffer::output("c", 64 * n * 4),
            Buffer::input("a", &a),
            Buffer::input("b", &b),
        ],
        launch: launch_of!(UnitWgmma {
            c, a, b;
            n, a_mn_major: a_mn, b_mn_major: b_mn, a_in_registers: registers,
            swizzle: swizzle as i32,
        }),
        judge: Box::new(move |out| exactly::<f32>("c", &out[0], |i| at(&a, &b, i / n, i % n))),
    }
}

/// Returns boxes inside, across each edge, and completely outside of a tensor [z 5, y 40, x 72].
fn boxes() -> Vec<routegrad_unit_box> {
    let mut all = Vec::new();
    for (swizzle, &span) in SPAN.iter().enumerate() {
        let width = span as i32;
        for rank in [2, 3] {
            for at in [
                [8, 4, 1],
                [-8, 4, 1],
                [64, 4, 1],
                [8, -2, 1],
                [8, 37, 1],
                [8, 4, -1],
                [8, 4, 4],
                [80, 4, 1],
                [-8, 38, 4],
            ] {
                if rank == 3 || at[2] == 1 {
                    let extent = [72, 40, 5];
                    all.push(routegrad_unit_box {
                        rank,
                        extent,
                        box_: [width, 8, 2],
                        at,
                        swizzle: swizzle as i32,
                    });
                }
            }
        }
    }
    all
}

/// Returns the index in the tensor of element (x, y, z) of the box, or `None` if it is outside of the tensor.
fn element(b: &routegrad_unit_box, [x, y, z]: [i32; 3]) -> Option<usize> {
    let [x, y, z] = [
        b.at[0] + x,
        b.at[1] + y,
        if b.rank == 3 { b.at[2] + z } else { 0 },
    ];
    let depth = if b.rank == 3 { b.extent[2] } else { 1 };
    let inside =
        (0..b.extent[0]).contains(&x) && (0..b.extent[1]).contains(&y) && (0..depth).contains(&z);
    inside.then_some(((z * b.extent[1] + y) * b.extent[0] + x) as usize)
}

/// Returns the position of the box's element in shared memory, in elements. Rows are consecutive, and the index of each
/// 16-byte chunk in a row is XORed with the row's position in the swizzle pattern.
fn place(b: &routegrad_unit_box, [x, y, z]: [i32; 3]) -> usize {
    let row = (z * b.box_[1] + y) as usize;
    let (chunk, within) = (x as usize / 8, x as usize % 8);
    let chunk = match b.swizzle {
        1 => chunk ^ (row & 7),
        2 => chunk ^ (row >> 1 & 3),
        3 => chunk ^ (row >> 2 & 1),
        _ => chunk,
    };
    row * b.box_[0] as usize + chunk * 8 + within
}

fn elements(b: &routegrad_unit_box) -> impl Iterator<Item = [i32; 3]> + use<> {
    let [w, h, d] = [
        b.box_[0],
        b.box_[1],
        if b.rank == 3 { b.box_[2] } else { 1 },
    ];
    (0..d).flat_map(move |z| (0..h).flat_map(move |y| (0..w).map(move |x| [x, y, z])))
}

fn numbered(len: usize) -> Vec<u16> {
    (0..len).map(|i| i as u16 + 1).collect()
}

fn tma_load(b: routegrad_unit_box) -> Problem {
    let tensor = numbered(72 * 40 * 5);
    let mut want = vec![0u16; elements(&b).count()];
    for at in elements(&b) {
        want[place(&b, at)] = element(&b, at).map_or(0, |i| tensor[i]);
    }
    Problem {
        label: format!("{b:?}"),
        buffers: vec![
            Buffer::output("box", want.len() * 2),
            Buffer::input("tensor", &tensor),
        ],
        launch: launch_of!(UnitTmaLoad { out = "box", tensor; place: &b }),
        judge: Box::new(move |out| exactly::<u16>("box", &out[0], |i| want[i])),
    }
}

fn tma_store(b: routegrad_unit_box) -> Problem {
    let shared = numbered(elements(&b).count());
    let mut want = vec![u16::MAX; 72 * 40 * if b.rank == 3 { 5 } else { 1 }];
    for at in elements(&b) {
        if let Some(i) = element(&b, at) {
            want[i] = shared[place(&b, at)];
        }
    }
    Problem {
        label: format!("{b:?}"),
        buffers: vec![
            Buffer::output("tensor", want.len() * 2),
            Buffer::input("box", &shared),
        ],
        launch: launch_of!(UnitTmaStore { tensor, input = "box"; place: &b }),
        judge: Box::new(move |out| exactly::<u16>("tensor", &out[0], |i| want[i])),
    }
}

fn multicast(masks: [i32; 2]) -> Problem {
    const ROUNDS: usize = 5;
    let tensor: Vec<u16> = (0..ROUNDS * 4096).map(|i| (i * 7) as u16).collect();
    let input = Buffer::input("tensor", &tensor);
    Problem {
        label: format!("masks {masks:?}"),
        buffers: vec![Buffer::output("out", 4 * ROUNDS * 4096 * 2), input],
        launch: launch_of!(UnitMulticast {
            out, tensor;
            rounds: ROUNDS, clusters: 2, mask0: masks[0], mask1: masks[1],
        }),
        judge: Box::new(move |out| {
            exactly::<u16>("out", &out[0], |i| {
                let (block, round, half) =
                    (i / (ROUNDS * 4096), i / 4096 % ROUNDS, i % 4096 / 2048);
                let received = masks[half] >> (block % 2) & 1 == 1;
                if received {
                    tensor[round * 4096 + i % 4096]
                } else {
                    u16::MAX
                }
            })
        }),
    }
}

fn gather(columns: usize, transpose: bool, by_mbarrier: bool) -> Problem {
    let input = numbered(100 * 64);
    let mut random = Random(2);
    let index: Vec<i32> = (0..64).map(|_| random.below(110) as i32 - 10).collect();
    let buffers = vec![
        Buffer::output("out", 64 * 64 * 2),
        Buffer::input("in", &input),
        Buffer::input("index", &index),
    ];
    Problem {
        label: format!("{columns} columns, transposed {transpose}, by mbarrier {by_mbarrier}"),
        buffers,
        launch: launch_of!(UnitGather {
            out, input = "in", index;
            columns, transpose, by_mbarrier,
        }),
        judge: Box::new(move |out| {
            exactly::<u16>("out", &out[0], |i| {
                let (row, column) = (i / 64, i % 64);
                let (r, c) = match transpose {
                    true => (row / 8 * 8 + column % 8, column / 8 * 8 + row % 8),
                    false => (row, column),
                };
                if index[r] < 0 || c >= columns {
                    0
                } else {
                    input[index[r] as usize * 64 + c]
                }
            })
        }),
    }
}

fn softmax() -> Problem {
    const ROWS: usize = 9;
    const COLUMNS: usize = 777;
    let mut random = Random(3);
    let input = random.normals(ROWS * COLUMNS);
    Problem {
        label: format!("{ROWS} rows of {COLUMNS}"),
        buffers: vec![
            Buffer::output("out", ROWS * COLUMNS * 4),
            Buffer::changed("warps_seen", &[0i32]),
            Buffer::input("in", &input),
        ],
        launch: launch_of!(UnitSoftmax {
            out, warps_seen, input = "in";
            rows: ROWS, columns: COLUMNS,
        }),
        judge: Box::new(move |out| {
            exactly::<i32>("warps_seen", &out[1], |_| ROWS as i32 * 8)?;
            let sum = |x: &[f32]| x.iter().map(|&v| f64::from(v).exp()).sum::<f64>();
            let sums: Vec<f64> = input.chunks(COLUMNS).map(sum).collect();
            Errors::within("out", &values::<f32>(&out[0]), |i| {
                let want = f64::from(input[i]).exp() / sums[i / COLUMNS];
                (want, 1e-5 * want)
            })
        }),
    }
}
