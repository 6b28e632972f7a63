//! The simulator's own tests: single instructions against their definition (the library's cases, which hold hardware to the
//! same), and faults that it must name.

use crate::support::check_schedules;
use crate::support::schedules::{counted, is_plain, table, with_options};
use routegrad::error::Error;
use routegrad::kernels::bindings::ROUTEGRAD_SIM_LATE;
use routegrad::launch;
use std::ptr::{null, null_mut};

#[test]
fn wgmma_is_exact_on_small_integers_in_every_layout() {
    check_schedules("unit_wgmma");
}

#[test]
fn tma_loads_swizzle_as_specified_and_fill_with_zeros_outside() {
    check_schedules("unit_tma_load");
}

#[test]
fn tma_stores_write_the_inside_of_a_box_and_nothing_else() {
    check_schedules("unit_tma_store");
}

#[test]
fn multicast_reaches_the_blocks_of_the_mask_and_no_other() {
    check_schedules("unit_multicast");
}

#[test]
fn gathered_rows_arrive_whole_cut_or_as_zeros_and_matrices_transpose() {
    check_schedules("unit_gather");
}

#[test]
fn shuffles_barriers_and_atomics_make_a_softmax() {
    check_schedules("unit_softmax");
}

/// Memory aligned as launchers demand.
fn aligned(bytes: usize) -> Vec<u128> {
    vec![u128::MAX; bytes / 16]
}

#[test]
fn counters_equal_what_the_instructions_moved() {
    let (a, b) = (aligned(64 * 64 * 2), aligned(128 * 64 * 2));
    let mut c = aligned(64 * 128 * 4);
    let counters = counted(|| {
        // SAFETY: the shapes of unit_wgmma with n = 128.
        unsafe {
            launch!(
                table(),
                unit_wgmma(
                    c.as_mut_ptr().cast(),
                    a.as_ptr().cast(),
                    b.as_ptr().cast(),
                    128,
                    0,
                    0,
                    0,
                    1,
                    null_mut()
                )
            )
        }
        .unwrap_or_else(|e| panic!("{e}"));
    });
    assert_eq!((counters.launches, counters.blocks), (1, 1));
    assert_eq!(counters.tensor_flops, 2 * 64 * 128 * 64);
    assert_eq!(counters.bytes_read, (64 + 128) * 64 * 2);
}

/// The text with which the simulator ends a launch of fault number `fault`; none when it ran through.
fn fault_text(fault: i32) -> Option<String> {
    let mut out = aligned(512 * 4);
    let late = |o: &mut routegrad::kernels::launchers::Options| {
        o.copies = ROUTEGRAD_SIM_LATE as i32;
        o.products = ROUTEGRAD_SIM_LATE as i32;
    };
    // SAFETY: the kernels write at most 384 words.
    let status = with_options(late, || unsafe {
        launch!(
            table(),
            unit_fault(out.as_mut_ptr().cast(), fault, null_mut())
        )
    });
    status.err().map(|e| match e {
        Error::Device { text, .. } => text,
        other => panic!("{other}"),
    })
}

/// What the report of each fault of `kernels/unit_faults.cu` must say, in their order there.
const FAULTS: [&str; 20] = [
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
    "begins at element 4 of a row",
    "a store to a box that begins at -8",
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
        let text =
            fault_text(fault as i32).unwrap_or_else(|| panic!("fault {fault} ({expected}) passed"));
        assert!(
            text.contains(expected),
            "fault {fault}: \"{expected}\" is not in: {text}"
        );
        assert!(
            fault == 5 || text.contains("unit_faults.cu:"),
            "fault {fault} names no line: {text}"
        );
    }
}

#[test]
fn the_race_build_finds_every_race_and_no_more() {
    if !table().build().starts_with("sim-race") {
        return;
    }
    for (i, expected) in RACES.iter().enumerate() {
        let text = fault_text((FAULTS.len() + i) as i32)
            .unwrap_or_else(|| panic!("race {i} ({expected}) passed"));
        assert!(
            text.contains("race at") && text.contains(expected),
            "race {i}: \"{expected}\" is not in: {text}"
        );
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
    let buffer = aligned(64 * 64 * 4);
    let before = buffer.clone();
    let p = buffer.as_ptr().cast_mut().cast::<f32>();
    let call = |c: *mut f32, b: *const std::ffi::c_void, n: i32| {
        // SAFETY: refused before any access.
        let counters = counted(|| {
            let result = unsafe {
                launch!(
                    table(),
                    unit_wgmma(c, p.cast(), b, n, 0, 0, 0, 1, null_mut())
                )
            };
            let text = result.expect_err("refused").to_string();
            let argument = if c.is_null() || c as usize % 16 != 0 {
                "`c`"
            } else if b.is_null() {
                "`b`"
            } else {
                "`n`"
            };
            assert!(
                text.contains("unit_wgmma") && text.contains(argument),
                "{text}"
            );
        });
        assert_eq!(counters.launches, 0);
    };
    call(null_mut(), p.cast(), 64);
    call(p.wrapping_byte_add(4), p.cast(), 64);
    call(p, null(), 64);
    call(p, p.cast(), 65);
    assert_eq!(buffer, before);
}

#[test]
fn options_outside_their_range_are_refused() {
    let mut options = table().options().expect("a simulator");
    options.threads = 0;
    assert!(table().set_options(&options).is_err());
    assert!(is_plain() || table().build().starts_with("sim-"));
}
