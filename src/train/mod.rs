//! A training run: from a configuration to a folder with its log, pictures and checkpoints.
//!
//! Every step is a pure function of the configuration and the step before it, so that a run that was
//! interrupted and resumed ends in the same bytes as one that was not.

mod benchmarks;
pub mod checkpoint;
mod due;
mod memory;
pub mod optimizer;
mod progress;
mod ranks;
mod saving;
mod schedule;
pub mod session;
mod start;
pub mod step;
mod steps;

pub use memory::{available as available_memory, least as least_memory};
pub use schedule::learning_rate;

use crate::config::{Config, count};
use crate::data::tokenizer::BYTES;
use crate::data::{Ahead, Corpus, Counts};
use crate::device::timeline::Timeline;
use crate::dist::{self, Collective, SingleRank, agree, doing, doing_alone};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::Batch;
use crate::report::events::Events;
use crate::report::files::replace;
use crate::report::metrics::{Log, Saved};
use crate::report::plots;
use crate::report::version;
use crate::study::analyze;
use crate::study::eval::validation_loss;
use crate::train::step::{StepReport, Trainer};
use benchmarks::Benchmarks;
use checkpoint::TrainerState;
use due::Due;
use progress::Progress;
use saving::Saving;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use steps::UnderWay;

/// The resolved configuration in a run's folder.
pub const CONFIG_FILE: &str = "config.toml";
/// The log in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// Held-out sequences of an analysis on the way.
const ANALYZED: usize = 8;
/// The folder of checkpoints in a run's folder.
pub const CHECKPOINTS: &str = "checkpoints";

/// What a run needs beside its configuration.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the run.
    pub out: PathBuf,
    /// Go on from the newest whole checkpoint in `out`.
    pub resume: bool,
    /// Whether to write checkpoints.
    pub checkpoints: bool,
    /// Whether to record where the time of the last step goes, on a GPU.
    pub timeline: bool,
    /// Whether to show no progress.
    pub quiet: bool,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was asked to stop, and saved.
    Stopped,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Summary {
    pub outcome: Outcome,
    /// Steps done.
    pub step: u64,
    /// Of the last evaluation in this process.
    pub validation_loss: Option<f64>,
}

/// Trains until the last step, or until `stop` is set: the step at hand is finished and saved.
///
/// # Errors
/// When text, folder or checkpoint cannot be used, the model does not fit in memory, or too many
/// steps in a row are not finite. What was saved before stays.
pub fn run(config: Config, options: &Options, stop: &AtomicBool) -> Result<Summary> {
    run_on(Arc::new(SingleRank), config, options, stop)
}

/// The same as one of several ranks. Rank 0 alone writes to the run's folder, which all see, and shows progress; a rank whose
/// `stop` is set stops all after the same step.
///
/// # Errors
/// As [`run`], when ranks are not of one run, and when one has left.
pub fn run_on(
    dist: Arc<dyn Collective>,
    config: Config,
    options: &Options,
    stop: &AtomicBool,
) -> Result<Summary> {
    Run::begin(dist, config, options)?.finish(stop)
}

/// A run under way.
struct Run<'a> {
    options: &'a Options,
    dist: Arc<dyn Collective>,
    corpus: Arc<Corpus>,
    /// The sequences of each step.
    ahead: Ahead<Batch>,
    model: Model,
    trainer: Trainer,
    /// The next step, where it was launched before the one at hand was reported.
    under_way: Option<UnderWay>,
    /// When a step was last reported.
    reported: Instant,
    /// After the last step that was reported.
    state: TrainerState,
    benchmarks: Option<Benchmarks>,
    progress: Progress,
    /// On rank 0.
    output: Option<Output>,
}

/// What a run writes beside pictures and reports.
struct Output {
    log: Log,
    events: Events,
    saving: Saving,
}

impl<'a> Run<'a> {
    /// Everything up to the first step.
    fn begin(dist: Arc<dyn Collective>, config: Config, options: &'a Options) -> Result<Self> {
        let (out, first) = (&options.out, dist.rank() == 0);
        ranks::check(&*dist, &config)?;
        let free = match first && !options.resume {
            true => refuse_existing(out),
            false => Ok(()),
        };
        agree(&*dist, free)?;
        memory::check(&config)?;
        doing("the reading of data");
        let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
        let found = match options.resume {
            true => {
                ranks::check_folder(&*dist, out)?;
                ranks::newest(&*dist, &out.join(CHECKPOINTS))?
            }
            false => (None, Vec::new()),
        };
        let data = corpus.fingerprint();
        ranks::check_data(&*dist, &data)?;
        doing("the making of the model");
        let steps = config.train.steps;
        let own = Box::new(dist.clone());
        let (model, trainer, state) = match &found.0 {
            None => start::anew(config, data, own)?,
            Some(saved) => start::resume(saved, config, data, own)?,
        };
        let benchmarks = match first {
            true => Benchmarks::read(&state.config.train, &corpus)?,
            false => None,
        };
        let output = match first {
            true => Output::begin(out, &state, &corpus).map(Some),
            false => Ok(None),
        };
        let output = agree(&*dist, output)?;
        if !options.resume {
            ranks::check_folder(&*dist, out)?;
        }
        let progress = match first {
            true => Progress::new(state.step, steps, options.quiet),
            false => Progress::silent(state.step, steps),
        };
        for damaged in &found.1 {
            progress.note(&format!("warning: skipped a damaged checkpoint: {damaged}"));
        }
        let corpus = Arc::new(corpus);
        let run = Run {
            options,
            ahead: read_ahead(&corpus, &state, dist.clone())?,
            dist,
            corpus,
            model,
            trainer,
            under_way: None,
            reported: Instant::now(),
            state,
            benchmarks,
            progress,
            output,
        };
        run.introduce();
        Ok(run)
    }

    fn introduce(&self) {
        let c = &self.state.config;
        let m = &c.model;
        let millions = |n: u64| n as f64 / 1e6;
        let [documents, held_out] = self.corpus.counts();
        let size = |counts: &Counts| match c.data.tokenizer == BYTES {
            true => format!("{:.1} MB", millions(counts.bytes)),
            false => format!(
                "{:.1} MB in {:.1} M tokens",
                millions(counts.bytes),
                millions(counts.tokens)
            ),
        };
        if let Some(ranks) = dist::describe().filter(|_| self.dist.size() > 1) {
            self.progress.introduce(&[ranks]);
        }
        self.progress.introduce(&[
            format!(
                "{:.1} M parameters, {:.1} M active; router {}, {} experts, {} active; {} on {} threads",
                millions(count::total_parameters(m)),
                millions(count::active_parameters(m)),
                c.router.name,
                m.num_experts,
                m.top_k,
                self.model.dtype(),
                rayon::current_num_threads(),
            ),
            format!(
                "{}: {} documents, {}; {} held out, {}",
                c.data.name(),
                documents.documents,
                size(&documents),
                held_out.documents,
                size(&held_out),
            ),
            match self.state.step {
                0 => format!("{} steps into {}", c.train.steps, self.options.out.display()),
                n => format!(
                    "from step {n} to {} in {}",
                    c.train.steps,
                    self.options.out.display()
                ),
            },
        ]);
    }

    fn finish(mut self, stop: &AtomicBool) -> Result<Summary> {
        let train = self.state.config.train.clone();
        let mut validation = None;
        let mut by_source = Vec::new();
        let mut outcome = Outcome::Finished;
        while self.state.step < train.steps {
            doing(format!("step {}", self.state.step + 1));
            let stopping = ranks::any(&*self.dist, stop.load(Ordering::SeqCst))?;
            if stopping && self.under_way.is_none() {
                outcome = Outcome::Stopped;
                break;
            }
            // A save that failed meanwhile ends the run here.
            let saved = self.ended_saves()?;
            let (report, mut record) = self.step(stopping)?;
            let due = Due::after(record.step, &train);
            if due.evaluate {
                doing(format!("the evaluation after step {}", record.step));
                let (most, batch) = (train.eval_sequences, train.micro_batch);
                let found = validation_loss(&self.model, &self.corpus, most, batch)?;
                validation = Some(found.loss).filter(|l| l.is_finite());
                record.validation_loss = validation;
                by_source = found.sources;
            }
            record.saved = saved;
            if let Some(benchmarks) = self.benchmarks.as_ref().filter(|_| due.score) {
                doing_alone(format!("the benchmarks after step {}", record.step));
                record.tasks = benchmarks.score(&self.model, &self.state, &self.progress)?;
            }
            let finite = by_source.drain(..).filter(|(_, r)| r.loss.is_finite());
            record.validation_by_source = finite.map(|(name, r)| (name, r.loss)).collect();
            if let Some(output) = &mut self.output {
                output.log.append(&record)?;
                output.events.record(&record)?;
            }
            self.progress.step(&record, train.steps);
            let finite = self.check_finite(&report);
            finite.map_err(|e| dist::shared(&*self.dist, e))?;
            // Pictures come first: where there is a checkpoint, they are those of its step. One that
            // cannot be written must not cost the checkpoint.
            let shown = self.show(due.evaluate || due.score, due.analyze);
            if due.save {
                self.save(record.step == train.steps)?;
            }
            shown?;
        }
        if outcome == Outcome::Stopped && self.state.step > 0 {
            self.save(true)?;
            self.show(true, false)?;
        }
        if let Some(why) = self.trainer.graph_refused() {
            let note = format!("steps were launched one by one, not as a graph: {why}");
            self.progress.note(&note);
        }
        self.progress.finish();
        Ok(Summary {
            outcome,
            step: self.state.step,
            validation_loss: validation,
        })
    }

    /// Notes a step that was left out; stops after too many in a row.
    fn check_finite(&self, report: &StepReport) -> Result<()> {
        let Some(what) = &report.refused else {
            return Ok(());
        };
        let (row, most) = (
            self.state.skipped_in_a_row,
            self.state.config.train.max_skipped_steps,
        );
        let step = self.state.step;
        self.progress.note(&format!(
            "step {step} was left out: {what} is not finite ({row} in a row)"
        ));
        if row < most.max(1) {
            return Ok(());
        }
        Err(Error::NonFinite {
            what: format!("{what} at step {step}, as in {row} steps in a row,"),
            help: "lower train.learning_rate or check the data; what was saved before stays".into(),
        })
    }

    /// Saves while training goes on, or, after its `last` step, before it ends.
    fn save(&mut self, last: bool) -> Result<()> {
        if !self.options.checkpoints {
            return Ok(());
        }
        let step = self.state.step;
        doing(format!("the checkpoint after step {step}"));
        let snapshot = checkpoint::snapshot_of_ranks(&self.model, &self.trainer, &self.state)?;
        let (Some(output), Some(snapshot)) = (&mut self.output, snapshot) else {
            return Ok(());
        };
        // A copy that does not fit, and the last save, are written before this returns.
        doing_alone(format!("the checkpoint after step {step}"));
        if last {
            let said = output.saving.last(&snapshot)?;
            self.progress.introduce(&[said]);
            return Ok(());
        }
        output.saving.save(&snapshot)
    }

    /// The saves that have ended since the last call.
    fn ended_saves(&mut self) -> Result<Vec<Saved>> {
        let Some(output) = &mut self.output else {
            return Ok(Vec::new());
        };
        let (saved, said) = output.saving.ended()?;
        said.iter().for_each(|said| self.progress.note(said));
        Ok(saved)
    }

    /// Draws and analyses, on rank 0.
    fn show(&self, draw: bool, analyze: bool) -> Result<()> {
        if self.output.is_none() {
            return Ok(());
        }
        if draw {
            self.draw()?;
        }
        if analyze {
            self.analyze()?;
        }
        Ok(())
    }

    /// Writes what the router does now, and says how long that took.
    fn analyze(&self) -> Result<()> {
        let begun = Instant::now();
        let step = self.state.step;
        doing_alone(format!("the analysis after step {step}"));
        let report = analyze::analyze(&self.state.config, &self.model, step, ANALYZED)?;
        let folder = self
            .options
            .out
            .join("analysis")
            .join(format!("step-{step}"));
        analyze::write(&report, &folder)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.progress.note(&format!(
            "step {step}: the router analysed in {seconds:.1} s, {}",
            folder.join("report.html").display()
        ));
        Ok(())
    }

    fn keep_timeline(&self, timeline: &Timeline) -> Result<()> {
        let path = self.options.out.join("timeline.json");
        let bytes = serde_json::to_vec_pretty(timeline);
        let bytes = bytes.map_err(|e| Error::io("write", &path, e.into()))?;
        std::fs::write(&path, bytes).map_err(|e| Error::io("write", &path, e))?;
        self.progress.note(&timeline.to_string());
        Ok(())
    }

    fn draw(&self) -> Result<()> {
        plots::write(&self.options.out.join(METRICS_FILE), &self.options.out)
    }
}

/// What each step from the present one on takes: step t of n sequences those from t · n on; a rank reads its part of each
/// micro-batch.
fn read_ahead(
    corpus: &Arc<Corpus>,
    state: &TrainerState,
    dist: Arc<dyn Collective>,
) -> Result<Ahead<Batch>> {
    let (corpus, train) = (corpus.clone(), &state.config.train);
    let (batch, micro_batch) = (train.sequences_per_step as u64, train.micro_batch as u64);
    let part = |first| dist.part(first..(first + micro_batch).min(batch));
    let parts: Vec<_> = (0..batch)
        .step_by(micro_batch as usize)
        .map(part)
        .collect::<Result<_>>()?;
    let read = move |step: u64| {
        let own = parts.iter().cloned().flatten();
        corpus.sequences(own.map(|sequence| step * batch + sequence))
    };
    Ahead::new(state.step..train.steps, read)
}

impl Output {
    /// Makes the run's folder, or goes on in it.
    fn begin(out: &Path, state: &TrainerState, corpus: &Corpus) -> Result<Self> {
        fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
        write_config(out, &state.config)?;
        // A run that reads tokens can be spoken to where they are not.
        for (name, content) in corpus.tokenizer_files()? {
            replace(out, name, &content)?;
        }
        Ok(Output {
            log: Log::open(&out.join(METRICS_FILE), state.step)?,
            events: Events::begin(out, state.step, &state.config.to_toml()?)?,
            saving: Saving::new(out, state.config.train.keep_checkpoints),
        })
    }
}

/// Refuses a folder that holds a run.
///
/// # Errors
/// When it does.
pub(crate) fn refuse_existing(out: &Path) -> Result<()> {
    let holds = [CONFIG_FILE, METRICS_FILE, CHECKPOINTS]
        .iter()
        .any(|f| out.join(f).exists());
    if !holds {
        return Ok(());
    }
    Err(Error::invalid(
        "train",
        "a new folder for the run",
        format!("{}, which holds a run", out.display()),
        "go on with it by --resume, or choose another --name or --out",
    ))
}

/// Replaces the run's configuration, whole or not at all; its first line says which program ran.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn write_config(out: &Path, config: &Config) -> Result<()> {
    let temporary = out.join("config.toml.unfinished");
    let text = format!("# {}\n{}", version::program(), config.to_toml()?);
    fs::write(&temporary, text).map_err(|e| Error::io("write", &temporary, e))?;
    fs::rename(&temporary, out.join(CONFIG_FILE)).map_err(|e| Error::io("rename", &temporary, e))
}
