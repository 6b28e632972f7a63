//! Ablations: a grid of training runs, trained one after another or several at a time, and a report of their results.
//!
//! `OUT/` holds `ablation.toml`, the resolved grid; `runs/NAME/` for each run, in the format of `train`, so that a run
//! that `train` made with the same configuration counts as finished; and the report: `report.html`, `summary.md`, and a
//! CSV and an SVG per section. A grid that was interrupted and continued results in the same files as one that was not,
//! except for `timing.csv` and the section of that name.

mod configurations;
mod figures;
mod grid;
mod groups;
mod names;
mod paper;
mod report;
mod run;
mod spikes;
mod summary;
#[cfg(test)]
mod tests;
mod verdict;

use crate::device::Device;
use crate::device::machine::H200_PEAK;
use crate::dist::{Collective, agree, doing, doing_alone, same_on_all};
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::lock::FolderLock;
use crate::report::page::{Table, create};
use crate::routers;
use figures::short_number;
use grid::{Grid, Plan};
use names::{long, replaced};
use run::State;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use toml::Value;

/// File with the resolved grid in an ablation's folder.
const GRID_FILE: &str = "ablation.toml";

/// FLOP/s of one CPU core, and of one H200 at half of its dense bf16 peak. Only used to estimate costs.
const CORE: f64 = 50e9;
const GPU: f64 = 0.5 * H200_PEAK;

/// Arguments of `ablate`.
#[derive(clap::Args)]
pub struct Args {
    /// Routers to compare, separated by commas; the first is the baseline.
    #[arg(long, value_name = "LIST")]
    router: Option<String>,
    /// Seeds.
    #[arg(long, value_name = "LIST")]
    seed: Option<String>,
    /// Peak learning rates.
    #[arg(long, value_name = "LIST")]
    learning_rate: Option<String>,
    /// Experts and active experts, as in 8c1,32c4.
    #[arg(long, value_name = "LIST")]
    experts: Option<String>,
    /// Models [default: tiny].
    #[arg(long, value_name = "LIST")]
    preset: Option<String>,
    /// Values of any other key of the configuration; can be repeated.
    #[arg(long, value_name = "KEY=LIST")]
    axis: Vec<String>,
    /// Set one key of the configuration in all runs; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Optimizer steps of each run.
    #[arg(long, value_name = "N")]
    steps: Option<i64>,
    /// Text file or folder of text files, instead of the embedded corpus.
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// TOML file with any keys of the configuration, for all runs.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Grid file; the flags above override it. docs/ablations.md lists its keys.
    #[arg(long, value_name = "FILE", conflicts_with = "figure")]
    grid: Option<PathBuf>,
    /// Grid of a figure of the Default MoE paper: 2 or 5 to 13.
    #[arg(long, value_name = "N")]
    figure: Option<String>,
    /// Scale of a figure or grid, above 0 and at most 1: uses a smaller model, and √scale times the steps.
    #[arg(long, value_name = "S")]
    scale: Option<f64>,
    /// Name of each run, with axes in braces, as in '{router}-{seed}'.
    #[arg(long, value_name = "TEMPLATE")]
    name: Option<String>,
    /// Value with which the other values are compared [default: the first router].
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,
    /// Target perplexity [default: the final perplexity of the baseline].
    #[arg(long, value_name = "X")]
    target_perplexity: Option<f64>,
    /// Folder for the runs and the report.
    #[arg(long, value_name = "DIR", default_value = "runs/ablation")]
    out: PathBuf,
    /// Number of runs that are trained at a time; the threads are divided among them.
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Under a launcher: number of processes per run; several runs are trained at a time.
    #[arg(long, value_name = "N", default_value_t = 1)]
    ranks_per_run: usize,
    /// List the runs and their estimated cost; train nothing.
    #[arg(long)]
    dry_run: bool,
    /// Write the report of the runs in their present state; train nothing.
    #[arg(long, conflicts_with = "dry_run")]
    report_only: bool,
    /// Show no progress.
    #[arg(long)]
    quiet: bool,
}

impl Args {
    fn check_jobs(&self, ranks: usize, plan: &Plan) -> Result<()> {
        let jobs = |what: &str, help: &str| {
            let jobs = self.jobs.to_string();
            Err(Error::usage("--jobs", what, jobs, help))
        };
        if self.jobs == 0 {
            let help = "remove the option to train one run at a time";
            return jobs("a number of runs from 1 up", help);
        }
        // The runs would share one stream of the GPU, where the launches of one run would become part of another's graph.
        let on_gpu = |run: &grid::Run| run.config.train.device == Device::Cuda;
        if self.jobs > 1 && plan.runs.iter().any(on_gpu) {
            return jobs(
                "1 for runs on a GPU, since a run uses all of it",
                "remove the option; with several GPUs, start the command with mpirun, srun or torchrun",
            );
        }
        if self.jobs > 1 && ranks > 1 {
            return jobs(
                "1 under a launcher, since its processes determine how many runs are trained at a time",
                "remove the option",
            );
        }
        if self.ranks_per_run != 1 && ranks == 1 {
            return Err(Error::usage(
                "--ranks-per-run",
                "1 without a launcher, or with one process",
                self.ranks_per_run.to_string(),
                "remove the option, or start the command with mpirun, srun or torchrun",
            ));
        }
        Ok(())
    }

    /// Returns the grid, and a description of how it was scaled.
    fn grid(&self) -> Result<(Grid, Option<String>)> {
        let saved = self.out.join(GRID_FILE);
        let mut grid = match (&self.grid, &self.figure) {
            (Some(path), _) => Grid::read(path)?,
            (None, Some(figure)) => paper::figure(figure)?,
            // Without arguments for the grid, the report is that of the grid in the folder.
            (None, None) if self.report_only && saved.exists() => Grid::read(&saved)?,
            (None, None) => Grid::default(),
        };
        let scaled = match (self.scale, &self.figure) {
            (None, None) => None,
            (scale, _) => Some(paper::scale(&mut grid, scale.unwrap_or(1.0))?),
        };
        let mut lists = BTreeMap::new();
        for (flag, key, list) in [
            ("--preset", "preset", &self.preset),
            ("--experts", "experts", &self.experts),
            ("--router", "router", &self.router),
            ("--learning-rate", "learning_rate", &self.learning_rate),
            ("--seed", "seed", &self.seed),
        ] {
            let Some(list) = list else { continue };
            lists.insert(long(key), flag);
            match values(list)?.as_slice() {
                [one] if !matches!(key, "router" | "seed") => grid.set(key, one.clone()),
                all => grid.vary(key, all.to_vec()),
            }
        }
        for axis in &self.axis {
            let (key, list) = pair("--axis", axis)?;
            refuse_second(&lists, "--axis", key)?;
            lists.insert(long(key), "--axis");
            grid.vary(key, values(list)?);
        }
        let experts = "experts";
        if self.experts.is_none() && grid.axes.iter().any(|a| a.contains_key(experts)) {
            let keys = replaced(experts).iter();
            lists.extend(keys.map(|key| (*key, "the axis `experts` of the grid")));
        }
        for set in &self.set {
            let (key, value) = pair("--set", set)?;
            refuse_second(&lists, "--set", key)?;
            grid.set(key, parsed(value));
        }
        // As in the other commands, --experts has priority over --set.
        if self.experts.is_some() {
            grid.base.retain(|key, _| !replaced(experts).contains(&key));
        }
        if let Some(steps) = self.steps {
            refuse_second(&lists, "--steps", "steps")?;
            grid.set("steps", Value::Integer(steps));
        }
        if let Some(data) = &self.data {
            refuse_second(&lists, "--data", "data")?;
            grid.set("data", Value::String(data.clone()));
        }
        grid.config = self.config.clone().or(grid.config);
        grid.name = self.name.clone().or(grid.name);
        grid.baseline = self.baseline.clone().or(grid.baseline);
        grid.target_perplexity = self.target_perplexity.or(grid.target_perplexity);
        check_target(grid.target_perplexity)?;
        Ok((grid, scaled))
    }
}

fn check_target(perplexity: Option<f64>) -> Result<()> {
    match perplexity {
        Some(target) if !(target > 1.0 && target.is_finite()) => Err(Error::usage(
            "--target-perplexity",
            "a perplexity above 1",
            format!("{target:?}"),
            "remove the option to use the baseline's final perplexity",
        )),
        _ => Ok(()),
    }
}

/// Refuses a `key` in `flag` if an earlier flag, in `lists`, already gives its values, or those of a key that it replaces.
fn refuse_second(lists: &BTreeMap<&str, &str>, flag: &str, key: &str) -> Result<()> {
    let mut keys = std::iter::once(long(key)).chain(replaced(long(key)).iter().copied());
    match keys.find_map(|key| Some((key, lists.get(key)?))) {
        None => Ok(()),
        Some((given, other)) => Err(Error::usage(
            flag,
            match given == long(key) {
                true => format!("a key other than `{key}`, whose values {other} gives"),
                false => format!("no `{key}` beside `{given}`, whose values {other} gives"),
            },
            format!("`{key}`"),
            "give all values of a key in one list",
        )),
    }
}

/// Splits `key=value`.
fn pair<'a>(flag: &str, text: &'a str) -> Result<(&'a str, &'a str)> {
    let halves = text.split_once('=').map(|(k, v)| (k.trim(), v.trim()));
    halves.ok_or_else(|| {
        Error::usage(
            flag,
            "key=value, as in train.learning_rate=1e-3,3e-3",
            format!("`{text}`"),
            "add the values",
        )
    })
}

/// Parses a value in TOML, or a bare word as a string.
fn parsed(text: &str) -> Value {
    let table = format!("v = {text}").parse::<toml::Table>().ok();
    let value = table.and_then(|mut t| t.remove("v"));
    value.unwrap_or_else(|| Value::String(text.into()))
}

/// Splits values at commas, except commas in brackets or quotes.
fn values(list: &str) -> Result<Vec<Value>> {
    let (mut parts, mut depth, mut quoted) = (vec![String::new()], 0, false);
    for c in list.chars() {
        match c {
            '"' => quoted = !quoted,
            '[' | '{' if !quoted => depth += 1,
            ']' | '}' if !quoted => depth -= 1,
            _ => {}
        }
        match (c, parts.last_mut()) {
            (',', _) if depth == 0 && !quoted => parts.push(String::new()),
            (c, Some(part)) => part.push(c),
            (_, None) => {}
        }
    }
    if parts.iter().any(|p| p.trim().is_empty()) {
        return Err(Error::usage(
            "a list of values",
            "at least one value, and none empty",
            format!("`{list}`"),
            "separate the values by single commas",
        ));
    }
    Ok(parts.iter().map(|p| parsed(p.trim())).collect())
}

/// Runs the command as one of several ranks. Returns the text for the standard output, on rank 0. If `stop` is set, the
/// current runs are saved, and the same command continues them later.
///
/// # Errors
/// When the grid cannot be planned, a folder holds runs of another configuration, or the report cannot be written. A run
/// that fails is not an error; the report names it.
pub fn command(args: &Args, dist: &Arc<dyn Collective>, stop: &AtomicBool) -> Result<String> {
    let (grid, scaled) = args.grid()?;
    let plan = grid.plan()?;
    let out = &args.out;
    args.check_jobs(dist.size(), &plan)?;
    let first = dist.rank() == 0;
    if args.dry_run {
        return match first {
            true => dry_run(out, &grid, &plan, scaled),
            false => Ok(String::new()),
        };
    }
    let prepare = || {
        // Finds an invalid baseline before any run starts.
        summary::summarize(out, &plan, grid.baseline.as_deref(), None)?;
        create(out)?;
        // Writing only the report needs no lock on the folder.
        let lock = match args.report_only {
            true => None,
            false => Some(FolderLock::take(out)?),
        };
        let saved = out.join(GRID_FILE);
        // Writing only a report with other arguments does not change the stored grid.
        if !args.report_only || !saved.exists() {
            publish(&saved, grid.to_toml()?)?;
        }
        Ok(lock)
    };
    doing("the preparation of the grid");
    let help = "start every rank with the same arguments and files";
    let both = |_: &str, _: &str| "different grids".into();
    same_on_all(&**dist, &grid.to_toml()?, both, help)?;
    let _lock = agree(&**dist, if first { prepare() } else { Ok(None) })?;
    let mut finished = true;
    if !args.report_only {
        finished = match dist.size() {
            1 => run::all(out, &plan.runs, args.jobs, args.quiet, stop)?,
            _ => groups::all(out, &plan.runs, dist, args.ranks_per_run, args.quiet, stop)?,
        };
    }
    if !first {
        return Ok(String::new());
    }
    doing_alone("the report");
    let summary = summary::summarize(out, &plan, grid.baseline.as_deref(), grid.target_perplexity)?;
    let report = report::Report {
        grid: &grid,
        plan: &plan,
        summary: &summary,
    };
    let mut text = report::write(&report, out)?;
    for name in run::others(out, &plan.runs) {
        let _ = writeln!(
            text,
            "\n{name} in {} is not part of this grid",
            out.display()
        );
    }
    let _ = match finished {
        true => write!(text, "\nreport: {}", out.join("report.html").display()),
        false => write!(
            text,
            "\nstopped and saved; run the same command again to continue"
        ),
    };
    Ok(text)
}

/// Formats seconds with a suitable unit.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.1} seconds"),
        s if s < 6000.0 => format!("{:.0} minutes", s / 60.0),
        s => format!("{:.1} hours", s / 3600.0),
    }
}

fn dry_run(out: &Path, grid: &Grid, plan: &Plan, scaled: Option<String>) -> Result<String> {
    let mut table = Table::new(&[
        "run",
        "router",
        "NcK",
        "parameters",
        "rate",
        "seed",
        "steps",
        "tokens",
        "FLOP",
        "state",
    ]);
    let (mut all_tokens, mut all, mut left) = (0.0, 0.0, 0.0);
    for run in &plan.runs {
        let (model, train) = (&run.config.model, &run.config.train);
        let router = routers::build(&run.config.router)?;
        let (tokens, work, state) = (run.tokens(), run.flops()?, run::state(out, run)?);
        all_tokens += tokens;
        all += work;
        left += match state {
            State::Finished => 0.0,
            State::Unfinished(step) => work * (1.0 - step as f64 / train.steps as f64),
            _ => work,
        };
        table.rows.push(vec![
            run.name.clone().into(),
            run.config.router.name.clone().into(),
            format!("{}c{}", model.num_experts, model.top_k).into(),
            short_number(routers::total_parameters(&*router, model) as f64).into(),
            train.learning_rate.to_string().into(),
            train.seed.into(),
            train.steps.into(),
            short_number(tokens).into(),
            format!("{work:.2e}").into(),
            match state {
                State::New => "new".into(),
                State::Unfinished(step) => format!("at step {step}").into(),
                State::Finished => "finished".into(),
                State::Diverged(_) => "diverged".into(),
                State::Failed(_) => "failed".into(),
            },
        ]);
    }
    let mut text = String::new();
    for line in [&grid.title, &grid.description, &scaled.unwrap_or_default()] {
        if !line.is_empty() {
            let _ = writeln!(text, "{line}\n");
        }
    }
    text.push_str(&table.markdown());
    let _ = write!(
        text,
        "\n{}, {} tokens, {all:.2e} floating-point operations, {left:.2e} of them still to do: about \
         {} of one CPU core at {:.0} GFLOP/s, or {} of one H200 at half of its peak",
        match plan.runs.len() {
            1 => "1 run".into(),
            n => format!("{n} runs"),
        },
        short_number(all_tokens),
        duration(left / CORE),
        CORE / 1e9,
        duration(left / GPU),
    );
    Ok(text)
}
