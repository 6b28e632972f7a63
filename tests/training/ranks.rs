//! Several ranks do what one does: the same losses, statistics, router state and parameters.
//!
//! Micro-batch m of a step is cut among the ranks, so that for equally many micro-batches every count,
//! average and draw is that of one rank, and only the order of sums differs. For another number of
//! micro-batches it is not: the auxiliary loss counts the step so far, ê moves once a micro-batch, the
//! penalty of `remoe` counts within one. With `balance.aux_scope = "micro"` the auxiliary loss counts
//! within a rank's own part, and depends on the number of ranks too.

use routegrad::config::{Config, Layers};
use routegrad::data::Corpus;
use routegrad::dist::{Collective, SingleRank, ThreadRank};
use routegrad::error::Result;
use routegrad::model::Model;
use routegrad::model::batch::Batch;
use routegrad::routers::{self, ROUTERS};
use routegrad::train::optimizer::Shards;
use routegrad::train::step::{StepExecutor, StepReport};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

const LENGTH: usize = 12;
/// Of a micro-batch, over all ranks.
const SEQUENCES: u64 = 4;
const STEPS: u64 = 3;

/// Every router, with settings that make what it sums over ranks count.
fn configs() -> Vec<Config> {
    let first_version = (
        "sparsemixer",
        &["model.top_k=1", "router.version=\"v1\""][..],
    );
    let all = ROUTERS.iter().map(|r| match r.name {
        // Half of all logits are positive at the start, so that ranks fall on both sides of K / E.
        "remoe" => (r.name, &["model.top_k=4", "router.initial_lambda=0.01"][..]),
        "lossfree" => (r.name, &["router.update_rate=0.01"][..]),
        _ => (r.name, &[][..]),
    });
    let small = [
        "model.hidden=16",
        "model.heads=2",
        "model.layers=3",
        "model.expert_ffn_width=24",
        "model.dense_ffn_width=24",
        "model.sequence_length=12",
        "model.top_k=2",
        "balance.z_coefficient=0.001",
        "train.dtype=\"f64\"",
    ];
    let sampled = (
        "default",
        &["router.source=sampled", "router.samples=5"][..],
    );
    all.chain([first_version, sampled])
        .map(|(router, set)| {
            let mut layers = Layers::preset("tiny");
            layers.set = small.iter().chain(set).map(|s| s.to_string()).collect();
            layers.set.push(format!("router.name=\"{router}\""));
            Config::load(&layers, &routers::resolve).unwrap()
        })
        .collect()
}

fn corpus(config: &Config) -> &'static Corpus {
    static CORPUS: OnceLock<Corpus> = OnceLock::new();
    CORPUS.get_or_init(|| Corpus::load(&config.data, &config.model, config.train.seed).unwrap())
}

/// A rank's model, and what its steps reported.
struct Rank {
    model: Model,
    trainer: StepExecutor,
    corpus: &'static Corpus,
    reports: Vec<StepReport>,
}

impl Rank {
    fn new(config: &Config, dist: Arc<dyn Collective>) -> Result<Self> {
        let model = Model::with_router(config, routers::build(&config.router)?, dist)?;
        Ok(Rank {
            trainer: StepExecutor::new(&config.train, &model),
            corpus: corpus(config),
            reports: vec![],
            model,
        })
    }

    /// This rank's tokens of the `n` micro-batches of a step.
    fn tokens(&self, step: u64, n: u64) -> Result<Vec<Batch>> {
        let parts = (step * n..(step + 1) * n).map(|m| -> Result<Batch> {
            let own = self.model.dist().part(m * SEQUENCES..(m + 1) * SEQUENCES)?;
            Ok(self.corpus.sequences(own))
        });
        parts.collect()
    }

    fn step(&mut self, batches: &[Batch]) -> Result<()> {
        let parts: Vec<_> = batches.iter().map(Batch::all).collect();
        let report = self.trainer.step(&mut self.model, &parts, 1e-3)?;
        self.reports.push(report);
        Ok(())
    }

    fn state(&self) -> Vec<f64> {
        let states = self.model.layer_states();
        let tensors = states.iter().flat_map(|s| s.tensors());
        tensors.flat_map(|(_, t)| t.to_f64().unwrap()).collect()
    }

    fn parameters(&self) -> Vec<f64> {
        let all = self.model.parameters.iter();
        all.flat_map(|p| p.value.to_f64().unwrap()).collect()
    }

    fn outcome(&self) -> Outcome {
        let numbers = |r: &StepReport| {
            let mut all = vec![r.cross_entropy, r.auxiliary, r.z, r.gradient_norm];
            for layer in &r.layers {
                all.extend([layer.tokens, layer.entropy]);
                all.extend(&layer.counts);
            }
            all
        };
        Outcome {
            skipped: self.reports.iter().map(|r| r.skipped.clone()).collect(),
            reported: self.reports.iter().flat_map(numbers).collect(),
            state: self.state(),
            parameters: self.parameters(),
        }
    }
}

/// What a rank ends with.
#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    skipped: Vec<Option<String>>,
    /// Losses, norm and statistics of every step.
    reported: Vec<f64>,
    state: Vec<f64>,
    parameters: Vec<f64>,
}

impl Outcome {
    /// The largest relative difference, numbers below 1e-4 taken as of that size; NaN is infinite.
    fn difference(&self, other: &Self) -> f64 {
        let parts = |o: &Self| [o.reported.clone(), o.state.clone(), o.parameters.clone()];
        let pairs = parts(self).into_iter().zip(parts(other));
        pairs
            .flat_map(|(a, b)| {
                assert_eq!(a.len(), b.len());
                a.into_iter().zip(b)
            })
            .map(|(a, b)| (a - b).abs() / a.abs().max(b.abs()).max(1e-4))
            .fold(0.0, |m, d| {
                if d <= m {
                    m
                } else if d.is_nan() {
                    f64::INFINITY
                } else {
                    d
                }
            })
    }
}

/// What every rank ends with after some steps of `n` micro-batches.
fn train(
    config: &Config,
    ranks: usize,
    n: u64,
    wrap: impl Fn(ThreadRank) -> Arc<dyn Collective> + Sync,
) -> Vec<Result<Outcome>> {
    ThreadRank::run(ranks, |rank| {
        let mut rank = Rank::new(config, wrap(rank))?;
        for step in 0..STEPS {
            let tokens = rank.tokens(step, n)?;
            rank.step(&tokens)?;
        }
        Ok(rank.outcome())
    })
}

/// The same on honest ranks, which all end alike.
fn trained(config: &Config, ranks: usize, n: u64) -> Outcome {
    let mut all = train(config, ranks, n, |rank| Arc::new(rank)).into_iter();
    let first = all.next().unwrap().unwrap();
    for (other, rank) in all.zip(1..) {
        let name = &config.router.name;
        assert!(other.unwrap() == first, "rank {rank} of {ranks}, {name}");
    }
    first
}

#[test]
fn a_step_that_is_given_up_leaves_no_trace() {
    for config in configs() {
        for ranks in [1, 2] {
            let outcomes = ThreadRank::run(ranks, |rank| {
                let mut rank = Rank::new(&config, Arc::new(rank)).unwrap();
                for step in 0..STEPS {
                    let tokens = rank.tokens(step, 3).unwrap();
                    let parts: Vec<_> = tokens.iter().map(Batch::all).collect();
                    let mut asked = Vec::new();
                    let mut give_up = |done: usize| {
                        asked.push(done);
                        Ok(done == 2)
                    };
                    let (model, trainer) = (&mut rank.model, &mut rank.trainer);
                    let launched = trainer.launch_until(model, &parts, 1e-3, &mut give_up);
                    assert!(launched.unwrap().is_given_up());
                    assert_eq!(asked, [1, 2]);
                    rank.step(&tokens).unwrap();
                }
                rank.outcome()
            });
            let name = &config.router.name;
            let whole = trained(&config, ranks, 3);
            assert!(
                outcomes.iter().all(|o| *o == whole),
                "{name}, {ranks} ranks"
            );
        }
    }
}

#[test]
fn one_two_and_four_ranks_train_the_same_model() {
    for config in configs() {
        for n in [1, 2] {
            let one = trained(&config, 1, n);
            assert_eq!(one.skipped, [const { None }; STEPS as usize]);
            for ranks in [2, 4] {
                let several = trained(&config, ranks, n);
                let difference = several.difference(&one);
                let name = &config.router.name;
                println!("{name}, {n} micro-batches, {ranks} ranks: {difference:.1e}");
                assert!(difference <= 1e-6, "{name}, {n}, {ranks}: {difference}");
                assert_eq!(several.skipped, one.skipped);
            }
        }
    }
}

#[test]
fn a_group_of_one_is_a_single_rank_to_the_byte() {
    for config in configs() {
        let group = trained(&config, 1, 2);
        let mut single = Rank::new(&config, Arc::new(SingleRank)).unwrap();
        for step in 0..STEPS {
            let tokens = single.tokens(step, 2).unwrap();
            single.step(&tokens).unwrap();
        }
        assert!(single.outcome() == group, "{}", config.router.name);
    }
}

#[test]
fn the_same_ranks_give_the_same_bytes_again() {
    for config in configs() {
        let first = trained(&config, 4, 2);
        assert!(first == trained(&config, 4, 2), "{}", config.router.name);
    }
}

/// Ranks that forget one call of every step: they keep their own values, and zeros for those of others.
struct Forgetful {
    rank: ThreadRank,
    calls: AtomicUsize,
    calls_per_step: usize,
    forgotten: usize,
}

impl Forgetful {
    fn forgets(&self) -> bool {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        call % self.calls_per_step == self.forgotten
    }

    /// Forgets the rows of `all` `[size, n]` that others sent.
    fn forget(&self, all: &mut [u8]) {
        let n = (all.len() / self.size()).max(1);
        for (rank, row) in all.chunks_mut(n).enumerate() {
            if rank != self.rank() {
                row.fill(0);
            }
        }
    }
}

impl Collective for Forgetful {
    fn rank(&self) -> usize {
        self.rank.rank()
    }

    fn size(&self) -> usize {
        self.rank.size()
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.rank.all_gather(own, all)?;
        if self.forgets() {
            self.forget(all);
        }
        Ok(())
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.rank.exchange(own, all)?;
        if self.forgets() {
            self.forget(all);
        }
        Ok(())
    }

    fn leave(&self, why: &str) {
        self.rank.leave(why);
    }

    fn sum(&self, values: &mut [f64]) -> Result<()> {
        let mut sum = values.to_vec();
        self.rank.sum(&mut sum)?;
        if !self.forgets() {
            values.copy_from_slice(&sum);
        }
        Ok(())
    }
}

/// How many calls a step of one micro-batch makes.
fn calls_of_a_step(config: &Config) -> usize {
    let found = ThreadRank::run(2, |rank| {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Counted(rank, calls.clone());
        let mut rank = Rank::new(config, Arc::new(counted)).unwrap();
        let tokens = rank.tokens(0, 1).unwrap();
        rank.step(&tokens).unwrap();
        calls.load(Ordering::SeqCst)
    });
    assert_eq!(found[0], found[1]);
    found[0]
}

struct Counted(ThreadRank, Arc<AtomicUsize>);

impl Collective for Counted {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.all_gather(own, all)
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.exchange(own, all)
    }

    fn leave(&self, why: &str) {
        self.0.leave(why);
    }

    fn sum(&self, values: &mut [f64]) -> Result<()> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.sum(values)
    }
}

#[test]
fn no_call_can_be_forgotten_unnoticed() {
    for config in configs() {
        let one = trained(&config, 1, 1);
        let calls_per_step = calls_of_a_step(&config);
        for forgotten in 0..calls_per_step {
            let outcomes = train(&config, 2, 1, |rank| {
                Arc::new(Forgetful {
                    rank,
                    calls: AtomicUsize::new(0),
                    calls_per_step,
                    forgotten,
                })
            });
            let unnoticed = outcomes.iter().all(|o| {
                o.as_ref()
                    .is_ok_and(|o| o.difference(&one) <= 1e-6 && o.skipped == one.skipped)
            });
            let name = &config.router.name;
            assert!(!unnoticed, "{name}: call {forgotten} of {calls_per_step}");
        }
        println!("{}: {calls_per_step} calls a step", config.router.name);
    }
}

#[test]
fn a_nan_on_one_rank_is_refused_by_all_and_leaves_no_trace() {
    const RANKS: usize = 4;
    const BAD: usize = 2;
    for config in configs() {
        let name = &config.router.name;
        let refused = ThreadRank::run(RANKS, |rank| {
            let place = rank.rank();
            let mut rank = Rank::new(&config, Arc::new(rank)).unwrap();
            for step in 0..STEPS {
                let tokens = rank.tokens(step, 1).unwrap();
                if step == 1 {
                    let before = (rank.state(), rank.parameters());
                    let kept = rank.model.parameters[0].value.clone();
                    if place == BAD {
                        // The embedding of a byte that this rank reads.
                        let first = tokens[0].tokens[0] as usize * config.model.hidden;
                        let embedding = &mut rank.model.parameters[0].value;
                        embedding.change(|w| w.slice_mut::<f64>()[first] = f64::NAN);
                    }
                    rank.step(&tokens).unwrap();
                    rank.model.parameters[0].value = kept;
                    assert!(before == (rank.state(), rank.parameters()), "{name}");
                    assert_eq!(rank.trainer.optimizer.steps(), 1);
                }
                rank.step(&tokens).unwrap();
            }
            let bad = rank.reports.remove(1);
            (bad.skipped, rank.outcome())
        });
        // All name the same token, by its place in the global batch, in the part of the bad rank.
        let reason = refused[0].0.clone().unwrap();
        let token = reason.strip_prefix("router logits of MoE layer 0, token ");
        let token: usize = token.unwrap_or_else(|| panic!("{reason}")).parse().unwrap();
        assert_eq!(token / (LENGTH * SEQUENCES as usize / RANKS), BAD, "{name}");
        // What follows is what would have been.
        let clean = trained(&config, RANKS, 1);
        for (other, outcome) in refused {
            assert_eq!(other.as_ref(), Some(&reason), "{name}");
            assert!(outcome == clean, "{name}");
        }
    }
}

#[test]
fn an_error_on_one_rank_ends_the_others_with_an_error() {
    let config = &configs()[0];
    let errors = ThreadRank::run(2, |rank| {
        let place = rank.rank();
        let mut rank = Rank::new(config, Arc::new(rank)).unwrap();
        let mut tokens = rank.tokens(0, 1).unwrap();
        if place == 1 {
            tokens[0].tokens[3] = 256;
        }
        rank.step(&tokens).unwrap_err().to_string()
    });
    assert!(errors[1].contains("vocabulary"), "{}", errors[1]);
    assert!(errors[0].contains("rank 1 has left"), "{}", errors[0]);
}

#[test]
fn unequal_shares_are_refused() {
    let config = &configs()[0];
    let errors = ThreadRank::run(2, |rank| {
        let place = rank.rank();
        let mut rank = Rank::new(config, Arc::new(rank)).unwrap();
        let tokens = rank.tokens(0, 1 + place as u64).unwrap();
        rank.step(&tokens).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("equally many micro-batches"), "{error}");
    }
}

/// Parameters after some steps of the whole micro-batches, and the numbers of first moments that the rank holds.
fn trained_with(config: &Config, rank: ThreadRank, sharded: bool) -> (Vec<f64>, usize) {
    let mut own = Rank::new(config, Arc::new(rank)).unwrap();
    if !sharded {
        let shards = Shards::new(&own.model.parameters, 0, 1);
        own.trainer = StepExecutor::with_shards(&config.train, &own.model, shards);
    }
    for step in 0..STEPS {
        let part = own.model.dist().part(step * 12..step * 12 + 12).unwrap();
        let batch = own.corpus.sequences(part);
        own.step(&[batch]).unwrap();
    }
    let held = own.trainer.optimizer.moments().iter();
    let held = held.map(|m| m.first.elements()).sum();
    (own.parameters(), held)
}

#[test]
fn a_sharded_optimizer_ends_in_the_bytes_of_a_whole_one_and_holds_its_share_of_the_moments() {
    const BLOCK: usize = 1 << 14;
    for set in [
        &["train.dtype=\"f64\""][..],
        &["train.dtype=\"f32\""],
        &["train.dtype=\"f32\"", "train.bf16_moments=true"],
    ] {
        // Parameters of several blocks, of one, and of a part of one.
        let mut layers = Layers::preset("tiny");
        let wide = ["model.hidden=96", "model.heads=2", "model.vocab_size=512"];
        let shape = [
            "model.layers=2",
            "model.sequence_length=12",
            "model.top_k=2",
        ];
        let all = wide.iter().chain(&shape).chain(set);
        layers.set = all.map(|s| s.to_string()).collect();
        let config = Config::load(&layers, &routers::resolve).unwrap();
        for ranks in [2, 3, 4] {
            let train =
                |sharded| ThreadRank::run(ranks, |rank| trained_with(&config, rank, sharded));
            let (sharded, whole) = (train(true), train(false));
            let (numbers, parameters) = (whole[0].1, Model::new(&config).unwrap().parameters.len());
            assert_eq!(numbers, whole[0].0.len());
            for (rank, (own, held)) in sharded.iter().enumerate() {
                assert!(*own == whole[rank].0, "{set:?}, rank {rank} of {ranks}");
                let most = numbers / ranks + parameters * BLOCK;
                assert!(
                    *held <= most,
                    "rank {rank} of {ranks} holds {held} of {numbers}"
                );
            }
            let all: usize = sharded.iter().map(|(_, held)| held).sum();
            assert_eq!(all, numbers, "each number has one owner");
        }
    }
}
