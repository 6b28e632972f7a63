//! What each command takes.

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
    after_help = "Exit status: 0 on success; 2 where an argument or a value of the configuration is refused; 1 for any other failure."
)]
pub struct Cli {
    /// Threads to compute with; the results do not depend on it [default: all cores].
    #[arg(long, global = true, value_name = "N")]
    pub(super) threads: Option<usize>,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Train a model; checkpoints, log and plots go to a folder.
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
    /// Train a grid of runs (routers, seeds, learning rates, any key) and report how they compare.
    ///
    /// Interrupted at any time, the same command resumes.
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
    /// Write a model's logits, loss and gradients on given tokens, to compare with another framework.
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
    /// Check every gradient by finite differences in f64: operations, routers, whole models.
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
        /// Leave this term out of the gradients; the check must then fail.
        #[arg(long, value_name = "FAULT")]
        plant: Option<Fault>,
        /// cpu, or sim: the kernels, in the MoE layer of each router and in whole models, by directional derivatives.
        #[arg(long, value_name = "DEVICE", value_enum, default_value = "cpu")]
        device: CheckedDevice,
        /// GPU that --device sim stands for: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120 [default: sm_90].
        #[arg(long, value_name = "ARCH", value_parser = architecture)]
        sim_arch: Option<i32>,
    },
    /// List the operations that a training step runs as kernels, and how often.
    #[command(after_help = "\
Examples:
  routegrad ops
  routegrad ops --router remoe --set model.norm=layernorm")]
    Ops {
        /// Model to run a step of.
        #[arg(long, value_name = "NAME", default_value = "tiny")]
        preset: String,
        /// Its router.
        #[arg(long, value_name = "NAME", default_value = "default")]
        router: String,
        /// Set one key of the configuration; may be given again.
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
    /// Estimate parameters, FLOPs, memory, time and files of a run.
    #[command(after_help = "\
Examples:
  routegrad plan
  routegrad plan --preset 7.33b --device h200 --set train.micro_batch=8
  routegrad plan --preset 557m --device rtx4090 --set train.bf16_moments=true --set train.recompute=true
  routegrad plan --preset 1.96b --experts 32c4 --router topk --device h200 --steps 76000 --json")]
    Plan(PlanArgs),
    /// Print the roofline time of an MoE layer's kernels on one GPU, and what `default` adds to `topk`.
    #[command(after_help = "\
Examples:
  routegrad floors
  routegrad floors --preset 557m --tokens 65536
  routegrad floors --preset 557m --device rtx4090")]
    Floors {
        /// Model whose layer is taken; may be given again [default: 1.96b and 7.33b].
        #[arg(long, value_name = "NAME")]
        preset: Vec<String>,
        /// Tokens of a micro-batch.
        #[arg(long, value_name = "N", default_value_t = bench::roofline::TOKENS)]
        tokens: usize,
        /// GPU, as in `plan --device`.
        #[arg(long, value_name = "GPU", default_value = "h200", value_parser = gpu)]
        device: &'static Chip,
    },
    /// Verify and time kernels and training steps on a GPU: those without a record, most important first.
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
    /// Benchmark every kernel against cuBLAS and its roofline; the report also has PyTorch and other open kernels.
    ///
    /// On a GPU it times the kernels, elsewhere the operations of the CPU and the simulator. Records are kept and merged.
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

/// Where gradients are checked.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CheckedDevice {
    Cpu,
    Sim,
}

/// The configuration of a run: a preset, and what is changed in it.
#[derive(Args)]
pub(super) struct SettingsArgs {
    /// Model: tiny, small, 557m, 1.96b or 7.33b [default: tiny].
    #[arg(long, value_name = "NAME")]
    pub(super) preset: Option<String>,
    /// Experts and active experts of an MoE layer, as in 32c4.
    #[arg(long, value_name = "NcK")]
    pub(super) experts: Option<String>,
    /// TOML file with any keys of the configuration.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Set one key of the configuration; may be given again. `routegrad config` lists the keys.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Router; `routegrad routers` lists them.
    #[arg(long, value_name = "NAME")]
    pub(super) router: Option<String>,
    /// Optimizer steps.
    #[arg(long, value_name = "N")]
    pub(super) steps: Option<i64>,
    /// Sequences of an optimizer step.
    #[arg(long, value_name = "N")]
    pub(super) batch: Option<i64>,
    /// Sequences that go through the model at once.
    #[arg(long, value_name = "N")]
    pub(super) micro_batch: Option<i64>,
    /// Tokens of a sequence.
    #[arg(long, value_name = "N")]
    pub(super) sequence_length: Option<i64>,
    /// Peak learning rate.
    #[arg(long, value_name = "RATE")]
    pub(super) learning_rate: Option<f64>,
    /// Steps between evaluations.
    #[arg(long, value_name = "N")]
    pub(super) eval_interval: Option<i64>,
    /// Seed of the weights, the order of the data and the sampling routers.
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<i64>,
    /// Text file or folder of text files, or what `routegrad data prepare` made, instead of the embedded text.
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
}

#[derive(Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    pub(super) settings: SettingsArgs,
    /// Where the model runs: cpu; sim, the kernels on the simulator; cuda, the kernels on a GPU [default: cpu].
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<String>,
    /// GPU that --device sim stands for: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120 [default: sm_90].
    #[arg(long, value_name = "ARCH", value_parser = architecture)]
    pub(super) sim_arch: Option<i32>,
    /// Folder of the run [default: runs/NAME].
    #[arg(long, value_name = "DIR", conflicts_with = "name")]
    pub(super) out: Option<PathBuf>,
    /// Name of the run [default: the preset, the experts if given, and the router].
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<String>,
    /// Resume from the newest complete checkpoint of the run, with its configuration; --set and other flags may change keys
    /// that do not make it another run.
    #[arg(long, conflicts_with_all = ["preset", "experts", "config"])]
    pub(super) resume: bool,
    /// Write no checkpoints: for timing.
    #[arg(long)]
    pub(super) no_checkpoint: bool,
    /// Record the last step: on a GPU the time of each kernel, on the simulator its bytes and operations. Writes
    /// timeline.json.
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
    /// Run, one of its checkpoints, or a model's folder of transformers.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Text whose validation documents to use [default: what the model was trained on].
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
    /// Validation sequences, spread evenly; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) sequences: usize,
    /// Leave out the default vectors of a model of the router `default`.
    #[arg(long)]
    pub(super) without_default_vectors: bool,
    /// Evaluate the model with and without its default vectors, and compare.
    #[arg(long, conflicts_with = "without_default_vectors")]
    pub(super) compare_default_vectors: bool,
    /// Precision [default: that of training]. In f32 a token whose two best experts are equal up to rounding may go to
    /// either of them; f64 distinguishes such a difference from an error.
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
    /// Folder of their documents, TASK.jsonl, plain or compressed with zstd or gzip; see docs/evaluation.md.
    #[arg(long, value_name = "DIR")]
    pub(super) task_data: Option<PathBuf>,
    /// Questions of each benchmark; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) limit: usize,
    /// Folder for scores.json and, a line to a question, TASK.jsonl.
    #[arg(long, value_name = "DIR", requires = "tasks")]
    pub(super) out: Option<PathBuf>,
    #[command(flatten)]
    pub(super) ranks: RanksArgs,
}

#[derive(Args)]
pub(super) struct DumpArgs {
    /// Folder with config.json and safetensors files; or a run, or one of its checkpoints.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Safetensors file with `tokens`, int64 [B, S + 1].
    #[arg(long, value_name = "FILE")]
    pub(super) tokens: PathBuf,
    /// File of `logits`, `loss` and `grad.NAME` of every parameter.
    #[arg(long, value_name = "FILE")]
    pub(super) out: PathBuf,
    /// Arithmetic.
    #[arg(long, value_name = "DTYPE", default_value = "f64")]
    pub(super) dtype: Precision,
    /// Compute as in a training pass: the router's state is updated once and also written.
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
    /// Router to train with instead of the model's own; its weights are kept, and its additional state is initialized.
    #[arg(long, value_name = "NAME")]
    pub(super) router: Option<String>,
    /// Text to train on, instead of the embedded text: what `data prepare` made with the model's tokenizer.json.
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
    /// Set a key of the training: of train, data and balance, model.sequence_length, or a setting of --router.
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
    /// Folder of the records of hardware-check, from which the speed of a GPU is taken.
    #[arg(long, value_name = "DIR", default_value = hardware::FOLDER)]
    pub(super) records: PathBuf,
    /// Print JSON, in bytes and seconds.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args)]
pub(super) struct AnalyzeArgs {
    /// Run, one of its checkpoints, or a model's folder of transformers.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Text file or folder to analyse on [default: what the model was trained on].
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<String>,
    /// Held-out sequences, spread evenly, and as many of each source of the text.
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
    /// Run, one of its checkpoints, or a model's folder of transformers.
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

/// Programs that exported models are for.
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
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    pub(super) only: Option<String>,
    /// Time limit in seconds; cases that do not fit are left out and listed.
    #[arg(long, value_name = "SECONDS", default_value_t = 420.0)]
    pub(super) budget: f64,
    /// List what would be measured, in order, with estimates; measure nothing.
    #[arg(long)]
    pub(super) list: bool,
    /// The list as JSON lines, for benches/peers/run.py.
    #[arg(long, requires = "list")]
    pub(super) json: bool,
    /// Name the cases that are slower than in this file of records.
    #[arg(long, value_name = "FILE")]
    pub(super) baseline: Option<PathBuf>,
    /// Fail when a case is slower than the baseline by more than this, such as 5%.
    #[arg(long, value_name = "PERCENT", requires = "baseline", value_parser = percent)]
    pub(super) fail_slower: Option<f64>,
    /// Add the records of these files to the folder; measure nothing.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["list", "only", "baseline"])]
    pub(super) merge: Vec<PathBuf>,
    /// Write what the cases compute, once, to this safetensors file; measure nothing.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["list", "merge", "baseline"])]
    pub(super) dump: Option<PathBuf>,
    /// Write a page with all records; measure nothing.
    #[arg(long, value_name = "FILE", group = "page", conflicts_with_all = ["list", "merge", "baseline", "dump"])]
    pub(super) report: Option<PathBuf>,
    /// With --report: also the main pictures, as SVG, into this folder.
    #[arg(long, value_name = "DIR", requires = "report")]
    pub(super) pictures: Option<PathBuf>,
    /// Fit a cost model to the recorded timings of products, and print where their time goes and what whole steps are expected
    /// to take; measure nothing.
    #[arg(long, group = "page", conflicts_with_all = ["list", "merge", "baseline", "dump"])]
    pub(super) predict: bool,
    /// With --report or --predict: update the table between the markers of this page.
    #[arg(long, value_name = "FILE", requires = "page")]
    pub(super) update: Option<PathBuf>,
}
