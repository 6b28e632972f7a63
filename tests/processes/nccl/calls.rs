//! The calls that a step makes, as the library sees them, and runs of processes that NCCL connects.

use super::{SMALL, config, stand_in};
use crate::common::*;
use crate::launchers::*;
use routegrad::Model;
use routegrad::train::optimizer::Shards;
use std::fs;
use std::path::Path;
use std::process::Command;

/// `train` of the small model in `place` on the simulator.
pub fn train_small(place: &Place, out: &str, arguments: &[&str]) -> Command {
    let mut command = program();
    command.arg("train").arg("--out").arg(place.path(out));
    command.arg("--data").arg(&place.text);
    for set in SMALL {
        command.args(["--set", set]);
    }
    command.args(["--set", "train.eval_sequences=4"]);
    command.args(arguments);
    command
}

/// The calls of a rank, a line each.
fn calls(log: &Path, rank: usize) -> Vec<String> {
    let text = fs::read_to_string(format!("{}.{rank}", log.display())).unwrap();
    text.lines().map(String::from).collect()
}

/// The ranks that exchange data in a level with rank `rank` of `ranks`, with the ranks whose shares each of them receives.
type Level = Vec<(usize, Vec<usize>)>;

/// The levels in which gradients are summed: within a node of `per_node` ranks, then across the nodes.
fn levels(rank: usize, ranks: usize, per_node: usize) -> Vec<Level> {
    let node = rank / per_node * per_node;
    let inside = (node..node + per_node).map(|r| (r, (r % per_node..ranks).step_by(per_node)));
    let inside = inside.map(|(r, shares)| (r, shares.collect()));
    let across = (rank % per_node..ranks).step_by(per_node);
    let levels: [Level; 2] = [inside.collect(), across.map(|r| (r, vec![r])).collect()];
    levels.into_iter().filter(|l| l.len() > 1).collect()
}

/// The calls of one step of `topk` on rank `rank` of `ranks`, `per_node` on each node, worked out from the model.
fn expected(rank: usize, ranks: usize, per_node: usize) -> Vec<String> {
    let config = config(&["router.name=\"topk\""]);
    let (experts, layers) = (config.model.num_experts, config.model.moe_layers().len());
    let model = Model::new(&config).unwrap();
    let all = |of: usize| Shards::new(&model.parameters, of, ranks);
    let (shards, count) = (all(rank), model.parameters.len());
    let mut calls = Vec::new();
    // Two micro-batches: the loads of each layer, for the balance loss.
    for _ in 0..2 * layers {
        calls.push(format!("all_gather {}", 8 * experts));
    }
    // Gradients, f32: to every other rank its numbers; the own ones stay on the device. They fit one bucket.
    let transfer = |calls: &mut Vec<String>, peer: usize, bytes: [usize; 2]| {
        let [sent, received] = bytes;
        calls.extend((sent > 0).then(|| format!("send {peer} {sent}")));
        calls.extend((received > 0).then(|| format!("receive {peer} {received}")));
    };
    let own = |level: &Level| level.iter().find(|(r, _)| *r == rank).unwrap().1.clone();
    let levels = levels(rank, ranks, per_node);
    for level in &levels {
        for (peer, shares) in level.iter().filter(|(peer, _)| *peer != rank) {
            for (theirs, ours) in shares.iter().zip(own(level)) {
                for i in 0..count {
                    let bytes = [*theirs, ours].map(|share| 4 * shards.of(i, share).len());
                    transfer(&mut calls, *peer, bytes);
                }
            }
        }
        calls.push("group".into());
    }
    // Losses, stop flag, statistics, loads, flags.
    for bytes in [
        8 * 3,
        8,
        8 * layers * (experts + 2),
        8 * layers * (experts + 1),
        4 * layers * 2,
    ] {
        calls.push(format!("all_gather {bytes}"));
    }
    // Sums of squares, as many as a rank has at most.
    let blocks = |of: usize| {
        (0..count)
            .map(|i| all(of).own(i).len().div_ceil(8192))
            .sum::<usize>()
    };
    let most = (0..ranks).map(blocks).max().unwrap();
    calls.push(format!("all_gather {}", 8 * most));
    // Weights: whole in f32, or the halves that operations read; the same levels from the last to the first.
    for level in levels.iter().rev() {
        for (i, parameter) in model.parameters.iter().enumerate() {
            let width = parameter.value.working().dtype().size();
            for (peer, shares) in level.iter().filter(|(peer, _)| *peer != rank) {
                for (theirs, ours) in shares.iter().zip(own(level)) {
                    let bytes = [ours, *theirs].map(|share| width * shards.of(i, share).len());
                    transfer(&mut calls, *peer, bytes);
                }
            }
        }
        calls.push("group".into());
    }
    calls
}

/// Trains six steps by `start` on `ranks` ranks, `per_node` on each node, and compares the calls of each rank and step.
fn assert_calls(ranks: usize, per_node: usize, start: impl Fn(&Command) -> Command) {
    let place = Place::new();
    let log = place.path("calls");
    let train = train_small(&place, "run", &["--router", "topk", "--steps", "6"]);
    let mut command = start(&train);
    command
        .env("ROUTEGRAD_NCCL", stand_in())
        .env("STAND_IN_NCCL_LOG", &log);
    let (_, stderr) = succeed(&mut command);
    assert!(
        stderr.contains("NCCL 2.32.3 moves device memory"),
        "{stderr}"
    );
    for rank in 0..ranks {
        let found = calls(&log, rank);
        let [first, steps @ .., last] = &found[..] else {
            panic!("{found:?}")
        };
        assert_eq!(
            (first.as_str(), last.as_str()),
            (&*format!("connect {ranks}"), "destroy")
        );
        let step = expected(rank, ranks, per_node);
        assert_eq!(
            steps.len(),
            6 * step.len(),
            "{:?}",
            &steps[..step.len() + 2]
        );
        for (n, own) in steps.chunks(step.len()).enumerate() {
            assert!(own == step, "rank {rank}, step {n}:\n{own:?}\n{step:?}");
        }
    }
}

#[test]
fn a_step_makes_the_calls_that_its_model_asks_for_and_a_replayed_one_the_same() {
    for (launcher, ranks) in launchers().into_iter().zip([2, 4]) {
        assert_calls(ranks, ranks, |train| launcher.ranks(ranks, train));
    }
}

#[test]
fn on_two_nodes_gradients_are_summed_within_a_node_before_they_leave_it() {
    beside_other_tests();
    assert_calls(4, 2, |train| {
        let nodes = ["GROUP_RANK=0", "GROUP_RANK=1"].map(|node| {
            let mut own = Command::new("env");
            own.arg(node).arg(train.get_program());
            own.args(["--threads", "1"]).args(train.get_args());
            own
        });
        Launcher::Torchrun.start(&[(2, &nodes[0]), (2, &nodes[1])])
    });
}

#[test]
#[ignore = "slow"]
fn processes_that_nccl_connects_end_in_the_bytes_of_mpi_alone_and_go_on_from_its_checkpoint() {
    for launcher in launchers() {
        let place = Place::new();
        for router in ["default", "remoe"] {
            let [own, by_mpi] = ["nccl", "mpi"].map(|by| format!("{router}-{by}"));
            let set = [
                "--router",
                router,
                "--steps",
                "6",
                "--set",
                "train.checkpoint_interval=3",
            ];
            let mut command = launcher.ranks(2, &train_small(&place, &own, &set));
            let (_, stderr) = succeed(command.env("ROUTEGRAD_NCCL", stand_in()));
            assert!(
                stderr.contains("NCCL") && !stderr.contains("one by one"),
                "{stderr}"
            );
            let (_, stderr) = succeed(&mut launcher.ranks(2, &train_small(&place, &by_mpi, &set)));
            assert!(!stderr.contains("NCCL"), "{stderr}");
            assert_same_end(&place.path(&own), &place.path(&by_mpi), 6);
            // From the middle of the one to the end of the other.
            fs::remove_dir_all(place.path(&own).join("checkpoints/step-6")).unwrap();
            let mut command = launcher.ranks(2, &place.resume(&own));
            let (_, stderr) = succeed(command.env("ROUTEGRAD_NCCL", stand_in()));
            assert!(stderr.contains("from step 3"), "{stderr}");
            assert_same_end(&place.path(&own), &place.path(&by_mpi), 6);
        }
    }
}

/// NCCL requires that all ranks replay the graph of a step, or none: all record the last step and launch its kernels.
#[test]
#[ignore = "slow"]
fn a_timeline_is_recorded_by_all_ranks_and_written_by_the_first() {
    let Some(launcher) = launchers().into_iter().next() else {
        return;
    };
    let place = Place::new();
    let options = ["--router", "topk", "--steps", "6", "--timeline"];
    let mut command = launcher.ranks(2, &train_small(&place, "run", &options));
    let (_, stderr) = succeed(command.env("ROUTEGRAD_NCCL", stand_in()));
    assert_eq!(
        stderr.matches("grouped_gemm_forward").count(),
        1,
        "{stderr}"
    );
    assert!(place.path("run").join("timeline.json").is_file());
}

#[test]
#[ignore = "slow"]
fn a_signal_to_the_launcher_stops_all_ranks_after_the_same_step() {
    for launcher in launchers() {
        let place = Place::new();
        let out = place.path("run");
        let mut command = launcher.ranks(2, &train_small(&place, "run", &["--steps", "100000"]));
        command.env("ROUTEGRAD_NCCL", stand_in());
        let mut child = command.spawn().unwrap();
        assert!(wait_for_step(&mut child, &out, 4));
        signal(child.id(), "-USR1");
        let output = child.wait_with_output().unwrap();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{launcher:?}: {stdout}{stderr}");
        assert_eq!(
            stdout.matches("stopped and saved at step").count(),
            1,
            "{stdout}"
        );
    }
}
