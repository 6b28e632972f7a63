//! Hooks that evaluate and analyse the model during training, and functions that train with all of them.

use super::analyze;
use super::eval::validation_loss;
use super::tasks::{self, Benchmark};
use crate::config::Config;
use crate::data::Tokenizer;
use crate::dist::{Collective, doing_alone};
use crate::error::{Error, Result};
use crate::report::metrics::Record;
use crate::train::{Builder, Hook, RunOptions, StepReport, Summary, Trainer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Number of validation sequences in an analysis during training.
const ANALYZED: usize = 8;

/// Trains in a folder as one of several ranks, with the evaluations, benchmark scores and analyses that the configuration
/// requests, until the last step or until `stop` is set on one rank. The current step is then finished and saved.
///
/// # Errors
/// When the data, the folder or a checkpoint cannot be used, the model does not fit in memory, too many consecutive
/// steps are not finite, the ranks do not belong to one run, or a rank has left. Earlier checkpoints are kept.
pub fn train_on(
    dist: Arc<dyn Collective>,
    config: Config,
    options: &RunOptions,
    stop: &AtomicBool,
) -> Result<Summary> {
    let builder = with_hooks(Trainer::builder(config), &options.out);
    let mut trainer = builder.ranks(dist).run_folder(options.clone()).build()?;
    trainer.run(stop)
}

/// Adds the hooks of this module; analyses are written to the run's folder `out`.
pub fn with_hooks(builder: Builder, out: &Path) -> Builder {
    builder
        .hook(Evaluation)
        .hook(Benchmarks::default())
        .hook(Analysis { out: out.into() })
}

/// Measures the validation loss at `train.eval_interval`, and after the last step.
pub struct Evaluation;

impl Hook for Evaluation {
    fn on_every_rank(&self) -> bool {
        true
    }

    fn needs_model(&self, config: &Config, step: u64) -> bool {
        config.train.evaluates_after(step)
    }

    fn measure(&mut self, trainer: &Trainer, record: &mut Record) -> Result<()> {
        let train = &trainer.config().train;
        if !train.evaluates_after(record.step) {
            return Ok(());
        }
        // A rank that has more batches than another must not count as lost.
        doing_alone(format!("the evaluation after step {}", record.step));
        let (most, batch) = (train.eval_sequences, trainer.config().evaluation_batch());
        let found = validation_loss(&trainer.model, trainer.corpus(), most, batch)?;
        record.validation_loss = Some(found.loss).filter(|l| l.is_finite());
        let sources = found.sources.into_iter();
        let finite = sources.filter(|(_, r)| r.loss.is_finite());
        record.validation_by_source = finite.map(|(name, r)| (name, r.loss)).collect();
        Ok(())
    }
}

/// Scores benchmark tasks at `train.tasks_interval`, and after the last step.
#[derive(Default)]
pub struct Benchmarks {
    /// Read before the first step, so that a file that cannot be read is reported at the start.
    read: Option<(Tokenizer, Vec<Benchmark>)>,
}

impl Hook for Benchmarks {
    fn on_every_rank(&self) -> bool {
        true
    }

    fn needs_model(&self, config: &Config, step: u64) -> bool {
        config.train.scores_after(step)
    }

    fn start(&mut self, trainer: &Trainer) -> Result<()> {
        let train = &trainer.config().train;
        if train.tasks_interval == 0 {
            return Ok(());
        }
        let folder = Path::new(&train.task_data);
        let tasks = tasks::choose(&train.tasks, folder)?;
        let tokenizer = trainer.corpus().load_tokenizer()?;
        let benchmarks = tasks::read(&tasks, folder, train.tasks_limit)?;
        self.read = Some((tokenizer, benchmarks));
        Ok(())
    }

    fn measure(&mut self, trainer: &Trainer, record: &mut Record) -> Result<()> {
        let (config, step) = (trainer.config(), record.step);
        let Some((tokenizer, benchmarks)) = &self.read else {
            return Ok(());
        };
        if !config.train.scores_after(step) {
            return Ok(());
        }
        doing_alone(format!("the benchmarks after step {step}"));
        let options = tasks::Options {
            tokens: config.evaluation_batch() * config.model.sequence_length,
            quiet: true,
        };
        let results = match tasks::run(&trainer.model, tokenizer, benchmarks, &options, None) {
            Err(e @ Error::NonFinite { .. }) => {
                trainer.note(&format!("step {step}: no benchmark scores: {e}"));
                return Ok(());
            }
            results => results?,
        };
        trainer.note(&format!("step {step}: {}", results.summary()));
        let scores = results.scores.iter();
        record.tasks = scores.map(|s| (s.task.to_owned(), s.numbers())).collect();
        Ok(())
    }
}

/// Analyses the router at `train.analyze_interval`, and after the last step.
pub struct Analysis {
    /// Folder of the run; reports are written to `analysis/step-N` in it.
    pub out: PathBuf,
}

impl Hook for Analysis {
    fn on_every_rank(&self) -> bool {
        true
    }

    fn needs_model(&self, config: &Config, step: u64) -> bool {
        config.train.analyzes_after(step)
    }

    fn after_step(&mut self, trainer: &Trainer, _: &StepReport, record: &Record) -> Result<()> {
        let (begun, config, step) = (Instant::now(), trainer.config(), record.step);
        if !config.train.analyzes_after(step) {
            return Ok(());
        }
        doing_alone(format!("the analysis after step {step}"));
        let (model, corpus) = (&trainer.model, trainer.corpus());
        let report = analyze::analyze(config, model, corpus, step, ANALYZED)?;
        if model.dist().rank() != 0 {
            return Ok(());
        }
        let folder = self.out.join("analysis").join(format!("step-{step}"));
        analyze::write(&report, &folder)?;
        analyze::write_trend(&self.out.join("analysis"))?;
        let seconds = begun.elapsed().as_secs_f64();
        trainer.note(&format!(
            "step {step}: the router analysed in {seconds:.1} s, {}",
            folder.join("report.html").display()
        ));
        Ok(())
    }
}
