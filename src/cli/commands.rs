//! The commands. Each function reads the arguments of a command, calls the module that does the work, and prints the
//! result.

use super::arguments::*;
use super::process::{start_ranks, start_same_ranks, watch_signals};
use super::ranks::RanksArgs;
use super::saved::{open_saved, open_saved_on};
use crate::config::{Config, Layers};
use crate::data::Corpus;
use crate::data::tokenizer::loss_unit;
use crate::device::machine::Chip;
use crate::dist::{Collective, doing_alone};
use crate::error::{Error, Result};
use crate::routers;
use crate::study::exchange::Saved;
use crate::study::{ablate, analyze, eval, exchange, export, plan, tasks};
use crate::tensor::dtype::DType;
use crate::train::checkpoint::SHARD_BYTES;
use crate::verify::bench::roofline as floors;
use crate::verify::device_check::Directional;
use crate::verify::fault::Fault;
use crate::verify::hardware::throughput::recorded;
use crate::verify::{device_check, gradcheck};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use toml::Value;

pub(super) fn eval_command(args: &EvalArgs, threads: Option<usize>) -> Result<()> {
    let dist = start_same_ranks(&args.ranks, threads)?;
    let found = open_saved_on(&*dist, &args.model)?;
    if dist.rank() == 0 {
        say!("model            {}", found.path().display());
    }
    if let Some(folder) = &args.task_data {
        return eval_tasks(args, &dist, &found, folder);
    }
    let measure = |default_vectors: Option<bool>| {
        let (model, state) = eval::load_on(&found, default_vectors, args.dtype, &dist)?;
        let report = eval::run(&model, &state, args.data.as_deref(), args.sequences)?;
        Ok((report, loss_unit(&state.config.data.tokenizer)))
    };
    if args.compare_default_vectors {
        let [(with, unit), (without, _)] = [measure(Some(true))?, measure(Some(false))?];
        if dist.rank() != 0 {
            return Ok(());
        }
        say!("tokens           {}", with.tokens);
        say!("                 with default vectors  without  difference; loss in {unit}");
        for (name, of) in [
            ("validation loss", (|r| r.loss) as fn(&eval::Report) -> f64),
            ("perplexity", eval::Report::perplexity),
            ("bits per byte", eval::Report::bits_per_byte),
        ] {
            let (a, b) = (of(&with), of(&without));
            say!("{name:<15}  {a:>20.4}  {b:>7.4}  {:>10.4}", a - b);
        }
        return Ok(());
    }
    let (report, unit) = measure(args.without_default_vectors.then_some(false))?;
    if dist.rank() != 0 {
        return Ok(());
    }
    say!("tokens           {}", report.tokens);
    say!("validation loss  {:.4} {unit}", report.loss);
    say!("perplexity       {:.4}", report.perplexity());
    say!("bits per byte    {:.4}", report.bits_per_byte());
    for (name, source) in &report.sources {
        let (loss, bits) = (source.loss, source.bits_per_byte());
        let tokens = source.tokens;
        say!("  {name}: {loss:.4} {unit}, {bits:.4} bits per byte, {tokens} tokens");
    }
    Ok(())
}

/// Computes benchmark scores and prints them.
fn eval_tasks(
    args: &EvalArgs,
    dist: &Arc<dyn Collective>,
    found: &Saved,
    folder: &Path,
) -> Result<()> {
    let benchmarks = tasks::read(&tasks::choose(&args.tasks, folder)?, folder, args.limit)?;
    let writes = dist.rank() == 0;
    let score = |default_vectors: Option<bool>, out: Option<&Path>| {
        let (model, state) = eval::load_on(found, default_vectors, args.dtype, dist)?;
        let config = state.config;
        tasks::check_alike(&**dist, &config, &benchmarks)?;
        let tokenizer = found.tokenizer(&config.data)?;
        let options = tasks::Options {
            tokens: config.evaluation_batch() * config.model.sequence_length,
            quiet: !writes,
        };
        doing_alone("the benchmarks");
        tasks::run(&model, &tokenizer, &benchmarks, &options, out)
    };
    let out = args.out.as_deref().filter(|_| writes);
    if args.compare_default_vectors {
        let other = out.map(|out| out.join("without-default-vectors"));
        let with = score(Some(true), out)?;
        let without = score(Some(false), other.as_deref())?;
        if writes {
            say!("{}", with.compared("with vectors", &without, "without"));
        }
        return Ok(());
    }
    let scores = score(args.without_default_vectors.then_some(false), out)?;
    if writes {
        say!("{}", scores.table());
    }
    Ok(())
}

pub(super) fn dump_command(args: &DumpArgs) -> Result<()> {
    let options = exchange::Options {
        model: args.model.clone(),
        tokens: args.tokens.clone(),
        dtype: args.dtype,
        train: args.train,
    };
    for line in exchange::dump(&options, &args.out)? {
        say!("{line}");
    }
    Ok(())
}

pub(super) fn import_command(args: &ImportArgs) -> Result<()> {
    let length = "model.sequence_length";
    let key = |set: &String| set.split('=').next().unwrap_or_default().trim().to_string();
    let fixed = |set: &&String| {
        let key = key(set);
        (key.starts_with("model.") && key != length)
            || (key.starts_with("router.") && (args.router.is_none() || key == "router.name"))
    };
    if let Some(set) = args.set.iter().find(fixed) {
        return Err(Error::usage(
            "--set",
            "keys of train, data and balance, model.sequence_length, or settings of the router that --router names",
            set,
            "the model's shape is that of --from, and its router too unless --router names another",
        ));
    }
    let mut layers = Layers::preset("tiny");
    layers.set = args.set.clone();
    let data = args
        .data
        .clone()
        .map(|d| ("--data", "data.source", d.into()));
    let router = args
        .router
        .clone()
        .map(|r| ("--router", "router.name", r.into()));
    layers.flags = data.into_iter().chain(router).collect();
    let import = exchange::Import {
        from: args.from.clone(),
        own_router: args.router.is_some(),
        own_length: args.set.iter().any(|set| key(set) == length),
        layers,
        out: args.out.clone(),
    };
    for line in exchange::import(&import)? {
        say!("{line}");
    }
    Ok(())
}

pub(super) fn ablate_command(
    args: &ablate::Args,
    ranks: &RanksArgs,
    threads: Option<usize>,
) -> Result<()> {
    let dist = start_ranks(ranks, threads)?;
    let stop = Arc::new(AtomicBool::new(false));
    watch_signals(&stop)?;
    let text = ablate::command(args, &dist, &stop)?;
    if dist.rank() == 0 {
        say!("{text}");
    }
    Ok(())
}

pub(super) fn plan_command(args: &PlanArgs) -> Result<()> {
    let config = args.settings.configure()?;
    let threads = rayon::current_num_threads();
    let cluster = plan::Cluster {
        ranks: args.ranks,
        nodes: args.nodes,
    };
    let mut found = plan::plan_on(&config, args.device, threads, cluster)?;
    let mut sources = config.data.sources().map(Path::new);
    // A configuration may name a text that only another machine has.
    if args.settings.data.is_some() || sources.all(Path::exists) {
        let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
        found.text_tokens = Some(corpus.counts()[0].tokens);
    }
    if let plan::Target::Gpu(chip) = args.device {
        let (router, flops) = (&config.router.name, found.flops_per_token);
        if let Some((rate, from)) = recorded(
            &args.records,
            chip.name,
            router,
            flops,
            config.train.micro_batch,
        )? {
            found = found.at_rate(rate, from);
        }
    }
    if args.json {
        say!("{:#}", serde_json::json!(found));
    } else {
        say!("{}", found.table());
    }
    Ok(())
}

pub(super) fn analyze_command(args: &AnalyzeArgs, threads: Option<usize>) -> Result<()> {
    let dist = start_same_ranks(&args.ranks, threads)?;
    let found = open_saved_on(&*dist, &args.model)?;
    let default = || analyze::default_folder(&found);
    let out = args.out.clone().unwrap_or_else(default);
    let options = analyze::Options {
        data: args.data.clone(),
        sequences: args.sequences,
        out: out.clone(),
    };
    let report = analyze::run(&found, &options, &*dist)?;
    if dist.rank() != 0 {
        return Ok(());
    }
    analyze::write(&report, &out)?;
    for analysis in &report.analyses {
        let rows = analysis.table.rows.len();
        say!("{:<28} {rows:>5} numbers", analysis.name);
        for note in &analysis.notes {
            say!("    {note}");
        }
    }
    say!("report: {}", out.join("report.html").display());
    Ok(())
}

pub(super) fn export_command(args: &ExportArgs) -> Result<()> {
    let ExportFormat::Hf = args.to;
    let dtype = match args.dtype {
        ExportedDtype::F32 => DType::F32,
        ExportedDtype::Bf16 => DType::Bf16,
    };
    let report = export::run(&open_saved(&args.model)?, &args.out, dtype, SHARD_BYTES)?;
    say!("folder        {}", args.out.display());
    say!("architecture  {}", report.architecture);
    if !report.foreign.is_empty() {
        let foreign = report.foreign.join(", ");
        say!("              requires trust_remote_code=True, for {foreign}");
    }
    say!("tensors       {} in {dtype}", report.tensors);
    say!(
        "tokenizer     {}",
        match report.tokenizer {
            export::Exported::File => "the run's own",
            export::Exported::Bytes => "token n is byte n",
            export::Exported::None => "none: the vocabulary is not the 256 bytes",
        }
    );
    Ok(())
}

pub(super) fn gradcheck_command(filter: &str, plant: Option<Fault>) -> Result<()> {
    say!("compared  relative error  what");
    let mut written = Ok(());
    let rows = gradcheck::run(filter, plant, |row| {
        let (compared, error) = (row.compared, format!("{:.1e}", row.error));
        let verdict = if row.passes() { "" } else { "  FAILS" };
        let what = format!("{}: {}{verdict}", row.subject, row.case);
        if written.is_ok() {
            written =
                crate::report::stdout_line(format_args!("{compared:>8}  {error:>14}  {what}"));
        }
    })?;
    written?;
    let failed = rows.iter().filter(|row| !row.passes()).count();
    if rows.is_empty() {
        return Err(no_subject(filter));
    }
    if failed > 0 {
        return Err(Error::invalid(
            "gradcheck",
            format!("relative errors of at most {:.0e}", gradcheck::TOLERANCE),
            format!("larger errors in {failed} of {} checks", rows.len()),
            "see the lines with FAILS in the table",
        ));
    }
    let compared: usize = rows.iter().map(|row| row.compared).sum();
    say!("{} checks of {compared} derivatives pass", rows.len());
    Ok(())
}

fn no_subject(filter: &str) -> Error {
    Error::usage(
        "gradcheck",
        "a part of the name of a subject",
        format!("`{filter}`, which no name contains"),
        "leave the filter out to check all subjects and to see their names",
    )
}

/// Checks whole models on the simulator and, unless a fault is planted, the MoE layer of every router.
pub(super) fn gradcheck_on_simulator(filter: &str, plant: Option<Fault>) -> Result<()> {
    say!("relative error  what");
    let (mut checks, mut failed) = (0, 0);
    let mut show = |subject: &str, found: Vec<Directional>, tolerance: f64| -> Result<()> {
        for check in found {
            let (error, input) = (check.relative_error(), &check.input);
            let passes = error <= tolerance;
            let verdict = if passes { "" } else { "  FAILS" };
            say!("{error:>14.1e}  {subject}: along {input}{verdict}");
            checks += 1;
            failed += usize::from(!passes);
        }
        Ok(())
    };
    for router in routers::all() {
        let subject = format!("router {}", router.name);
        if plant.is_none() && subject.contains(filter) {
            let found = device_check::router_directions(router.name)?;
            show(&subject, found, device_check::DIRECTIONAL_TOLERANCE)?;
        }
    }
    for model in device_check::model_checks() {
        let subject = model.name();
        if subject.contains(filter) {
            show(&subject, model.run(plant)?, device_check::MODEL_TOLERANCE)?;
        }
    }
    if checks == 0 {
        return Err(no_subject(filter));
    }
    if failed > 0 {
        return Err(Error::invalid(
            "gradcheck --device sim",
            format!(
                "relative errors of at most {} for a layer, {} for a model",
                device_check::DIRECTIONAL_TOLERANCE,
                device_check::MODEL_TOLERANCE
            ),
            format!("larger errors in {failed} of {checks} checks"),
            "see the lines with FAILS in the table",
        ));
    }
    say!("{checks} directional derivatives pass");
    Ok(())
}

pub(super) fn list_ops(preset: &str, router: &str, set: Vec<String>) -> Result<()> {
    let mut layers = Layers::preset(preset);
    layers.set = set;
    let name = Value::String(router.into());
    layers.flags = vec![("--router", "router.name", name)];
    let ran = device_check::operations(&Config::load(&layers, &routers::resolve)?)?;
    say!("calls  operation");
    for (op, calls) in ran {
        say!("{calls:>5}  {op}");
    }
    Ok(())
}

pub(super) fn print_floors(presets: &[String], tokens: usize, chip: &'static Chip) -> Result<()> {
    let presets: Vec<&str> = presets.iter().map(String::as_str).collect();
    let page = match presets.as_slice() {
        [] => floors::page(&floors::PRESETS, tokens, chip)?,
        named => floors::page(named, tokens, chip)?,
    };
    say!("{}", page.trim_end());
    Ok(())
}

pub(super) fn list_routers() -> Result<()> {
    for info in routers::all() {
        let mut config = crate::config::RouterConfig {
            name: info.name.into(),
            ..Default::default()
        };
        routers::resolve(&mut config)?;
        say!("{}", info.name);
        say!("    {}", info.summary);
        say!("    source: {}", info.source);
        say!("    cost: {}", info.cost);
        let settings = info.settings.iter().map(|(key, help)| {
            let value = config.settings.get(*key).map(Value::to_string);
            (
                format!("router.{key} = {}", value.unwrap_or_default()),
                help,
            )
        });
        let settings: Vec<_> = settings.collect();
        let width = settings.iter().map(|(s, _)| s.len()).max().unwrap_or(0);
        for (setting, help) in settings {
            say!("    {setting:width$}  {help}");
        }
    }
    Ok(())
}
