//! What ranks train does not depend on what moves their bytes, and a steady step leaves the host alone.

use super::{config, stand_in};
use routegrad::Trainer;
use routegrad::config::Config;
use routegrad::device::{Device, counters};
use routegrad::dist::{Collective, ThreadRank, nccl};
use routegrad::error::Result;
use routegrad::routers::ROUTERS;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A rank whose host's calls are counted.
struct Counted {
    rank: ThreadRank,
    calls: Arc<AtomicUsize>,
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
}

/// What a rank ends with, and what its last step did.
struct End {
    /// Of weights and moments, its share alone where it has no more, and of the router's state.
    digests: Vec<(String, String)>,
    /// The weights as operations read them.
    working: Vec<Vec<f64>>,
    losses: Vec<f64>,
    last: counters::Counters,
    /// Host calls of the last step.
    calls: usize,
}

const STEPS: usize = 5;

fn trained(config: &Config, ranks: usize, by_nccl: bool) -> Vec<End> {
    ThreadRank::run(ranks, |rank| {
        let calls = Arc::new(AtomicUsize::new(0));
        let mut dist: Arc<dyn Collective> = Arc::new(Counted {
            rank,
            calls: calls.clone(),
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
        for _ in 0..STEPS {
            counters::take();
            calls.store(0, Ordering::SeqCst);
            let launched = run.launch().unwrap();
            let report = run.finish(launched).unwrap();
            assert_eq!(report.skipped, None);
            losses.extend([report.cross_entropy, report.auxiliary, report.gradient_norm]);
        }
        let (last, calls) = (counters::take(), calls.load(Ordering::SeqCst));
        let digests = run.digests().unwrap().into_iter();
        let working = run.model.parameters.iter();
        let working = working.map(|p| p.value.working().to_f64().unwrap());
        End {
            digests: digests
                .map(|(name, d)| (name, d.to_hex().to_string()))
                .collect(),
            working: working.collect(),
            losses,
            last,
            calls,
        }
    })
}

/// What all ranks have alike: the weights as operations read them, and the router's state.
fn shared(end: &End) -> (&Vec<Vec<f64>>, Vec<&(String, String)>) {
    let states = end.digests.iter();
    let states = states.filter(|(name, _)| name.contains(" of MoE layer "));
    (&end.working, states.collect())
}

#[test]
fn every_router_ends_in_the_same_bytes_whatever_moves_them_and_its_steady_step_is_a_graph() {
    crate::launchers::wait_for_other_tests();
    let routers: Vec<(String, Vec<&str>)> = ROUTERS
        .iter()
        .map(|r| {
            let set = match r.name {
                "remoe" => vec!["model.top_k=2", "router.initial_lambda=0.01"],
                _ => vec!["model.top_k=2"],
            };
            (format!("router.name=\"{}\"", r.name), set)
        })
        .collect();
    for (router, set) in &routers {
        let config = config(&[&[router.as_str()], &set[..]].concat());
        let one = trained(&config, 1, false);
        for ranks in [2, 4] {
            let ends = trained(&config, ranks, true);
            let by_host = trained(&config, ranks, false);
            for (rank, (end, other)) in ends.iter().zip(&by_host).enumerate() {
                let place = format!("{router}, rank {rank} of {ranks}");
                assert!(
                    end.digests == other.digests,
                    "{place}: another end than by the host"
                );
                assert!(
                    shared(end) == shared(&ends[0]),
                    "{place}: another end than rank 0"
                );
                assert_eq!(end.losses, ends[0].losses, "{place}");
                let last = end.last;
                assert_eq!((last.reads, last.allocations), (0, 0), "{place}: {last:?}");
                // Its draws change with the step, so that its launches are made anew.
                if !router.contains("sparsemixer") {
                    assert_eq!(last.replays, 1, "{place}: {last:?}");
                }
                assert_eq!(end.calls, 0, "{place}: calls between hosts");
            }
            for (found, expected) in ends[0].losses.iter().zip(&one[0].losses) {
                let difference = (found - expected).abs() / expected.abs().max(1e-3);
                assert!(
                    difference <= 2e-2,
                    "{router}, {ranks} ranks: {found} for {expected}"
                );
            }
            println!("{router}, {ranks} ranks: {:?}", ends[0].last);
        }
    }
}

#[test]
fn rounded_moments_and_recomputed_layers_are_those_of_a_run_without_nccl() {
    crate::launchers::wait_for_other_tests();
    let set = [
        "router.name=\"remoe\"",
        "model.top_k=2",
        "train.recompute=true",
        "train.bf16_moments=true",
    ];
    let config = config(&set);
    let (ends, by_host) = (trained(&config, 2, true), trained(&config, 2, false));
    for (end, other) in ends.iter().zip(&by_host) {
        assert!(end.digests == other.digests);
    }
}

#[test]
fn moments_are_shared_out_and_weights_are_whole() {
    crate::launchers::wait_for_other_tests();
    let config = config(&[
        "router.name=\"topk\"",
        "model.vocab_size=1024",
        "model.hidden=128",
    ]);
    let held = ThreadRank::run(4, |rank| {
        let run = Trainer::builder(config.clone())
            .ranks(Arc::new(rank))
            .build()
            .unwrap();
        let moments = run.executor().optimizer.moments().iter();
        let own: usize = moments.map(|m| m.first.elements()).sum();
        let all: usize = run
            .model
            .parameters
            .iter()
            .map(|p| p.value.elements())
            .sum();
        (own, all)
    });
    let all = held[0].1;
    assert_eq!(held.iter().map(|(own, _)| own).sum::<usize>(), all);
    let most = held.iter().map(|(own, _)| *own).max().unwrap();
    assert!(most < all / 2, "{most} of {all} on one rank");
}
