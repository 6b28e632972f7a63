//! What ranks train does not depend on what moves their bytes, and a steady step leaves the host alone.

use super::{config, stand_in};
use crate::common::{Place, succeed};
use crate::launchers::{beside_other_tests, launchers};
use routegrad::Trainer;
use routegrad::config::Config;
use routegrad::device::{Device, counters};
use routegrad::dist::{self, Collective, Ranks, ThreadRank, nccl};
use routegrad::error::Result;
use routegrad::report::metrics::Record;
use routegrad::routers::ROUTERS;
use routegrad::train::{Hook, StepReport};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A rank whose host's calls are counted, on a node of so many ranks.
struct Counted {
    rank: Arc<dyn Collective>,
    calls: Arc<AtomicUsize>,
    per_node: usize,
}

impl Collective for Counted {
    fn rank(&self) -> usize {
        self.rank.rank()
    }

    fn size(&self) -> usize {
        self.rank.size()
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.rank.all_gather(own, all)
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.rank.exchange(own, all)
    }

    fn leave(&self, why: &str) {
        self.rank.leave(why);
    }

    fn shares_process(&self) -> bool {
        self.rank.shares_process()
    }

    fn ranks_per_node(&self) -> usize {
        self.per_node
    }
}

/// What a rank ends with, and what its last step did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct End {
    /// Of weights and moments, its share alone where it has no more, and of the router's state.
    digests: Vec<(String, String)>,
    /// Bits of the weights as operations read them, in a digest.
    working: String,
    /// Bits of f64: JSON would round.
    losses: Vec<u64>,
    /// Of the last step: calls between hosts, and what the device did.
    calls: usize,
    replays: u64,
    reads: u64,
    allocations: u64,
}

/// The third is recorded, the fourth replayed.
const STEPS: usize = 4;

fn trained(config: &Config, rank: Arc<dyn Collective>, by_nccl: bool) -> End {
    let per_node = rank.ranks_per_node();
    trained_on_nodes(config, rank, by_nccl, per_node)
}

fn trained_on_nodes(
    config: &Config,
    rank: Arc<dyn Collective>,
    by_nccl: bool,
    per_node: usize,
) -> End {
    let calls = Arc::new(AtomicUsize::new(0));
    let mut dist: Arc<dyn Collective> = Arc::new(Counted {
        rank,
        calls: calls.clone(),
        per_node,
    });
    if by_nccl {
        let library = stand_in().to_str().unwrap();
        dist = nccl::with_library(dist, Device::Sim, library).unwrap();
    }
    let mut run = Trainer::builder(config.clone())
        .ranks(dist)
        .build()
        .unwrap();
    let mut losses = Vec::new();
    let mut in_flight = None;
    for step in 1..=STEPS {
        let launched = in_flight.take().unwrap_or_else(|| {
            counters::take();
            calls.store(0, Ordering::SeqCst);
            run.launch().unwrap()
        });
        // The last step is launched as in a run: before the results of a replayed step are read.
        if step + 1 == STEPS && launched.was_replayed() {
            counters::take();
            calls.store(0, Ordering::SeqCst);
            in_flight = Some(run.launch().unwrap());
        }
        let report = run.finish(launched).unwrap();
        assert_eq!(report.skipped, None);
        losses.extend(
            [report.cross_entropy, report.auxiliary, report.gradient_norm].map(f64::to_bits),
        );
    }
    let last = counters::take();
    let calls = calls.load(Ordering::SeqCst);
    let digests = run.digests().unwrap().into_iter();
    let working = run.model.parameters.iter();
    let working = working.flat_map(|p| p.value.working().to_f64().unwrap());
    let working: Vec<u8> = working.flat_map(f64::to_le_bytes).collect();
    End {
        digests: digests
            .map(|(name, d)| (name, d.to_hex().to_string()))
            .collect(),
        working: blake3::hash(&working).to_hex().to_string(),
        losses,
        calls,
        replays: last.replays,
        reads: last.reads,
        allocations: last.allocations,
    }
}

/// The same of ranks that are threads, whose bytes the host moves: what several tests compare with.
fn trained_in_threads(config: &Config, ranks: usize) -> Vec<End> {
    static KNOWN: Mutex<BTreeMap<(String, usize), Vec<End>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let train = || ThreadRank::run(ranks, |rank| trained(config, Arc::new(rank), false));
    let key = (config.to_toml().unwrap(), ranks);
    known.entry(key).or_insert_with(train).clone()
}

/// Every router on two ranks, `default` on more: with settings that make what it sums over ranks count.
fn configs(ranks: usize) -> Vec<Config> {
    let mut all = every_router();
    all.retain(|config| ranks == 2 || config.router.name == "default" && !is_drawn_by_host(config));
    all
}

/// Whether the host draws the tokens of sampled vectors, so that it waits within a step.
fn is_drawn_by_host(config: &Config) -> bool {
    config.to_toml().unwrap().contains("source = \"sampled\"")
}

fn every_router() -> Vec<Config> {
    let mut all: Vec<Config> = ROUTERS
        .iter()
        .map(|r| {
            let name = format!("router.name=\"{}\"", r.name);
            let further = match r.name {
                "remoe" => "router.initial_lambda=0.01",
                "lossfree" => "router.update_rate=0.01",
                _ => "train.seed=1",
            };
            config(&[&name, "model.top_k=2", further])
        })
        .collect();
    // Vectors of tokens that the host draws: such steps are not replayed.
    for further in ["router.samples=5", "router.shrink=\"running\""] {
        let sampled = ["router.name=\"default\"", "router.source=\"sampled\""];
        all.push(config(
            &[&sampled[..], &["model.top_k=2", further]].concat(),
        ));
    }
    let further = ["train.recompute=true", "train.bf16_moments=true"];
    for router in ["remoe", "default"] {
        let name = format!("router.name=\"{router}\"");
        all.push(config(&[&[&*name, "model.top_k=2"], &further[..]].concat()));
    }
    all
}

/// What all ranks have alike: the weights as operations read them, losses, and the router's state.
fn shared(end: &End) -> (&str, &[u64], Vec<&(String, String)>) {
    let states = end.digests.iter();
    let states = states.filter(|(name, _)| name.contains(" of MoE layer "));
    (&end.working, &end.losses, states.collect())
}

#[test]
#[ignore = "slow"]
fn every_router_ends_in_the_same_bytes_whether_the_host_or_nccl_moves_them() {
    beside_other_tests();
    for ranks in [2, 4] {
        for config in configs(ranks) {
            let router = &config.router.name;
            let one = trained_in_threads(&config, 1);
            let ends = ThreadRank::run(ranks, |rank| trained(&config, Arc::new(rank), true));
            let by_host = trained_in_threads(&config, ranks);
            for (rank, (end, other)) in ends.iter().zip(&by_host).enumerate() {
                let place = format!("{router}, rank {rank} of {ranks}");
                assert_eq!(end.digests, other.digests, "{place}: NCCL and the host");
                assert_eq!(
                    shared(end),
                    shared(&ends[0]),
                    "{place}: another end than rank 0"
                );
                if !is_drawn_by_host(&config) {
                    assert_eq!(end.calls, 0, "{place}: calls between hosts");
                    assert_eq!(end.reads, 0, "{place}: reads of device memory");
                }
            }
            for (found, expected) in ends[0].losses.iter().zip(&one[0].losses) {
                let [found, expected] = [*found, *expected].map(f64::from_bits);
                let difference = (found - expected).abs() / expected.abs().max(1e-3);
                assert!(
                    difference <= 2e-2,
                    "{router}, {ranks} ranks: {found} for {expected}"
                );
            }
        }
    }
}

/// Not a test of its own: what each process of the next one does.
#[test]
fn a_rank_of_the_test_of_replayed_steps() {
    let Ok(place) = std::env::var("ROUTEGRAD_TEST_REPLAYS") else {
        return;
    };
    let dist = dist::start(Ranks::Auto, Duration::from_secs(60)).unwrap();
    let ends: Vec<End> = configs(dist.size())
        .iter()
        .map(|config| trained(config, dist.clone(), true))
        .collect();
    let file = format!("{place}/{}", dist.rank());
    std::fs::write(file, serde_json::to_vec(&ends).unwrap()).unwrap();
    assert!(dist::conclude(Ok(())).is_ok());
}

#[test]
#[ignore = "slow"]
fn a_steady_step_of_processes_is_one_graph_without_a_call_of_the_host_and_ends_in_the_same_bytes() {
    for (launcher, ranks) in launchers().into_iter().zip([2, 4]) {
        let place = Place::new();
        let mut own = Command::new(std::env::current_exe().unwrap());
        own.args([
            "--exact",
            "nccl::same::a_rank_of_the_test_of_replayed_steps",
        ]);
        let mut command = launcher.start(&[(ranks, &own)]);
        succeed(command.env("ROUTEGRAD_TEST_REPLAYS", place.path("")));
        let of_rank = |rank: usize| -> Vec<End> {
            let bytes = std::fs::read(place.path(&rank.to_string())).unwrap();
            serde_json::from_slice(&bytes).unwrap()
        };
        let ends: Vec<Vec<End>> = (0..ranks).map(of_rank).collect();
        for (i, config) in configs(ranks).iter().enumerate() {
            let in_threads = trained_in_threads(config, ranks);
            for (rank, other) in in_threads.iter().enumerate() {
                let (end, router) = (&ends[rank][i], &config.router.name);
                let place = format!("{router}, rank {rank} of {ranks}");
                assert_eq!(end.digests, other.digests, "{place}: processes and threads");
                assert_eq!(end.losses, other.losses, "{place}");
                if is_drawn_by_host(config) {
                    continue;
                }
                assert_eq!((end.reads, end.allocations), (0, 0), "{place}");
                // The draws of sparsemixer change with the step, so that its launches are made anew, which the ranks agree on.
                let replayed = router != "sparsemixer";
                assert_eq!(end.calls, usize::from(!replayed), "{place}");
                assert_eq!(end.replays, u64::from(replayed), "{place}");
            }
        }
    }
}

/// Reads the model on rank 0 after some steps.
struct Reader;

impl Hook for Reader {
    fn needs_model(&self, _: &Config, step: u64) -> bool {
        step % 3 == 0
    }

    fn after_step(&mut self, trainer: &Trainer, _: &StepReport, record: &Record) -> Result<()> {
        if self.needs_model(trainer.config(), record.step) {
            trainer.model.parameters[0].value.to_f64()?;
        }
        Ok(())
    }
}

/// Not a test of its own: what each process of the next one does.
#[test]
fn a_rank_of_the_test_of_a_hook_of_rank_0() {
    if std::env::var("ROUTEGRAD_TEST_HOOK").is_err() {
        return;
    }
    let dist = dist::start(Ranks::Auto, Duration::from_secs(20)).unwrap();
    let device = nccl::with_library(dist, Device::Sim, stand_in().to_str().unwrap()).unwrap();
    let config = config(&["router.name=\"topk\"", "train.steps=9"]);
    let run = Trainer::builder(config).hook(Reader).ranks(device).build();
    let summary = run.unwrap().run(&AtomicBool::new(false)).unwrap();
    assert_eq!(summary.step, 9);
    assert!(dist::conclude(Ok(())).is_ok());
}

/// Other ranks must launch each step as rank 0 does, though the hook does not run there.
#[test]
#[ignore = "slow"]
fn a_hook_of_rank_0_that_needs_the_model_holds_up_no_rank() {
    let Some(launcher) = launchers().into_iter().next() else {
        return;
    };
    let mut own = Command::new(std::env::current_exe().unwrap());
    own.args([
        "--exact",
        "nccl::same::a_rank_of_the_test_of_a_hook_of_rank_0",
    ]);
    succeed(launcher.start(&[(2, &own)]).env("ROUTEGRAD_TEST_HOOK", "1"));
}

#[test]
#[ignore = "slow"]
fn two_nodes_of_two_ranks_end_in_the_bytes_of_one_node_of_four() {
    beside_other_tests();
    for router in ["default", "topk"] {
        let name = format!("router.name=\"{router}\"");
        for further in ["train.seed=1", "train.bf16_moments=true"] {
            let config = config(&[&name, "model.top_k=2", further]);
            let one_node = trained_in_threads(&config, 4);
            for by_nccl in [false, true] {
                let ends = ThreadRank::run(4, |rank| {
                    trained_on_nodes(&config, Arc::new(rank), by_nccl, 2)
                });
                for (rank, (end, other)) in ends.iter().zip(&one_node).enumerate() {
                    let place = format!("{router}, {further}, rank {rank}, NCCL: {by_nccl}");
                    assert_eq!(end.digests, other.digests, "{place}");
                    assert_eq!(end.losses, other.losses, "{place}");
                }
            }
        }
    }
}

#[test]
fn moments_are_shared_out_and_weights_are_whole() {
    let set = [
        "router.name=\"topk\"",
        "model.vocab_size=1024",
        "model.hidden=128",
    ];
    let config = config(&set);
    let held = ThreadRank::run(4, |rank| {
        let dist: Arc<dyn Collective> = Arc::new(rank);
        let run = Trainer::builder(config.clone())
            .ranks(dist)
            .build()
            .unwrap();
        let moments = run.executor().optimizer.moments().iter();
        let own: usize = moments.map(|m| m.first.elements()).sum();
        let all = run.model.parameters.iter();
        (own, all.map(|p| p.value.elements()).sum::<usize>())
    });
    let all = held[0].1;
    assert_eq!(held.iter().map(|(own, _)| own).sum::<usize>(), all);
    let most = held.iter().map(|(own, _)| *own).max().unwrap();
    assert!(most < all / 2, "{most} of {all} on one rank");
}
