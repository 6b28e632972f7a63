//! The simulator's own tests: single instructions against their definition, and faults that it must name. The launchers
//! are ordinary ones (`kernels/unit.cu`), so that the first group can be held against hardware too.

mod support;

use half::bf16;
use routegrad::device::bindings::{ROUTEGRAD_SIM_LATE, routegrad_unit_box};
use routegrad::error::Error;
use routegrad::launch;
use std::ptr::{null, null_mut};
use support::guarded::Guarded;
use support::numbers::Random;
use support::schedules::{counted, is_plain, schedules, table, with_options};

const SPAN_ELEMENTS: [usize; 4] = [8, 64, 32, 16];

fn small_integers(random: &mut Random, len: usize) -> Guarded<bf16> {
    let values: Vec<bf16> = (0..len).map(|_| bf16::from_f32(random.below(15) as f32 - 7.0)).collect();
    Guarded::from_slice(&values)
}

#[test]
fn wgmma_is_exact_on_small_integers_in_every_layout() {
    let mut random = Random(1);
    for schedule in schedules().into_iter().take(5) {
        for n in [16, 64, 96, 128, 176, 256] {
            for layout in 0..24 {
                let (swizzle, a_mn, b_mn, registers) = (1 + layout % 3, layout / 3 % 2, layout / 6 % 2, layout / 12);
                if (b_mn == 1 && n % SPAN_ELEMENTS[swizzle] != 0) || (registers == 1 && a_mn == 1) {
                    continue;
                }
                let (a, b) = (small_integers(&mut random, 64 * 64), small_integers(&mut random, 64 * n));
                let mut c = Guarded::<f32>::poisoned(64 * n);
                // SAFETY: A is [64, 64], B [n, 64] or [64, n], C [64, n].
                let status = schedule.run(|| unsafe {
                    launch!(table(), unit_wgmma(c.as_mut_ptr(), a.as_ptr().cast(), b.as_ptr().cast(), n as i32, a_mn as i32,
                        b_mn as i32, registers as i32, swizzle as i32, null_mut()))
                });
                status.unwrap_or_else(|e| panic!("{e}"));
                c.check_guards("c");
                for (i, j) in (0..64).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let want: f32 = (0..64)
                        .map(|k| {
                            let x = a.as_slice()[if a_mn == 1 { k * 64 + i } else { i * 64 + k }];
                            let y = b.as_slice()[if b_mn == 1 { k * n + j } else { j * 64 + k }];
                            x.to_f32() * y.to_f32()
                        })
                        .sum();
                    let place = format!("n {n} swizzle {swizzle} a_mn {a_mn} b_mn {b_mn} registers {registers} [{i}, {j}]");
                    assert!(c.as_slice()[i * n + j] == want, "{place}: {} instead of {want}", c.as_slice()[i * n + j]);
                }
            }
        }
    }
}

/// Boxes inside, across each edge, and wholly outside of a tensor [z 5, y 40, x 72].
fn boxes() -> Vec<routegrad_unit_box> {
    let mut all = Vec::new();
    for swizzle in 0..4 {
        let width = SPAN_ELEMENTS[swizzle] as i32;
        for rank in [2, 3] {
            for at in [[8, 4, 1], [-3, 4, 1], [69, 4, 1], [8, -2, 1], [8, 37, 1], [8, 4, -1], [8, 4, 4], [80, 4, 1], [-3, 38, 4]] {
                if rank == 2 && at[2] != 1 {
                    continue;
                }
                let extent = [72, 40, 5];
                all.push(routegrad_unit_box { rank, extent, box_: [width, 8, 2], at, swizzle: swizzle as i32 });
            }
        }
    }
    all
}

/// Index in the tensor of element (x, y, z) of the box, where that is inside.
fn element(b: &routegrad_unit_box, x: i32, y: i32, z: i32) -> Option<usize> {
    let [x, y, z] = [b.at[0] + x, b.at[1] + y, if b.rank == 3 { b.at[2] + z } else { 0 }];
    let depth = if b.rank == 3 { b.extent[2] } else { 1 };
    let inside = (0..b.extent[0]).contains(&x) && (0..b.extent[1]).contains(&y) && (0..depth).contains(&z);
    inside.then_some(((z * b.extent[1] + y) * b.extent[0] + x) as usize)
}

/// Where the box's element lies in shared memory, in elements: rows follow each other, and the 16-byte chunks of a row are
/// XORed by the row's place in the pattern.
fn place(b: &routegrad_unit_box, x: i32, y: i32, z: i32) -> usize {
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

fn elements(b: &routegrad_unit_box) -> impl Iterator<Item = (i32, i32, i32)> + use<> {
    let [w, h, d] = [b.box_[0], b.box_[1], if b.rank == 3 { b.box_[2] } else { 1 }];
    (0..d).flat_map(move |z| (0..h).flat_map(move |y| (0..w).map(move |x| (x, y, z))))
}

#[test]
fn tma_loads_swizzle_as_specified_and_fill_with_zeros_outside() {
    let tensor: Vec<u16> = (0..72 * 40 * 5).map(|i| i as u16 + 1).collect();
    let tensor = Guarded::from_slice(&tensor);
    for b in boxes() {
        let mut out = Guarded::<u16>::poisoned(elements(&b).count());
        // SAFETY: the tensor has the extents of the box's description; the result the size of the box.
        unsafe { launch!(table(), unit_tma_load(out.as_mut_ptr().cast(), tensor.as_ptr().cast(), &b, null_mut())) }
            .unwrap_or_else(|e| panic!("{b:?}: {e}"));
        out.check_guards("box");
        for (x, y, z) in elements(&b) {
            let want = element(&b, x, y, z).map_or(0, |i| tensor.as_slice()[i]);
            assert_eq!(out.as_slice()[place(&b, x, y, z)], want, "{b:?} at ({x}, {y}, {z})");
        }
    }
}

#[test]
fn tma_stores_write_the_inside_of_a_box_and_nothing_else() {
    for b in boxes() {
        let count = elements(&b).count();
        let shared: Vec<u16> = (0..count).map(|i| i as u16 + 1).collect();
        let shared = Guarded::from_slice(&shared);
        let mut tensor = Guarded::<u16>::poisoned(72 * 40 * if b.rank == 3 { 5 } else { 1 });
        // SAFETY: as above.
        unsafe { launch!(table(), unit_tma_store(tensor.as_mut_ptr().cast(), shared.as_ptr().cast(), &b, null_mut())) }
            .unwrap_or_else(|e| panic!("{b:?}: {e}"));
        tensor.check_guards("tensor");
        let mut want = vec![u16::MAX; tensor.as_slice().len()];
        for (x, y, z) in elements(&b) {
            if let Some(i) = element(&b, x, y, z) {
                want[i] = shared.as_slice()[place(&b, x, y, z)];
            }
        }
        assert!(tensor.as_slice() == want, "{b:?}");
    }
}

#[test]
fn multicast_reaches_the_blocks_of_the_mask_and_no_other() {
    const ROUNDS: usize = 5;
    let tensor: Vec<u16> = (0..ROUNDS * 4096).map(|i| (i * 7) as u16).collect();
    let tensor = Guarded::from_slice(&tensor);
    for schedule in schedules() {
        // Each block to both; each to itself; each to the other; both to the first.
        for masks in [[3, 3], [1, 2], [2, 1], [1, 1]] {
            let mut out = Guarded::<u16>::poisoned(4 * ROUNDS * 4096);
            // SAFETY: the tensor is [64 rounds, 64], the result [2 clusters of 2, rounds, 64, 64].
            let status = schedule.run(|| unsafe {
                launch!(table(), unit_multicast(out.as_mut_ptr().cast(), tensor.as_ptr().cast(), ROUNDS as i32, 2, masks[0],
                    masks[1], null_mut()))
            });
            status.unwrap_or_else(|e| panic!("{masks:?} {schedule:?}: {e}"));
            for (i, &got) in out.as_slice().iter().enumerate() {
                let (block, round, half) = (i / (ROUNDS * 4096), i / 4096 % ROUNDS, i % 4096 / 2048);
                let received = masks[half] >> (block % 2) & 1 == 1;
                let want = if received { tensor.as_slice()[round * 4096 + i % 4096] } else { u16::MAX };
                assert_eq!(got, want, "{masks:?} {schedule:?} element {i}");
            }
        }
    }
}

#[test]
fn gathered_rows_arrive_whole_cut_or_as_zeros_and_matrices_transpose() {
    let input: Vec<u16> = (0..100 * 64).map(|i| i as u16 + 1).collect();
    let input = Guarded::from_slice(&input);
    let mut random = Random(2);
    let index: Vec<i32> = (0..64).map(|_| random.below(110) as i32 - 10).collect();
    let index = Guarded::from_slice(&index);
    for schedule in schedules() {
        for (columns, transpose, by_mbarrier) in [(64, 0, 0), (64, 1, 0), (37, 0, 1), (37, 1, 1), (0, 0, 0)] {
            let mut out = Guarded::<u16>::poisoned(64 * 64);
            // SAFETY: the indices are below the 100 rows of the input; the result is [64, 64].
            let status = schedule.run(|| unsafe {
                launch!(table(), unit_gather(out.as_mut_ptr().cast(), input.as_ptr().cast(), index.as_ptr(), columns,
                    transpose, by_mbarrier, null_mut()))
            });
            status.unwrap_or_else(|e| panic!("{schedule:?}: {e}"));
            for (row, column) in (0..64).flat_map(|r| (0..64).map(move |c| (r, c))) {
                let (r, c) = match transpose {
                    1 => (row / 8 * 8 + column % 8, column / 8 * 8 + row % 8),
                    _ => (row, column),
                };
                let from = index.as_slice()[r];
                let want = if from < 0 || c >= columns as usize { 0 } else { input.as_slice()[from as usize * 64 + c] };
                assert_eq!(out.as_slice()[row * 64 + column], want, "{schedule:?} [{row}, {column}]");
            }
        }
    }
}

#[test]
fn shuffles_barriers_and_atomics_make_a_softmax() {
    const ROWS: usize = 9;
    const COLUMNS: usize = 777;
    let mut random = Random(3);
    let input: Vec<f32> = (0..ROWS * COLUMNS).map(|_| random.normal()).collect();
    let mut bytes = Vec::new();
    for schedule in schedules() {
        let mut out = Guarded::<f32>::poisoned(ROWS * COLUMNS);
        let mut warps = 0i32;
        let input = Guarded::from_slice(&input);
        // SAFETY: both are [rows, columns].
        let status = schedule.run(|| unsafe {
            launch!(table(), unit_softmax(out.as_mut_ptr(), &mut warps, input.as_ptr(), ROWS as i32, COLUMNS as i32,
                null_mut()))
        });
        status.unwrap_or_else(|e| panic!("{schedule:?}: {e}"));
        assert_eq!(warps, ROWS as i32 * 8);
        for (got, x) in out.as_slice().chunks(COLUMNS).zip(input.as_slice().chunks(COLUMNS)) {
            let sum: f64 = x.iter().map(|&v| f64::from(v).exp()).sum();
            for (&g, &v) in got.iter().zip(x) {
                let want = f64::from(v).exp() / sum;
                assert!((f64::from(g) - want).abs() <= 1e-5 * want, "{g} instead of {want}");
            }
        }
        bytes.push(out.as_bytes().to_vec());
    }
    assert!(bytes.windows(2).all(|w| w[0] == w[1]), "the result depends on the schedule");
}

#[test]
fn counters_equal_what_the_instructions_moved() {
    let (a, b) = (Guarded::<bf16>::poisoned(64 * 64), Guarded::<bf16>::poisoned(128 * 64));
    let mut c = Guarded::<f32>::poisoned(64 * 128);
    let counters = counted(|| {
        // SAFETY: the shapes of unit_wgmma with n = 128.
        unsafe { launch!(table(), unit_wgmma(c.as_mut_ptr(), a.as_ptr().cast(), b.as_ptr().cast(), 128, 0, 0, 0, 1, null_mut())) }
            .unwrap_or_else(|e| panic!("{e}"));
    });
    assert_eq!((counters.launches, counters.blocks), (1, 1));
    assert_eq!(counters.tensor_flops, 2 * 64 * 128 * 64);
    assert_eq!(counters.bytes_read, (64 + 128) * 64 * 2);
}

/// The text with which the simulator ends a launch of fault number `fault`; none when it ran through.
fn fault_text(fault: i32) -> Option<String> {
    let mut out = Guarded::<i32>::poisoned(512);
    let late = |o: &mut routegrad::device::launchers::Options| {
        o.copies = ROUTEGRAD_SIM_LATE as i32;
        o.products = ROUTEGRAD_SIM_LATE as i32;
    };
    // SAFETY: the kernels write at most 384 words.
    let status = with_options(late, || unsafe { launch!(table(), unit_fault(out.as_mut_ptr(), fault, null_mut())) });
    status.err().map(|e| match e {
        Error::Device { text, .. } => text,
        other => panic!("{other}"),
    })
}

/// What the report of each fault of `kernels/unit_faults.cu` must say, in their order there.
const FAULTS: [&str; 18] = [
    "1 of 2 arrivals and 0 bytes missing",
    "16 bytes missing",
    "barrier 1, 64 of 96 threads arrived",
    "registers: needs 16 more, the pool has 0",
    "all lanes of a warp must take part",
    "setmaxnreg was executed by a part of a warpgroup",
    "is not initialised",
    "is initialised a second time",
    "initialised without fence_mbar_init",
    "more arrivals in one phase than the 2 expected",
    "is not aligned to 1024",
    "mask 0x3 in a cluster of 1",
    "TMA load into a block that has ended",
    "may still read shared memory",
    "touched since the last wgmma_fence",
    "did not wait for",
    "disagree on the operation",
    "its lanes execute different operations",
];
/// And of the races, which only the race build sees.
const RACES: [&str; 7] = [
    "thread 128 writes it",
    "race at shared memory",
    "race at shared memory",
    "race at global memory",
    "without the writer's fence_proxy_async",
    "TMA load",
    "TMA store of thread 0 reads it",
];
const NO_RACE: i32 = (FAULTS.len() + RACES.len()) as i32;

#[test]
fn every_fault_is_named() {
    for (fault, expected) in FAULTS.iter().enumerate() {
        let text = fault_text(fault as i32).unwrap_or_else(|| panic!("fault {fault} ({expected}) passed"));
        assert!(text.contains(expected), "fault {fault}: \"{expected}\" is not in: {text}");
        assert!(fault == 5 || text.contains("unit_faults.cu:"), "fault {fault} names no line: {text}");
    }
}

#[test]
fn the_race_build_finds_every_race_and_no_more() {
    if !table().build().starts_with("sim-race") {
        return;
    }
    for (i, expected) in RACES.iter().enumerate() {
        let text = fault_text((FAULTS.len() + i) as i32).unwrap_or_else(|| panic!("race {i} ({expected}) passed"));
        assert!(text.contains("race at") && text.contains(expected), "race {i}: \"{expected}\" is not in: {text}");
    }
    assert_eq!(fault_text(NO_RACE), None);
}

#[test]
fn a_launch_after_a_fault_is_whole() {
    assert!(fault_text(0).is_some());
    shuffles_barriers_and_atomics_make_a_softmax();
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let buffer = Guarded::<f32>::poisoned(64 * 64);
    let before = buffer.as_bytes().to_vec();
    let p = buffer.as_ptr().cast_mut();
    let call = |c: *mut f32, b: *const std::ffi::c_void, n: i32| {
        // SAFETY: refused before any access.
        let counters = counted(|| {
            let result = unsafe { launch!(table(), unit_wgmma(c, p.cast(), b, n, 0, 0, 0, 1, null_mut())) };
            let text = result.expect_err("refused").to_string();
            let argument = if c.is_null() || c as usize % 16 != 0 { "`c`" } else if b.is_null() { "`b`" } else { "`n`" };
            assert!(text.contains("unit_wgmma") && text.contains(argument), "{text}");
        });
        assert_eq!(counters.launches, 0);
    };
    call(null_mut(), p.cast(), 64);
    call(p.wrapping_byte_add(4), p.cast(), 64);
    call(p, null(), 64);
    call(p, p.cast(), 65);
    assert_eq!(buffer.as_bytes(), before);
}

#[test]
fn options_outside_their_range_are_refused() {
    let mut options = table().options().expect("a simulator");
    options.threads = 0;
    assert!(table().set_options(&options).is_err());
    assert!(is_plain() || table().build().starts_with("sim-"));
}
