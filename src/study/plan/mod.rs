//! Computes from shapes what a run needs: parameters, operations, memory, time, files. It allocates nothing.

mod memory;

pub use memory::{Memory, Target, kept};

use crate::config::{Config, ModelConfig, count};
use crate::error::{Error, Result};
use crate::report::{number, size};
use crate::routers::{self, Router};
use serde::Serialize;
use std::fmt::Display;

/// The assumed share of a GPU's dense bf16 peak: METHOD's tokens/s are those at half the peak of an H200. There are no
/// measurements of the other GPUs.
const PEAK_SHARE: f64 = 0.5;
/// Measured training FLOP/s of one core with AVX2: 64% of the peak of its matrix products; see docs/performance.md.
const CORE_RATE: f64 = 58e9;
/// Expected bytes per second that a GPU sends to other nodes, if each GPU has an adapter of 400 Gb/s; not measured here.
const NODE_LINK_BYTES_PER_SECOND: f64 = 45e9;

/// The resources that a run needs.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The machine that is planned for.
    pub target: Target,
    /// Number of ranks that share the batch; memory is per rank.
    pub ranks: usize,
    /// Number of nodes that the ranks are divided among.
    pub nodes: usize,
    /// Bytes that each rank sends per step: gradients, and the weights that it updated.
    pub sent_bytes: u64,
    /// The part of these bytes that goes to other nodes.
    pub sent_between_nodes_bytes: u64,
    /// Estimated seconds per step to send them; 0 if no rate is known.
    pub sending_seconds: f64,
    /// Number of trainable parameters.
    pub total_parameters: u64,
    /// Number of parameters that one token uses.
    pub active_parameters: u64,
    /// FLOPs of forward and backward per token, without recomputation.
    pub flops_per_token: u64,
    /// Tokens per optimizer step, over all ranks.
    pub tokens_per_step: u64,
    /// Optimizer steps of the run.
    pub steps: u64,
    /// Number of tokens of the training text; `None` if it was not read.
    pub text_tokens: Option<u64>,
    /// Bytes per rank as configured.
    pub memory: Memory,
    /// Bytes where backward keeps the activations of every layer.
    pub memory_kept: Memory,
    /// Bytes where backward computes the activations of every layer again.
    pub memory_recomputed: Memory,
    /// Bytes of memory that the target has; `None` if it is not known.
    pub available: Option<u64>,
    /// FLOP/s from which the time is computed.
    pub rate: f64,
    /// Source of `rate`: a recorded step, or a share of the peak.
    pub rate_source: String,
    /// Whether no run has been measured at this rate, so that it is an upper bound.
    pub upper_bound: bool,
    /// Estimated tokens per second.
    pub tokens_per_second: f64,
    /// Bytes of one checkpoint on disk: weights, moments and router state in f32 (f64 if the run uses f64).
    pub checkpoint_bytes: u64,
    /// The largest micro-batch that fits as configured; `None` if not even one sequence fits.
    pub largest_micro_batch: Option<usize>,
    /// The largest micro-batch that fits if every layer is recomputed.
    pub largest_micro_batch_recomputed: Option<usize>,
}

/// Plans a run of `config` on one rank; on the CPU with `threads` threads.
///
/// # Errors
/// When the router does not exist.
pub fn plan(config: &Config, target: Target, threads: usize) -> Result<Plan> {
    plan_on(config, target, threads, Cluster { ranks: 1, nodes: 1 })
}

/// Plans a run on several ranks, each with one GPU or `threads` threads.
///
/// # Errors
/// When the router does not exist, the ranks cannot divide a micro-batch evenly, or the nodes cannot divide the ranks
/// evenly.
pub fn plan_on(config: &Config, target: Target, threads: usize, cluster: Cluster) -> Result<Plan> {
    let Cluster { ranks, nodes } = cluster;
    if nodes == 0 || ranks % nodes != 0 {
        return Err(Error::usage(
            "plan",
            format!("a number of nodes that divides {ranks} ranks"),
            nodes.to_string(),
            "change --nodes or --ranks",
        ));
    }
    let micro_batch = config.train.micro_batch;
    if ranks == 0 || micro_batch % ranks != 0 {
        return Err(Error::usage(
            "plan",
            format!("ranks that divide train.micro_batch = {micro_batch}"),
            ranks.to_string(),
            "change --ranks, or the micro-batch of all ranks with --set train.micro_batch=…",
        ));
    }
    let (m, router) = (&config.model, routers::build(&config.router)?);
    let memory = |config: &Config| Memory::with_ranks(config, &*router, target, ranks);
    let whole = Memory::with(config, &*router, target);
    let available = match target {
        Target::Cpu => crate::train::available_memory(),
        Target::Gpu(chip) => Some(chip.memory_gib << 30),
    };
    let fits = |config: &Config| available.is_none_or(|a| memory(config).total() <= a);
    let recompute = |all| {
        let mut config = config.clone();
        config.train.recompute = crate::config::Recompute::All(all);
        config
    };
    let flops = flops_of(config, &*router);
    let (rate, rate_source) = assumed_rate(target, threads);
    let parameters = routers::total_parameters(&*router, m);
    let ([inside, across], sending_seconds) = cluster.sending(config, target, parameters);
    let tokens_per_step = (config.train.sequences_per_step * m.sequence_length) as u64;
    let plan = Plan {
        target,
        ranks,
        nodes,
        sent_bytes: inside + across,
        sent_between_nodes_bytes: across,
        sending_seconds,
        total_parameters: parameters,
        active_parameters: routers::active_parameters(&*router, m),
        flops_per_token: flops,
        tokens_per_step,
        steps: config.train.steps,
        text_tokens: None,
        memory: memory(config),
        memory_kept: memory(&recompute(false)),
        memory_recomputed: memory(&recompute(true)),
        available,
        rate: ranks as f64 * rate,
        rate_source,
        upper_bound: target != Target::Cpu,
        tokens_per_second: 0.0,
        checkpoint_bytes: whole.weights + whole.optimizer + whole.router_state,
        largest_micro_batch: largest(config, ranks, fits),
        largest_micro_batch_recomputed: largest(&recompute(true), ranks, fits),
    };
    Ok(plan.timed())
}

/// Returns the assumed FLOP/s of one rank if there is no record, and a description of their source.
fn assumed_rate(target: Target, threads: usize) -> (f64, String) {
    match target {
        Target::Cpu => (
            CORE_RATE * threads as f64,
            format!("{:.0} GFLOP/s a thread, as measured", CORE_RATE / 1e9),
        ),
        Target::Gpu(chip) => (
            chip.peak * PEAK_SHARE,
            format!(
                "half of its bf16 peak; there is no record of a training step on an {}",
                chip.name
            ),
        ),
    }
}

/// Returns the FLOPs per token as [`count::flops_per_token`] does, but with every expert that the router runs in training
/// and, forward only, the rows that it runs only for its state.
///
/// # Errors
/// When the router does not exist.
pub fn flops_per_token(config: &Config) -> Result<u64> {
    Ok(flops_of(config, &*routers::build(&config.router)?))
}

fn flops_of(config: &Config, router: &dyn Router) -> u64 {
    let model = &config.model;
    let routed = count::flops_per_token(&ModelConfig {
        top_k: router.mean_experts_per_token(model),
        ..model.clone()
    });
    // A row passes through three matrices; the cost is divided by the tokens of a step.
    let row = 6 * (model.hidden * model.expert_ffn_width) as u128;
    let rows = (router.sampled_rows_per_step(model) * model.moe_layers().len()) as u128;
    let tokens = (config.train.sequences_per_step * model.sequence_length) as u128;
    routed.saturating_add(u64::try_from(rows * row / tokens.max(1)).unwrap_or(u64::MAX))
}

/// Returns the largest divisor of the batch that fits in memory and that the ranks divide evenly.
fn largest(config: &Config, ranks: usize, fits: impl Fn(&Config) -> bool) -> Option<usize> {
    let all = config.train.sequences_per_step;
    let fits = |n: &usize| {
        let mut config = config.clone();
        config.train.micro_batch = *n;
        fits(&config)
    };
    let shared = |n: &usize| all % n == 0 && n % ranks == 0;
    (1..=all).rev().filter(shared).find(fits)
}

/// The processes that share the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Number of processes, each with one GPU.
    pub ranks: usize,
    /// Number of nodes, each with the same number of processes.
    pub nodes: usize,
}

impl Cluster {
    /// Returns the bytes that a rank sends per step, within its node and to other nodes, and the seconds that this takes; 0
    /// if no rate is known.
    fn sending(self, config: &Config, target: Target, parameters: u64) -> ([u64; 2], f64) {
        let Target::Gpu(chip) = target else {
            let width = config.train.dtype.dtype().size() as u64;
            return (self.sent(2 * width * parameters, false), 0.0);
        };
        // The condition of `Collective::ranks_per_node`. Gradients and weights: f32 and bf16.
        let two_levels = (self.ranks / self.nodes).is_power_of_two();
        let sent = self.sent((4 + 2) * parameters, two_levels);
        let [inside, across] = sent.map(|bytes| bytes as f64);
        let seconds = chip.link().map_or(0.0, |link| {
            inside / link + across / NODE_LINK_BYTES_PER_SECOND
        });
        (sent, seconds)
    }

    /// Returns the bytes that a rank sends per step within its node and to other nodes, if gradients and weights of all
    /// parameters have `bytes`: the gradients of the other shares, and its own weights to each other rank. With
    /// `two_levels` the ranks of a node sum their gradients before these leave it.
    fn sent(self, bytes: u64, two_levels: bool) -> [u64; 2] {
        let (ranks, nodes) = (self.ranks as u64, self.nodes as u64);
        let parts = match two_levels {
            true => [ranks - nodes, nodes - 1],
            false => [ranks / nodes - 1, ranks - ranks / nodes],
        };
        parts.map(|parts| bytes * parts / ranks)
    }
}

impl Plan {
    /// Replaces the rate by FLOP/s that a rank reached in a measurement.
    pub fn at_rate(mut self, rate: f64, source: String) -> Self {
        self.rate = self.ranks as f64 * rate;
        self.rate_source = source;
        self.upper_bound = false;
        self.timed()
    }

    fn timed(mut self) -> Self {
        let computing = self.tokens_per_step as f64 * self.flops_per_token as f64 / self.rate;
        self.tokens_per_second = self.tokens_per_step as f64 / (computing + self.sending_seconds);
        self
    }

    /// Returns whether the run fits in the target's memory.
    pub fn fits(&self) -> bool {
        self.available.is_none_or(|a| self.memory.total() <= a)
    }

    /// Returns the estimated seconds of all steps.
    pub fn seconds(&self) -> f64 {
        self.tokens_per_step as f64 * self.steps as f64 / self.tokens_per_second
    }

    /// Returns the plan as a table in text.
    pub fn table(&self) -> String {
        let (flops, steps) = (number(self.flops_per_token as f64), self.steps);
        let tokens = format!("{}, {steps} steps", self.tokens_per_step);
        let mut lines = vec![
            row("parameters", number(self.total_parameters as f64)),
            row("active for a token", number(self.active_parameters as f64)),
            row("FLOPs a token", flops + " (training)"),
            row("tokens a step", tokens),
        ];
        if let Some(tokens) = self.text_tokens {
            let times = self.tokens_per_step as f64 * steps as f64 / tokens.max(1) as f64;
            let all = number(tokens as f64);
            lines.push(row("text", format!("{all} tokens, read {times:.2} times")));
        }
        if self.ranks > 1 {
            lines.push(row("ranks", self.sending()));
        }
        let memory = match self.ranks {
            1 => "memory",
            _ => "memory of a rank",
        };
        lines.extend([
            String::new(),
            format!(
                "{memory:<22} {:>12} {:>12} {:>12}",
                "as set", "all kept", "recomputed"
            ),
        ]);
        type Kind = (&'static str, fn(&Memory) -> u64);
        let kinds: [Kind; 8] = [
            ("  weights", |m| m.weights),
            ("  gradients", |m| m.gradients),
            ("  optimizer", |m| m.optimizer),
            ("  router state", |m| m.router_state),
            ("  activations", |m| m.activations),
            ("  workspace", |m| m.workspace),
            ("  program and data", |m| m.program),
            ("  all", Memory::total),
        ];
        for (name, of) in kinds {
            let columns = [&self.memory, &self.memory_kept, &self.memory_recomputed];
            let [set, kept, recomputed] = columns.map(|m| size(of(m)));
            lines.push(format!("{name:<22} {set:>12} {kept:>12} {recomputed:>12}"));
        }
        lines.push(self.verdict());
        lines.push(String::new());
        lines.push(row("checkpoint", size(self.checkpoint_bytes)));
        lines.extend(self.time_rows());
        lines.join("\n")
    }

    fn time_rows(&self) -> [String; 3] {
        let (most, least) = match self.upper_bound {
            true => ("upper bound:", "at least"),
            false => ("about", "about"),
        };
        let (speed, rate) = (self.tokens_per_second, self.rate / 1e12);
        let speed = format!("{most} {speed:.0} tokens/s, at {rate:.3} TFLOP/s");
        let time = duration(self.seconds());
        let time = format!("{least} {time}, evaluations and saving left out");
        [
            row("speed", speed),
            row("", &self.rate_source),
            row("time", time),
        ]
    }

    /// Returns the number of ranks, and what each sends.
    fn sending(&self) -> String {
        let (ranks, sent) = (self.ranks, size(self.sent_bytes));
        let time = match self.sending_seconds {
            0.0 => String::new(),
            seconds => format!(", about {:.0} ms", 1e3 * seconds),
        };
        let across = size(self.sent_between_nodes_bytes);
        match self.nodes {
            1 => format!("{ranks}, each sends {sent} a step{time}"),
            n => format!(
                "{ranks} on {n} nodes, each sends {sent} a step, {across} of it between nodes{time}"
            ),
        }
    }

    fn verdict(&self) -> String {
        let Some(available) = self.available else {
            return "  the amount of available memory is not known".into();
        };
        let total = self.memory.total();
        if total <= available {
            return format!("  fits in {}", size(available));
        }
        let found = [
            (self.largest_micro_batch, ""),
            (
                self.largest_micro_batch_recomputed,
                " with train.recompute=true",
            ),
        ];
        let setting =
            |(n, how): (Option<usize>, &str)| Some(format!("train.micro_batch={}{how}", n?));
        let found: Vec<String> = found.into_iter().filter_map(setting).collect();
        let help = match found.is_empty() {
            true => "no micro-batch fits: choose a smaller preset, or more --ranks".into(),
            false => format!("possible settings: {}", found.join(", or ")),
        };
        format!(
            "  does not fit in {}: {} too much; {help}",
            size(available),
            size(total - available)
        )
    }
}

fn row(name: &str, value: impl Display) -> String {
    format!("{name:<22} {value}")
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests;
