//! What NCCL refuses, misses or reports ends all ranks, with one message that says where and why.

use super::calls::train_small;
use super::stand_in;
use crate::common::*;
use crate::launchers::*;
use routegrad::device::Device;
use routegrad::dist::{Collective, DeviceRanks, ThreadRank, nccl};
use routegrad::tensor::Tensor;
use routegrad::tensor::dtype::DType;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// How a run of two ranks ends whose library fails so.
fn end_of(launcher: Launcher, fail: &str) -> (Vec<String>, f64) {
    let place = Place::new();
    let mut command = launcher.ranks(2, &train_small(&place, "run", &["--steps", "100000"]));
    command
        .env("ROUTEGRAD_NCCL", stand_in())
        .env("STAND_IN_NCCL_FAIL", fail);
    let run = Running::start(launcher, command, &place.path("run"), 2);
    let (success, stderr, seconds) = run.end(60.0);
    assert!(!success, "{fail}: {stderr}");
    println!(
        "{launcher:?}, {fail}, {seconds:.1} s: {:?}",
        errors(&stderr)
    );
    (errors(&stderr), seconds)
}

#[test]
#[ignore = "slow"]
fn a_call_that_is_refused_ends_all_ranks_and_names_function_rank_and_reason() {
    for launcher in launchers() {
        // In the first step, which is launched one by one, and in a replayed one.
        for call in [3, 150] {
            let (said, _) = end_of(launcher, &format!("1:refuse:{call}"));
            assert_eq!(said.len(), 1, "{said:?}");
            let text = &said[0];
            assert!(
                text.starts_with("error: rank 1 (") && text.contains(" failed at call "),
                "{text}"
            );
            assert!(
                text.contains("nccl") && text.contains("error 5 on rank 1: invalid usage"),
                "{text}"
            );
            assert!(text.contains(&format!("call {call} was refused")), "{text}");
        }
    }
}

#[test]
fn counts_that_differ_end_all_ranks() {
    for launcher in launchers() {
        let (said, _) = end_of(launcher, "1:differ:2");
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(
            said[0].contains("error 5 on rank") && said[0].contains(" bytes"),
            "{said:?}"
        );
    }
}

#[test]
#[ignore = "slow"]
fn a_rank_that_dies_within_a_call_is_named_and_ends_all() {
    for launcher in launchers() {
        for call in [2, 150] {
            let (said, _) = end_of(launcher, &format!("1:die:{call}"));
            // MPICH's launcher may kill the rank that reports before it does.
            let least = usize::from(launcher == Launcher::OpenMpi);
            assert!((least..=1).contains(&said.len()), "{said:?}");
            let named =
                |e: &String| e.starts_with("error: rank 1 (") && e.contains(" ended at call ");
            assert!(said.iter().all(named), "{said:?}");
        }
    }
}

#[test]
#[ignore = "slow"]
fn an_asynchronous_error_ends_what_is_under_way_on_all_ranks() {
    for launcher in launchers() {
        let (said, _) = end_of(launcher, "0:error:150");
        assert_eq!(said.len(), 1, "{said:?}");
        let text = &said[0];
        assert!(
            text.contains("an asynchronous call of NCCL") && text.contains("on rank 0"),
            "{text}"
        );
        assert!(
            text.contains("remote process exited or there was a network error"),
            "{text}"
        );
    }
}

#[test]
fn a_communicator_that_cannot_be_made_is_refused_with_nccls_words() {
    for launcher in launchers() {
        let (said, _) = end_of(launcher, "1:connect:0");
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("ncclCommInitRank"), "{said:?}");
    }
}

#[test]
fn a_library_that_is_missing_or_too_old_is_refused_before_anything_is_written() {
    for launcher in launchers() {
        let place = Place::new();
        let train = train_small(&place, "run", &["--steps", "10"]);
        let refused_with = |variables: &[(&str, &str)]| {
            let mut command = launcher.ranks(2, &train);
            command.envs(variables.iter().copied());
            let said = refused(command);
            assert_eq!(said.len(), 1, "{said:?}");
            said.into_iter().next().unwrap()
        };
        let missing = refused_with(&[("ROUTEGRAD_NCCL", "/nonexistent/libnccl.so.2")]);
        assert!(missing.contains("/nonexistent/libnccl.so.2"), "{missing}");
        assert!(missing.contains("install NVIDIA's NCCL"), "{missing}");
        let library = stand_in().to_str().unwrap();
        let old = [
            ("ROUTEGRAD_NCCL", library),
            ("STAND_IN_NCCL_VERSION", "2708"),
        ];
        let old = refused_with(&old);
        assert!(
            old.contains("2.14 or later") && old.contains("2.7.8"),
            "{old}"
        );
        let foreign = refused_with(&[("ROUTEGRAD_NCCL", "libc.so.6")]);
        assert!(foreign.contains("ncclGetVersion"), "{foreign}");
        assert!(!place.path("run").exists());
    }
}

#[test]
fn ranks_that_make_different_calls_are_told_before_bytes_move() {
    let errors = ThreadRank::run(2, |rank| {
        let place = rank.rank();
        let library = stand_in().to_str().unwrap();
        let dist = nccl::with_library(Arc::new(rank), Device::Sim, library).unwrap();
        let ranks = DeviceRanks::new(dist.clone(), Device::Sim);
        let own = Tensor::from_slice([16], &[place as i32; 16]).on(Device::Sim);
        let mut all = Tensor::unspecified(Device::Sim, DType::I32, [32]);
        ranks.all_gather(own.span(0..16), all.span_mut()).unwrap();
        assert_eq!(all.slice::<i32>(), [[0; 16], [1; 16]].as_flattened());
        let n = 8 + 4 * place;
        let mut all = Tensor::unspecified(Device::Sim, DType::I32, [2 * n]);
        let called = ranks.all_gather(own.span(0..n), all.span_mut());
        called.unwrap_err().to_string()
    });
    for error in errors {
        let calls = "all_gather on the device of 32 bytes";
        assert!(
            error.contains(calls) && error.contains("48 bytes on rank 1"),
            "{error}"
        );
    }
}

/// With NVIDIA's library named and no GPU: it loads, tells its version, gives an id, and refuses a communicator in words.
#[test]
fn nvidias_library_without_a_gpu_is_loaded_and_refuses_a_communicator_with_its_reason() {
    let Ok(library) = std::env::var("ROUTEGRAD_NCCL_REAL") else {
        println!("skipped: ROUTEGRAD_NCCL_REAL names no library");
        return;
    };
    if Command::new("nvidia-smi")
        .output()
        .is_ok_and(|o| o.status.success())
    {
        println!("skipped: this machine has a GPU");
        return;
    }
    let errors = ThreadRank::run(2, |rank| {
        let dist: Arc<dyn Collective> = Arc::new(rank);
        let connected = nccl::with_library(dist.clone(), Device::Sim, &library);
        let error = connected.map(drop).unwrap_err().to_string();
        // A rank that ends would end the other one's words.
        std::thread::sleep(Duration::from_millis(50));
        error
    });
    println!("{errors:?}");
    for error in errors {
        assert!(
            error.contains("ncclCommInitRank") && error.contains("rank"),
            "{error}"
        );
    }
}
