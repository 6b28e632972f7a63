//! The arguments of each command.

use super::data;
use super::proofs;
use super::ranks::RanksArgs;
use super::values::{architecture, gpu, percent};
use crate::config::Precision;
use crate::device::machine::Chip;
use crate::study::{ablate, plan};
use crate::verify::fault::Fault;
use crate::verify::{bench, hardware};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Train and study sparse Mixture-of-Experts transformers.
#[derive(Parser)]
#[command(
    name = "routegrad",
    version,
    about,
    arg_required_else_help = true,
    after_help = "Exit status: 0 on success; 2 if an argument or a value of the configuration is refused; 1 for any other failure."
)]
pub struct Cli {
    /// Number of threads; it does not change the results [default: all cores].
    #[arg(long, global = true, value_name = "N")]
    pub(super) threads: Option<usize>,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Train a model, and write checkpoints, a log and plots to a folder.
    #[command(after_help = "\
Examples:
  routegrad train
  routegrad train --preset tiny --router topk --steps 300 --out runs/baseline
  routegrad train --experts 32c4 --set router.beta=0.95 --set train.seed=1 --name wide
  routegrad train --data my-books/ --set model.sequence_length=512
  routegrad train --name wide --resume
  mpirun -n 4 routegrad train --preset small --out /shared/runs/small")]
    Train(TrainArgs),
    /// Tokenize parquet, JSON lines or text, and inspect the tokens.
    #[command(subcommand)]
    Data(data::Command),
    /// Measure a model's validation loss, perplexity and bits per byte, or its benchmark scores.
    #[command(after_help = "\
Examples:
  routegrad eval --model runs/tiny-default
  routegrad eval --model runs/tiny-default --without-default-vectors
  routegrad eval --model runs/tiny-default --tasks all --task-data eval/ --limit 200
  routegrad eval --model runs/small-topk --tasks hellaswag,lambada_openai --task-data eval/ --out scores
  routegrad eval --model runs/tiny-default --tasks all --task-data eval/ --compare-default-vectors
  routegrad eval --model runs/tiny-default/checkpoints/step-600 --data other.txt
  mpirun -n 4 routegrad eval --model /shared/runs/small --tasks all --task-data eval/")]
    Eval(EvalArgs),
    /// Analyze a model's router: entropy, load, similarity to the dense gradient and more. Writes JSON, CSV and an HTML
    /// report.
    #[command(after_help = "\
Examples:
  routegrad analyze --model runs/tiny-default
  routegrad analyze --model runs/tiny-topk --data my-books/ --sequences 64 --out report
  mpirun -n 4 routegrad analyze --model /shared/runs/small")]
    Analyze(AnalyzeArgs),
    /// Train a grid of runs over routers, seeds, learning rates or any other key, and compare them in a report.
    ///
    /// If the command is interrupted, run it again to resume.
    #[command(after_help = "\
Examples:
  routegrad ablate --router topk,default,lossfree --seed 0,1,2 --steps 600 --out runs/routers
  routegrad ablate --router default --axis router.beta=0.9,0.99 --experts 8c1,32c4 --dry-run
  routegrad ablate --figure 5 --scale 0.01 --out runs/figure-5
  routegrad ablate --grid my-grid.toml --jobs 2 --out runs/mine
  mpirun -n 8 routegrad ablate --grid my-grid.toml --ranks-per-run 2 --out runs/mine
  routegrad ablate --report-only --out runs/mine --baseline lossfree")]
    Ablate {
        #[command(flatten)]
        ablate: ablate::Args,
        #[command(flatten)]
        ranks: RanksArgs,
    },
    /// Write a model's logits, loss and gradients for given tokens, to compare them with another framework.
    #[command(after_help = "\
Examples:
  routegrad dump --model runs/tiny-topk --tokens tokens.safetensors --out ours.safetensors
  routegrad dump --model downloads/OLMoE --tokens tokens.safetensors --out ours.safetensors --dtype f32
  routegrad dump --model runs/tiny-default --tokens tokens.safetensors --out ours.safetensors --train")]
    Dump(DumpArgs),
    /// Import a model of type mixtral, olmoe, qwen2_moe or qwen3_moe as a run.
    #[command(after_help = "\
Examples:
  routegrad import --from downloads/OLMoE --out runs/olmoe --set model.sequence_length=512
  routegrad train --resume --out runs/olmoe")]
    Import(ImportArgs),
    /// Continue a prompt.
    #[command(after_help = "\
Examples:
  routegrad generate --model runs/tiny-default --prompt 'My fellow citizens, '
  routegrad generate --model runs/tiny-default --temperature 0.5 --top-k 20 --seed 3")]
    Generate(super::generate::GenerateArgs),
    /// Export a model to Hugging Face transformers 4 and 5.
    #[command(after_help = "\
Examples:
  routegrad export --model runs/tiny-topk --to hf --out tiny-topk-hf
  routegrad export --model runs/tiny-default/checkpoints/step-600 --to hf --out half --dtype bf16")]
    Export(ExportArgs),
    /// Check the gradients of operations, routers and whole models against finite differences in f64.
    #[command(after_help = "\
Examples:
  routegrad gradcheck
  routegrad gradcheck 'router default'
  routegrad gradcheck default --plant default-dot
  routegrad gradcheck --device sim
  routegrad gradcheck --device sim --sim-arch sm_80")]
    Gradcheck {
        /// Check only subjects whose name contains this text.
        #[arg(default_value = "", hide_default_value = true)]
        filter: String,
        /// Leave this term out of the gradients, to test that the check then fails.
        #[arg(long, value_name = "FAULT")]
        plant: Option<Fault>,
        /// cpu; or sim, which checks the kernels by directional derivatives: the MoE layer of each router, and whole
        /// models.
        #[arg(long, value_name = "DEVICE", value_enum, default_value = "cpu")]
        device: CheckedDevice,
        /// GPU architecture that --device sim simulates: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120 [default: sm_90].
        #[arg(long, value_name = "ARCH", value_parser = architecture)]
        sim_arch: Option<i32>,
    },
    /// List the operations that a training step runs as kernels, and how often.
    #[command(after_help = "\
Examples:
  routegrad ops
  routegrad ops --router remoe --set model.norm=layernorm")]
    Ops {
        /// Preset of the model.
        #[arg(long, value_name = "NAME", default_value = "tiny")]
        preset: String,
        /// Router of the model.
        #[arg(long, value_name = "NAME", default_value = "default")]
        router: String,
        /// Set one key of the configuration; can be repeated.
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Print the resolved configuration as TOML, with the meaning and default of every key.
    #[command(after_help = "\
Examples:
  routegrad config
  routegrad config --preset 557m --experts 32c4 --router lossfree > my.toml")]
    Config(SettingsArgs),
    /// List the routers with their settings and defaults.
    Routers,
    /// Estimate the parameters, FLOPs, memory, time and disk space of a run.
    #[command(after_help = "\
Examples:
  routegrad plan
  routegrad plan --preset 7.33b --device h200 --set train.micro_batch=8
  routegrad plan --preset 557m --device rtx4090 --set train.bf16_moments=true --set train.recompute=true
  routegrad plan --preset 1.96b --experts 32c4 --router topk --device h200 --steps 76000 --json")]
    Plan(PlanArgs),
    /// Print the roofline times of the kernels of an MoE layer on one GPU, and the time that `default` adds to `topk`.
    #[command(after_help = "\
Examples:
  routegrad floors
  routegrad floors --preset 557m --tokens 65536
  routegrad floors --preset 557m --device rtx4090")]
    Floors {
        /// Preset of the model; can be repeated [default: 1.96b and 7.33b].
        #[arg(long, value_name = "NAME")]
        preset: Vec<String>,
        /// Tokens per micro-batch.
        #[arg(long, value_name = "N", default_value_t = bench::roofline::TOKENS)]
        tokens: usize,
        /// GPU, as in `plan --device`.
        #[arg(long, value_name = "GPU", default_value = "h200", value_parser = gpu)]
        device: &'static Chip,
    },
    /// Verify and time the kernels and training steps that have no record yet on a GPU, the most important first.
    #[command(after_help = "\
Examples:
  routegrad hardware-check --list
  routegrad hardware-check --budget 600
  routegrad hardware-check --only 'agrees: unit'
  routegrad hardware-check --device sim --out /tmp/records
  routegrad hardware-check --merge from-node/hardware-nvidia-h200.jsonl")]
    HardwareCheck(proofs::HardwareArgs),
    /// Print which kernels and training steps are verified on a GPU, as Markdown tables.
    Status(proofs::StatusArgs),
    /// Benchmark kernels and MoE layers against cuBLAS and the roofline; the report also shows PyTorch and other
    /// open-source kernels.
    ///
    /// On a GPU it times the kernels; without a GPU it times the operations of the CPU and the simulator. New records
    /// are merged into the folder of records.
    #[command(after_help = "\
Examples:
  routegrad bench
  routegrad bench --only 'layer_forward 1.96b' --budget 60
  routegrad bench --baseline before.jsonl --fail-slower 5%
  routegrad bench --list --json > cases.jsonl; python3 benches/peers/run.py cases.jsonl --out peers.jsonl
  routegrad bench --merge peers.jsonl
  routegrad bench --report bench.html --pictures docs --update README.md")]
    Bench(BenchArgs),
}

/// The device on which gradients are checked.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CheckedDevice {
    Cpu,
    Sim,
}

/// The configuration of a run: a preset, and changes to it.
#[derive(Args)]
pub(super) struct SettingsArgs {
    /// Model: tiny, small, 557m, 1.96b or 7.33b [default: tiny].
    #[arg(long, value_name = "NAME")]
    pub(super) preset: Option<String>,
    /// Experts and active experts per MoE layer: 32c4 is 32 experts, 4 of them active. A width of an expert that --config
    /// or --set gives is kept.
    #[arg(long, value_name = "NcK")]
    pub(super) experts: Option<String>,
    /// TOML file with any keys of the configuration.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Set one key of the configuration; can be repeated. `routegrad config` lists the keys.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Router; `routegrad routers` lists them.
    #[arg(long, value_name = "NAME")]
    pub(super) router: Option<String>,
    /// Optimizer steps.
    #[arg(long, value_name = "N")]
    pub(super) steps: Option<i64>,
    /// Sequences per optimizer step.
    #[arg(long, value_name = "N")]
    pub(super) batch: Option<i64>,
    /// Sequences per forward and backward pass.
    #[arg(long, value_name = "N")]
    pub(super) micro_batch: Option<i64>,
    /// Tokens per sequence.
    #[arg(long, value_name = "N")]
    pub(super) sequence_length: Option<i64>,
    /// Peak learning rate.
    #[arg(long, value_name = "RATE")]
    pub(super) learning_rate: Option<f64>,
    /// Steps between evaluations.
    #[arg(long, value_name = "N")]
    pub(super) eval_interval: Option<i64>,
    /// Seed of the weights, the order of the data and the routers that sample.
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<i64>,
    /// Text file, folder of text files, or folder that `routegrad data prepare` created [default: the embedded text].
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
}

#[derive(Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,
    /// Device: cpu; sim, the CUDA kernels on the simulator; cuda, the CUDA kernels on a GPU [default: cpu].
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// GPU architecture that --device sim simulates: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120 [default: sm_90].
    #[arg(long, value_name = "ARCH", value_parser = architecture)]
    pub(super) sim_arch: Option<i32>,
    /// Folder of the run [default: runs/NAME].
    #[arg(long, value_name = "DIR", conflicts_with = "name")]
    pub(super) out: Option<PathBuf>,
    /// Name of the run [default: the preset, the experts if given, and the router].
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,
    /// Resume the run from its newest complete checkpoint, with the configuration of the run. Other flags cannot change
    /// its model, router, seed, precision, batch or data.
    #[arg(long, conflicts_with_all = ["preset", "experts", "config"])]
    pub(super) resume: bool,
    /// Write no checkpoints, for timing.
    #[arg(long)]
    pub(super) no_checkpoint: bool,
    /// Write a record of the last step to timeline.json: on a GPU the time of each kernel, on the simulator its bytes
    /// and operations.
    #[arg(long)]
    pub(super) timeline: bool,
    /// Show no progress.
    #[arg(long)]
    pub(super) quiet: bool,
    #[command(flatten)]
    pub(super) ranks: RanksArgs,
}

#[derive(Args)]
pub(super) struct EvalArgs {
    /// Run, one of its checkpoints, or a model folder of transformers.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Text whose validation documents are used [default: the text that the model was trained on].
    #[arg(long, value_name = "PATH", conflicts_with = "tasks")]
    pub(super) data: Option<String>,
    /// Number of validation sequences, spread evenly over the text; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "tasks")]
    pub(super) sequences: usize,
    /// Evaluate without the default vectors of the router `default`.
    #[arg(long)]
    pub(super) without_default_vectors: bool,
    /// Evaluate with and without the default vectors, whatever router.use_at_evaluation is, and compare.
    #[arg(long, conflicts_with = "without_default_vectors")]
    pub(super) compare_default_vectors: bool,
    /// Precision [default: that of training]. In f32, rounding may decide between two experts with almost equal logits;
    /// f64 shows whether a difference has this cause.
    #[arg(long, value_name = "DTYPE")]
    pub(super) dtype: Option<Precision>,
    /// Benchmarks to score instead of the loss, separated by commas; `all` for those whose documents are present.
    #[arg(
        long,
        value_name = "NAMES",
        requires = "task_data",
        value_delimiter = ','
    )]
    pub(super) tasks: Vec<String>,
    /// Folder with the documents of the benchmarks: TASK.jsonl, uncompressed or compressed with zstd or gzip; see
    /// docs/evaluation.md.
    #[arg(long, value_name = "DIR", requires = "tasks")]
    pub(super) task_data: Option<PathBuf>,
    /// Number of questions per benchmark; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "tasks")]
    pub(super) limit: usize,
    /// Folder for scores.json and, with one line per question, TASK.jsonl.
    #[arg(long, value_name = "DIR", requires = "tasks")]
    pub(super) out: Option<PathBuf>,
    #[command(flatten)]
    pub(super) ranks: RanksArgs,
}

#[derive(Args)]
pub(super) struct DumpArgs {
    /// Folder with config.json and safetensors files, a run, or one of its checkpoints.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Safetensors file with `tokens`, int64 [B, S + 1].
    #[arg(long, value_name = "FILE")]
    pub(super) tokens: PathBuf,
    /// Output file, with `logits`, `loss` and, for each parameter, `grad.NAME`.
    #[arg(long, value_name = "FILE")]
    pub(super) out: PathBuf,
    /// Precision of the arithmetic.
    #[arg(long, value_name = "DTYPE", default_value = "f64")]
    pub(super) dtype: Precision,
    /// Compute as in a training pass, which updates the router's state once; also write this state.
    #[arg(long)]
    pub(super) train: bool,
}

#[derive(Args)]
pub(super) struct ImportArgs {
    /// Folder with config.json and safetensors files.
    #[arg(long, value_name = "DIR")]
    pub(super) from: PathBuf,
    /// Folder of the run.
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Router to train with [default: the model's own]. It keeps the router weights of the model; its additional state
    /// is initialized.
    #[arg(long, value_name = "NAME")]
    pub(super) router: Option<String>,
    /// Text to train on: a folder that `data prepare` created with the model's tokenizer.json [default: the embedded
    /// text].
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
    /// Set one key: a key of train, data or balance, model.sequence_length, or a setting of --router; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
}

#[derive(Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,
    /// Device to plan for.
    #[arg(
        long,
        value_name = "DEVICE",
        value_enum,
        default_value = "cpu",
        ignore_case = true
    )]
    pub(super) device: plan::Target,
    /// Number of processes that share the batch, each with one GPU.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) ranks: usize,
    /// Number of nodes that the processes are divided among.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) nodes: usize,
    /// Folder with the records of hardware-check, which contain the measured speed of a GPU.
    #[arg(long, value_name = "DIR", default_value = hardware::FOLDER)]
    pub(super) records: PathBuf,
    /// Print JSON, with bytes and seconds as units.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args)]
pub(super) struct AnalyzeArgs {
    /// Run, one of its checkpoints, or a model folder of transformers.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Text file or folder to use [default: the text that the model was trained on].
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
    /// Number of held-out sequences, spread evenly over the text; the analysis by source uses as many of each source.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(super) sequences: usize,
    /// Folder of the report [default: `analysis` in the run's folder].
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    #[command(flatten)]
    pub(super) ranks: RanksArgs,
}

#[derive(Args)]
pub(super) struct ExportArgs {
    /// Run, one of its checkpoints, or a model folder of transformers.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Format of the export: hf for Hugging Face.
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(super) to: ExportFormat,
    /// New folder for the model.
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Type of the weights: f32 or bf16.
    #[arg(long, value_name = "DTYPE", value_enum, default_value = "f32")]
    pub(super) dtype: ExportedDtype,
}

/// Formats of exported models.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ExportFormat {
    Hf,
}

/// Element type of exported weights.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ExportedDtype {
    F32,
    Bf16,
}

#[derive(Args)]
pub(super) struct BenchArgs {
    /// Folder of the records.
    #[arg(long, value_name = "DIR", default_value = hardware::FOLDER)]
    pub(super) out: PathBuf,
    /// cpu, sim or cuda [default: cuda where there is a GPU, else cpu and sim].
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// small, core or full [default: core on a GPU, else small].
    #[arg(long, value_name = "SET", value_enum)]
    pub(super) set: Option<bench::case::Set>,
    /// Run only cases whose name contains this text.
    #[arg(long, value_name = "TEXT")]
    pub(super) only: Option<String>,
    /// Time limit in seconds; cases that do not fit are left out and listed.
    #[arg(long, value_name = "SECONDS", default_value_t = 420.0)]
    pub(super) budget: f64,
    /// List the cases in order, with estimated times; measure nothing.
    #[arg(long)]
    pub(super) list: bool,
    /// Print the list as JSON lines, for benches/peers/run.py.
    #[arg(long, requires = "list")]
    pub(super) json: bool,
    /// List the cases that are slower than in this file of records.
    #[arg(long, value_name = "FILE")]
    pub(super) baseline: Option<PathBuf>,
    /// Fail when a case is slower than the baseline by more than this, such as 5%.
    #[arg(long, value_name = "PERCENT", requires = "baseline", value_parser = percent)]
    pub(super) fail_slower: Option<f64>,
    /// Add the records of these files to the folder; measure nothing.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["list", "only", "baseline"])]
    pub(super) merge: Vec<PathBuf>,
    /// Write the outputs of the cases to this safetensors file; measure nothing.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["list", "merge", "baseline"])]
    pub(super) dump: Option<PathBuf>,
    /// Write an HTML page with all records; measure nothing.
    #[arg(long, value_name = "FILE", group = "page", conflicts_with_all = ["list", "merge", "baseline", "dump"])]
    pub(super) report: Option<PathBuf>,
    /// With --report: also write the main figures as SVG files to this folder.
    #[arg(long, value_name = "DIR", requires = "report")]
    pub(super) pictures: Option<PathBuf>,
    /// Fit a cost model to the recorded times of matrix products; print how their time is divided, and the predicted
    /// times of whole steps. Measure nothing.
    #[arg(long, group = "page", conflicts_with_all = ["list", "merge", "baseline", "dump"])]
    pub(super) predict: bool,
    /// With --report or --predict: update the table between the markers of this page.
    #[arg(long, value_name = "FILE", requires = "page")]
    pub(super) update: Option<PathBuf>,
}
