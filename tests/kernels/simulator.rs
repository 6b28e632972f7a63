//! The simulator's own tests: single instructions against their definition (the library's cases, which hold hardware to the
//! same), and faults that it must name.

use crate::support::check_schedules;
use crate::support::refusals::{refuses, stream};
use crate::support::schedules::{counted, is_plain, table, with_options};
use routegrad::device::Device;
use routegrad::error::Error;
use routegrad::kernels::bindings::ROUTEGRAD_SIM_LATE;
use routegrad::kernels::unit::{UnitFault, UnitWgmma};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::DType;

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

#[test]
fn counters_equal_what_the_instructions_moved() {
    let zeros = |dtype, shape: [usize; 2]| Tensor::zeros(Device::Sim, dtype, shape);
    let (a, b) = (zeros(DType::Bf16, [64, 64]), zeros(DType::Bf16, [128, 64]));
    let mut c = zeros(DType::F32, [64, 128]);
    let kernel = UnitWgmma {
        c: c.output().unwrap(),
        a: a.input().unwrap(),
        b: b.input().unwrap(),
        n: 128,
        a_mn_major: false,
        b_mn_major: false,
        a_in_registers: false,
        swizzle: 1,
    };
    let counters = counted(|| kernel.launch(&stream()).unwrap_or_else(|e| panic!("{e}")));
    assert_eq!((counters.launches, counters.blocks), (1, 1));
    assert_eq!(counters.tensor_flops, 2 * 64 * 128 * 64);
    assert_eq!(counters.bytes_read, (64 + 128) * 64 * 2);
}

/// The text with which the simulator ends a launch of fault number `fault`; none when it ran through.
fn fault_text(fault: i32) -> Option<String> {
    let mut out = Tensor::zeros(Device::Sim, DType::I32, [512]);
    let late = |o: &mut routegrad::kernels::launchers::Options| {
        o.copies = ROUTEGRAD_SIM_LATE as i32;
        o.products = ROUTEGRAD_SIM_LATE as i32;
    };
    let kernel = UnitFault {
        out: out.output().unwrap(),
        fault,
    };
    let status = with_options(late, || kernel.launch(&stream()));
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
    refuses!(
        UnitWgmma {
            c, a, b;
            n: 64, a_mn_major: false, b_mn_major: false, a_in_registers: false, swizzle: 1
        }
        OUT_OF_RANGE { n: 65 }
    );
}

#[test]
fn options_outside_their_range_are_refused() {
    let mut options = table().options().expect("a simulator");
    options.threads = 0;
    assert!(table().set_options(&options).is_err());
    assert!(is_plain() || table().build().starts_with("sim-"));
}
