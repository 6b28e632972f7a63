//! Complete training steps: the models of the hardware check, and what it checks for each.

use super::kind::Kind;
use crate::config::{Config, Layers, count};
use crate::device::Device;
use crate::error::Result;
use crate::report::size;
use crate::routers;
use crate::study::plan::{self, Memory};
use crate::train::Trainer;

/// A task with complete training steps of a model.
#[derive(Clone, Debug)]
pub struct StepCase {
    pub kind: Kind,
    pub name: String,
    pub preset: &'static str,
    /// Keys that differ from the preset's.
    pub set: Vec<String>,
    /// Number of optimizer steps; the kind of task defines its exact meaning.
    pub steps: u64,
    /// Number of processes, with one GPU each.
    pub ranks: usize,
    /// Estimated time in seconds.
    pub estimate: f64,
}

/// Returns a trainer that returns an error at the first step with non-finite values.
///
/// # Errors
/// When the model does not fit on the device.
pub fn strict_trainer(mut config: Config) -> Result<Trainer> {
    config.train.max_skipped_steps = 1;
    Trainer::new(config)
}

/// Returns the reason why steps were not replayed as a graph although they should be.
pub fn uncaptured(training: &Trainer) -> Option<String> {
    let why = training.executor().graph_error()?;
    Some(format!("steps could not be captured as a graph: {why}"))
}

/// Returns the name of the first value that differs between two runs.
pub fn first_difference<'a, T: PartialEq>(
    a: &'a [(String, T)],
    b: &[(String, T)],
) -> Option<&'a str> {
    let differ = a.iter().zip(b).find(|(a, b)| a != b)?;
    Some(&differ.0.0)
}

/// Returns the name of the case for a model's speed; without a number in the name, micro-batches have 8 sequences, as in
/// the presets.
pub fn on_record(preset: &str, router: &str, micro_batch: usize) -> String {
    match micro_batch {
        8 => format!("{preset} {router}"),
        n => format!("{preset} {router} in micro-batches of {n}"),
    }
}

/// Settings of a model whose step takes half a second on the simulator; GPUs use it too.
const SMALL: [&str; 4] = [
    "model.sequence_length=128",
    "model.layers=3",
    "train.micro_batch=2",
    "train.sequences_per_step=4",
];

/// Settings for the vocabulary and width of the paper's smallest model with few layers, which takes seconds.
const FEW_LAYERS: [&str; 3] = [
    "model.layers=4",
    "train.micro_batch=2",
    "train.sequences_per_step=4",
];

/// 131,072 tokens per optimizer step of the paper's models.
const SEQUENCES: &str = "train.sequences_per_step=64";

fn case(
    kind: Kind,
    preset: &'static str,
    router: &str,
    set: &[&str],
    steps: u64,
    estimate: f64,
) -> StepCase {
    let mut set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    set.push(format!("router.name=\"{router}\""));
    StepCase {
        kind,
        name: format!("{preset} {router}"),
        preset,
        set,
        steps,
        ranks: 1,
        estimate,
    }
}

impl StepCase {
    fn named(self, name: &str) -> Self {
        let name = name.into();
        StepCase { name, ..self }
    }

    fn on_ranks(self, ranks: usize) -> Self {
        let name = format!("{}, {ranks} ranks", self.name);
        StepCase {
            name,
            ranks,
            ..self
        }
    }

    /// Returns the configuration of one process.
    ///
    /// # Errors
    /// When a key does not exist.
    pub fn config(&self, device: Device) -> Result<Config> {
        let mut layers = Layers::preset(self.preset);
        layers.set = self.set.clone();
        layers.set.push(format!("train.device=\"{device}\""));
        Config::load(&layers, &routers::resolve)
    }

    /// Returns what a machine must have for the task.
    pub fn needs(&self) -> String {
        let Ok(config) = self.config(Device::Sim) else {
            return String::new();
        };
        let Ok(plan) = plan::plan(&config, plan::Target::gpu(), 1) else {
            return String::new();
        };
        let text = format!("{} of the device", size(plan.memory.total()));
        let disk = size(plan.checkpoint_bytes);
        match self.kind {
            Kind::Resume => format!("{text}, {disk} of disk"),
            Kind::LossParity => text + ", the processor's curve",
            Kind::Connects => text + ", NCCL",
            Kind::Scales => format!("{text}, {} of them, NCCL, {disk} of disk", self.ranks),
            _ => text,
        }
    }
}

/// Returns the planned bytes on a device with kernels.
///
/// # Errors
/// When the router does not exist.
pub fn planned(config: &Config) -> Result<u64> {
    Ok(Memory::of(config, plan::Target::gpu(), 1)?.total())
}

/// Largest relative difference between the memory and the plan.
const MEMORY_TOLERANCE: f64 = 0.03;

/// Returns a text with the peak and the planned memory, and an error message if they differ too much.
pub fn memory_judged(peak: u64, planned: u64) -> (String, Option<String>) {
    let text = format!("{}, plan {}", size(peak), size(planned));
    let apart = (peak as f64 / planned as f64 - 1.0).abs();
    let wrong = (!(apart <= MEMORY_TOLERANCE)).then(|| {
        let percent = 100.0 * MEMORY_TOLERANCE;
        format!("the memory is not within {percent:.0}% of the plan: {text}")
    });
    (text, wrong)
}

/// Allocates memory on a model's device that is not part of the plan, as a planted fault.
pub fn unplanned(training: &Trainer) -> Result<crate::tensor::Tensor> {
    let bytes = planned(training.config())? as usize / 10;
    let device = training.model.device();
    let held = crate::tensor::Tensor::zeros(device, crate::tensor::dtype::DType::F32, [bytes / 4]);
    held.pointer::<f32>();
    Ok(held)
}

/// Returns all cases, most important first: correctness of a step, then speed.
pub fn cases(device: Device) -> Vec<StepCase> {
    match device {
        Device::Sim => rehearsal(),
        _ => of_gpu(),
    }
}

fn of_gpu() -> Vec<StepCase> {
    let small = |extra: &[&'static str]| [&SMALL, extra].concat();
    let recomputed = small(&["model.top_k=2", "train.recompute=true"]);
    let eager = small(&["train.graph=false"]);
    let mut all = vec![
        case(Kind::NoHostSync, "tiny", "default", &small(&[]), 4, 3.0),
        case(Kind::NoHostSync, "tiny", "default", &eager, 4, 3.0).named("tiny default eager"),
        case(Kind::NoHostSync, "tiny", "topk", &small(&[]), 4, 3.0),
        case(Kind::NoHostSync, "tiny", "default", &recomputed, 4, 3.0)
            .named("tiny 8c2 default recomputed"),
        case(Kind::NoHostSync, "tiny", "lossfree", &small(&[]), 4, 3.0),
        case(Kind::NoHostSync, "557m", "default", &FEW_LAYERS, 4, 10.0)
            .named("557m default 4 layers"),
        case(Kind::Determinism, "tiny", "default", &[], 50, 6.0),
        case(Kind::Determinism, "557m", "default", &FEW_LAYERS, 50, 20.0)
            .named("557m default 4 layers"),
    ];
    all.extend(curves());
    all.extend([
        case(Kind::Connects, "tiny", "default", &small(&[]), 8, 10.0),
        case(Kind::Connects, "557m", "default", &[SEQUENCES], 8, 60.0),
    ]);
    for ranks in [2, 4, 8] {
        let scaled = case(Kind::Scales, "557m", "default", &[SEQUENCES], 12, 120.0);
        all.push(scaled.on_ranks(ranks));
    }
    for (preset, router, micro_batch) in [
        ("1.96b", "default", 8),
        ("1.96b", "default", 32),
        ("7.33b", "default", 8),
        ("1.96b", "topk", 8),
        ("1.96b", "topk", 32),
        ("7.33b", "topk", 8),
        ("557m", "default", 8),
        ("557m", "default", 32),
        ("557m", "topk", 8),
        ("557m", "topk", 32),
    ] {
        let sequences = format!("train.micro_batch={micro_batch}");
        let set = [SEQUENCES, &sequences];
        let timed = case(Kind::Throughput, preset, router, &set, 4, 0.0);
        let timed = timed.named(&on_record(preset, router, micro_batch));
        let estimate = timed.config(Device::Sim).map_or(60.0, |config| {
            let tokens = config.train.sequences_per_step * config.model.sequence_length;
            let flops = count::flops_per_token(&config.model) as f64 * tokens as f64;
            // Weights are created on the host and copied; steps are assumed to reach at least a fifth of the peak.
            let parameters = count::total_parameters(&config.model) as f64;
            5.0 + parameters / 0.2e9 + (WARM + timed.steps + 1) as f64 * flops / 0.2e15
        });
        all.push(StepCase { estimate, ..timed });
    }
    all.push(case(Kind::Resume, "557m", "default", &[SEQUENCES], 5, 60.0));
    all
}

/// Number of steps before those that are checked or timed: the first load kernels, and a later one is captured as a graph.
pub const WARM: u64 = 4;

/// Models whose loss is compared with the recorded loss of the CPU.
pub fn curves() -> [StepCase; 2] {
    [("tiny", 20, 5.0), ("small", 200, 20.0)].map(|(preset, steps, estimate)| {
        let set = format!("train.steps={steps}");
        case(
            Kind::LossParity,
            preset,
            "default",
            &[&set],
            steps,
            estimate,
        )
    })
}

/// Returns a small case of every kind for the simulator, which shows without a GPU that the tasks work.
fn rehearsal() -> Vec<StepCase> {
    let short = [&SMALL[..], &["train.steps=6"]].concat();
    let eager = [&SMALL[..], &["train.graph=false"]].concat();
    vec![
        case(Kind::NoHostSync, "tiny", "default", &SMALL, 4, 8.0),
        case(Kind::NoHostSync, "tiny", "default", &eager, 4, 8.0).named("tiny default eager"),
        case(Kind::Determinism, "tiny", "default", &SMALL, 2, 8.0),
        case(Kind::LossParity, "tiny", "default", &short, 6, 8.0),
        case(Kind::Connects, "tiny", "default", &SMALL, 2, 15.0),
        case(Kind::Scales, "tiny", "default", &SMALL, 2, 30.0).on_ranks(2),
        case(Kind::Throughput, "tiny", "default", &SMALL, 2, 8.0),
        case(Kind::Resume, "tiny", "default", &SMALL, 5, 20.0),
    ]
}
