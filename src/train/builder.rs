//! Construction of a trainer from a configuration or from the checkpoint of a run.

use super::checkpoint::{self, Checkpoint, TrainerState};
use super::console::Console;
use super::hooks::{Checkpoints, KernelTimeline, MetricsLog, Plots, Progress, TensorBoard};
use super::step::StepExecutor;
use super::trainer::{Hook, Trainer};
use super::{CHECKPOINTS, RunOptions, learning_rate, memory, ranks, refuse_existing, write_config};
use crate::config::Config;
use crate::data::tokenizer::BYTES;
use crate::data::{Corpus, Counts};
use crate::dist::{self, Collective, SingleRank, agree, doing, nccl};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::report::files::replace;
use crate::report::lock::FolderLock;
use crate::report::{number, size};
use crate::routers;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Options for a [`Trainer`].
pub struct Builder {
    config: Config,
    dist: Arc<dyn Collective>,
    hooks: Vec<Box<dyn Hook>>,
    run: Option<RunOptions>,
}

impl Trainer {
    /// Creates a trainer without a folder and without hooks, on one rank.
    ///
    /// # Errors
    /// Returns an error when the data cannot be read, or the model does not fit the device.
    pub fn new(config: Config) -> Result<Self> {
        Self::builder(config).build()
    }

    /// Returns options for a trainer with this configuration.
    pub fn builder(config: Config) -> Builder {
        Builder::new(config)
    }
}

impl Builder {
    pub(super) fn new(config: Config) -> Self {
        Builder {
            config,
            dist: Arc::new(SingleRank),
            hooks: Vec::new(),
            run: None,
        }
    }

    /// Adds a hook; hooks are called in the order in which they were added.
    pub fn hook(mut self, hook: impl Hook + 'static) -> Self {
        self.hooks.push(Box::new(hook));
        self
    }

    /// Trains as one of several ranks. Only rank 0 writes to the run's folder and shows progress; all ranks must be
    /// able to read the folder.
    pub fn ranks(mut self, dist: Arc<dyn Collective>) -> Self {
        self.dist = dist;
        self
    }

    /// Keeps the run in a folder: configuration, log, TensorBoard events, figures and checkpoints, written by hooks
    /// that run after those added by [`hook`](Self::hook).
    pub fn run_folder(mut self, options: RunOptions) -> Self {
        self.run = Some(options);
        self
    }

    /// Builds the trainer: everything up to the first step.
    ///
    /// # Errors
    /// Returns an error when the data, the folder or its checkpoint cannot be used, the model does not fit, the ranks
    /// do not belong to one run, or a hook cannot start.
    pub fn build(mut self) -> Result<Trainer> {
        let (dist, run) = (self.dist.clone(), self.run.take());
        ranks::check(&*dist, &self.config)?;
        doing("the connection of devices");
        let dist = nccl::on_device(dist, self.config.train.device)?;
        // A wrong value is reported before anything about the folder.
        let config = &self.config;
        config.validate()?;
        check_values(config, dist.size(), run.is_some())?;
        doing("the reading of data");
        let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
        let mut lock = None;
        if let Some(run) = &run {
            let own = match (dist.rank(), run.resume) {
                (0, true) => FolderLock::take(&run.out).map(Some),
                (0, false) => refuse_existing(&run.out).map(|()| None),
                _ => Ok(None),
            };
            lock = agree(&*dist, own)?;
        }
        let (saved, damaged) = match &run {
            Some(run) if run.resume => {
                ranks::check_folder(&*dist, &run.out)?;
                ranks::newest(&*dist, &run.out.join(CHECKPOINTS))?
            }
            _ => (None, Vec::new()),
        };
        let data = corpus.fingerprint();
        ranks::check_data(&*dist, &data)?;
        doing("the making of the model");
        let mut notes = Vec::new();
        let parts = match &saved {
            None => anew(self.config, data, dist.clone())?,
            Some(saved) => resume(saved, self.config, data, dist.clone(), &mut notes)?,
        };
        let mut hooks = self.hooks;
        if let Some(run) = &run {
            if run.timeline {
                // The timeline ends before other hooks use the model's device.
                hooks.insert(0, Box::new(KernelTimeline::new(&run.out)));
            }
            hooks.extend(run_hooks(run));
        }
        let mut trainer = Trainer::assemble(parts, dist.clone(), corpus, hooks)?;
        if let Some(run) = &run {
            let (first, total) = (trainer.steps_done(), trainer.config().train.steps);
            trainer.console = Console::with_bar(first, total, run.quiet);
        }
        if dist.rank() != 0 {
            trainer.console = Console::silent();
        }
        if let Some(run) = run.as_ref().filter(|run| !run.resume) {
            let own = match dist.rank() {
                0 => lock_new(&run.out),
                _ => Ok(None),
            };
            lock = agree(&*dist, own)?;
        }
        trainer.lock = lock;
        let started = trainer.each_hook(|hook, trainer| hook.start(trainer));
        agree(&*dist, started)?;
        if let Some(run) = &run {
            if !run.resume {
                ranks::check_folder(&*dist, &run.out)?;
            }
            for damaged in &damaged {
                trainer.note(&format!("warning: skipped a damaged checkpoint: {damaged}"));
            }
            for note in &notes {
                trainer.note(note);
            }
            introduce(&trainer, run, dist.size());
        }
        Ok(trainer)
    }
}

/// Rejects router settings that do not fit the model or the device, and, for a run with a folder, a run that does not
/// fit in memory.
fn check_values(config: &Config, ranks: usize, in_folder: bool) -> Result<()> {
    let router = routers::build(&config.router)?;
    router.validate(&config.model)?;
    router.validate_device(&config.model, config.train.device)?;
    match in_folder {
        true => memory::check(config, ranks),
        false => Ok(()),
    }
}

/// Locks the folder of a new run. Nothing is written before this, so a run that cannot begin leaves no folder.
fn lock_new(out: &Path) -> Result<Option<FolderLock>> {
    let lock = FolderLock::take(out)?;
    // Another process may have created a run since the folder was checked.
    refuse_existing(out).map(|()| Some(lock))
}

/// Returns the hooks of a run with a folder, in call order.
fn run_hooks(run: &RunOptions) -> Vec<Box<dyn Hook>> {
    let out = &run.out;
    let mut hooks: Vec<Box<dyn Hook>> = vec![
        Box::new(Folder(out.clone())),
        Box::new(MetricsLog::new(out)),
        Box::new(TensorBoard::new(out)),
        Box::new(Progress::default()),
        Box::new(Plots::new(out)),
    ];
    if run.checkpoints {
        hooks.push(Box::new(Checkpoints::new(out)));
    }
    hooks
}

/// A hook that creates the run's folder, or replaces its configuration.
struct Folder(PathBuf);

impl Hook for Folder {
    fn start(&mut self, trainer: &Trainer) -> Result<()> {
        let out = &self.0;
        fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
        write_config(out, trainer.config())?;
        // This lets `generate` find the tokenizer on a machine without the run's tokens.
        for (name, content) in trainer.corpus().tokenizer_files()? {
            replace(out, name, &content)?;
        }
        Ok(())
    }
}

fn introduce(trainer: &Trainer, run: &RunOptions, ranks: usize) {
    let c = trainer.config();
    let m = &c.model;
    let router = trainer.model.router();
    let [documents, held_out] = trainer.corpus().counts();
    let text = |counts: &Counts| match c.data.tokenizer == BYTES {
        true => size(counts.bytes),
        false => format!(
            "{} in {} tokens",
            size(counts.bytes),
            number(counts.tokens as f64)
        ),
    };
    if let Some(described) = dist::describe().filter(|_| ranks > 1) {
        let library = trainer.model.dist().device_library();
        let moved = library.map(|name| format!("; {name} moves device memory"));
        trainer.info(&format!("{described}{}", moved.unwrap_or_default()));
    }
    trainer.info(&format!(
        "{} parameters, {} active; router {}, {} experts, {} active; {} on {} threads",
        number(routers::total_parameters(router, m) as f64),
        number(routers::active_parameters(router, m) as f64),
        c.router.name,
        m.num_experts,
        m.top_k,
        trainer.model.dtype(),
        rayon::current_num_threads(),
    ));
    let (name, train, validation) = (c.data.name(), text(&documents), text(&held_out));
    trainer.info(&match trainer.corpus().is_one_document() {
        true => format!("{name}: one document, {train}; its end is held out, {validation}"),
        false => format!(
            "{name}: {} documents, {train}; {} held out, {validation}",
            documents.documents, held_out.documents
        ),
    });
    let (steps, out) = (c.train.steps, run.out.display());
    trainer.info(&match trainer.steps_done() {
        0 => format!("{steps} steps into {out}"),
        n => format!("from step {n} to {steps} in {out}"),
    });
}

/// Creates a trainer with an untrained model.
fn anew(
    config: Config,
    data: String,
    dist: Arc<dyn Collective>,
) -> Result<(Model, StepExecutor, TrainerState)> {
    let model = Model::with_router(&config, routers::build(&config.router)?, dist)?;
    let executor = StepExecutor::new(&config.train, &model);
    Ok((model, executor, TrainerState::at_start(config, data)))
}

/// Resumes from `saved` with a configuration that may differ in settings that do not define the run.
fn resume(
    saved: &Checkpoint,
    config: Config,
    data: String,
    dist: Arc<dyn Collective>,
    notes: &mut Vec<String>,
) -> Result<(Model, StepExecutor, TrainerState)> {
    let device = config.train.device;
    let (model, mut state) = checkpoint::load_model_on(saved, |c| c.train.device = device, dist)?;
    refuse_another_run(&state, &config, &data)?;
    let (done, steps) = (state.step, config.train.steps);
    if steps < done {
        return Err(Error::usage(
            "train --resume",
            format!("at least {done}, the number of steps that are done"),
            format!("train.steps = {steps}"),
            "set a larger --steps, or evaluate the run as it is",
        ));
    }
    let mut executor = StepExecutor::new(&config.train, &model);
    checkpoint::load_trainer(saved, &state, &model, &mut executor)?;
    notes.extend(resume_note(&state.config, &config, state.step));
    state.config = config;
    Ok((model, executor, state))
}

/// Rejects a configuration or data that do not belong to the checkpoint's run.
fn refuse_another_run(state: &TrainerState, config: &Config, data: &str) -> Result<()> {
    let sections = |config: &Config| -> Result<Vec<(String, String)>> {
        let own = [
            // This comes first, because another router also has other settings.
            ("router.name", format!("{:?}", config.router.name)),
            ("train.seed", config.train.seed.to_string()),
            ("train.dtype", config.train.dtype.dtype().to_string()),
            ("train.bf16_moments", config.train.bf16_moments.to_string()),
            (
                "train.sequences_per_step",
                config.train.sequences_per_step.to_string(),
            ),
            (
                "data.document_boundaries",
                config.data.document_boundaries.to_string(),
            ),
        ];
        let mut all: Vec<_> = own.map(|(key, value)| (key.to_string(), value)).into();
        let table = config.to_table()?;
        for section in ["model", "router"] {
            let keys = table.get(section).and_then(toml::Value::as_table);
            let keys = keys.into_iter().flatten();
            all.extend(keys.map(|(key, value)| (format!("{section}.{key}"), value.to_string())));
        }
        Ok(all)
    };
    let (old, new) = (sections(&state.config)?, sections(config)?);
    let help = "restore the old value, or begin a new run with another --name";
    let of = |all: &[(String, String)], key: &str| {
        let found = all.iter().find(|(k, _)| k == key);
        found.map_or("none".to_string(), |(_, value)| value.clone())
    };
    for (key, _) in old.iter().chain(&new) {
        let (was, is) = (of(&old, key), of(&new, key));
        if was != is {
            let expected = format!("{key} = {was}, the value with which the run began");
            return Err(Error::usage("train --resume", expected, is, help));
        }
    }
    if state.data != data {
        return Err(Error::invalid(
            "train --resume",
            format!(
                "the data with which the run began, with digest {}",
                state.data
            ),
            format!("{}, of digest {data}", config.data.name()),
            help,
        ));
    }
    Ok(())
}

/// Returns a note on how a resumed run differs from the run before, if it does.
fn resume_note(old: &Config, new: &Config, step: u64) -> Option<String> {
    if step == new.train.steps {
        let note = format!("all {step} steps are done; set a larger --steps to continue");
        return Some(note);
    }
    let [was, is] = [old, new].map(|c| learning_rate(&c.train, step.min(c.train.steps - 1)));
    (step > 0 && was != is).then(|| {
        format!(
            "the learning rate of step {} is {is:.2e}, where that of the run until now would be {was:.2e}: other \
             train.steps or another schedule",
            step + 1
        )
    })
}
