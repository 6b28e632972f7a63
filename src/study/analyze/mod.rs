//! Analyzes the router of a checkpoint, with the analyses of Default MoE (arXiv 2504.12463). The results are data and
//! one page with figures.
//!
//! Entropy, frequency and co-activation come from evaluation on held-out text. Similarity to the dense gradient,
//! gradient error, the estimators at one forward pass and route regret come from passes over held-out text with frozen
//! router state. Everything runs on the CPU, in the dtype of the checkpoint, and gives the same bytes for any number of
//! threads and ranks.

mod estimators;
mod figures;
mod gradients;
mod probe;
mod regret;
mod report;
mod routing;
mod sections;
mod shares;
mod substitutes;
#[cfg(test)]
mod tests;
mod trend;
mod vectors;

pub use crate::report::page::{Cell, Section as Analysis, Table};
pub use report::write;
pub use trend::write as write_trend;

use crate::config::Config;
use crate::data::tokenizer::loss_unit;
use crate::data::{Corpus, LeftOut, sources};
use crate::device::Device;
use crate::dist::{Collective, agree, doing_alone};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::Batch;
use crate::report::lock::FolderLock;
use crate::report::progress::Phases;
use crate::routers;
use crate::study::eval;
use crate::study::exchange::Saved;
use crate::tensor::Tensor;
use crate::train::{check_alike, check_data};
use gradients::MicroBatches;
use probe::Watched;
use routing::Routed;
use serde::Serialize;
use shares::shared_out;
use std::path::PathBuf;

/// Number of micro-batches of training text from which a model without default vectors gets them. After them the
/// initial zeros have a weight of 0.9^64 = 0.1%.
const FILL_PASSES: usize = 64;

/// The text of an analysis.
#[derive(Clone, Debug)]
pub struct Options {
    /// Text file or folder, instead of the text that the model was trained on.
    pub data: Option<String>,
    /// Number of held-out sequences. The analysis by source uses as many of each source.
    pub sequences: usize,
    /// Folder of the report. It is created before the work begins, so that a folder that cannot be written costs no time.
    pub out: PathBuf,
}

/// All analyses of one checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the model's router.
    pub router: String,
    /// Steps that the model was trained for.
    pub step: u64,
    /// Number of experts E.
    pub num_experts: usize,
    /// Number of active experts K.
    pub top_k: usize,
    /// Number of held-out sequences.
    pub sequences: usize,
    /// Tokens S per sequence.
    pub sequence_length: usize,
    /// Source of the text.
    pub data: String,
    /// The analyses, in the order of the report.
    pub analyses: Vec<Analysis>,
}

impl Report {
    /// Describes the model and the text in one or two sentences.
    fn introduction(&self) -> String {
        format!(
            "Router {}, {} experts, {} active, after {} steps; on {} held-out sequences of {} tokens \
             of {}. MoE layers and experts are counted from 0.",
            self.router,
            self.num_experts,
            self.top_k,
            self.step,
            self.sequences,
            self.sequence_length,
            self.data,
        )
    }

    /// Returns the analysis with this name.
    pub fn get(&self, name: &str) -> Option<&Analysis> {
        self.analyses.iter().find(|a| a.name == name)
    }
}

/// Returns the default folder of a report: `analysis` in the folder of the run. For a model without a run it is the
/// folder NAME-analysis next to the model.
pub fn default_folder(found: &Saved) -> PathBuf {
    let path = found.path();
    match path.parent() {
        Some(parent) if parent.ends_with("checkpoints") => parent.with_file_name("analysis"),
        _ => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            path.with_file_name(format!("{name}-analysis"))
        }
    }
}

/// Analyzes a saved model. The ranks of `dist` divide the work, and every rank gets the report that a single rank gets.
/// Rank 0 shows the progress.
///
/// # Errors
/// Returns an error when the model or the text cannot be used or differs between ranks, the number of sequences is 0,
/// the folder of the report cannot be written, or a rank has left.
pub fn run(found: &Saved, options: &Options, dist: &dyn Collective) -> Result<Report> {
    some(options.sequences)?;
    let phases = (dist.rank() == 0).then(|| Phases::new(1 + PHASES.len()));
    // The parts take long, and not equally long: ranks wait without a time limit.
    let show = |n: usize, name: &str| {
        doing_alone(format!("the analysis, {name}"));
        phases.iter().for_each(|phases| phases.begin(n, name));
    };
    show(1, "reading model and text");
    let (model, state) = found.load(|c| c.train.device = Device::Cpu)?;
    let mut config = state.config;
    let corpus = eval::text(&mut config, &state.data, options.data.as_deref())?;
    check_alike(dist, &config)?;
    check_data(dist, &corpus.fingerprint())?;
    let lock = match dist.rank() {
        0 => FolderLock::take(&options.out).map(Some),
        _ => Ok(None),
    };
    let _lock = agree(dist, lock)?;
    let begin = |n: usize| show(2 + n, PHASES[n]);
    let (step, sequences) = (found.step(), options.sequences);
    in_phases(dist, (&config, &model, &corpus), step, sequences, &begin)
}

/// Analyzes a model with this configuration that was trained on `corpus` for `step` steps. Runs on the CPU and does not
/// change the model. The ranks of the model divide the work, and all of them return the same report.
///
/// # Errors
/// Returns an error when the text cannot be used, `sequences` is 0, or a rank has left.
pub fn analyze(
    config: &Config,
    model: &Model,
    corpus: &Corpus,
    step: u64,
    sequences: usize,
) -> Result<Report> {
    some(sequences)?;
    let parts = (config, model, corpus);
    in_phases(model.dist(), parts, step, sequences, &|_| ())
}

/// Refuses to analyze no sequences.
fn some(sequences: usize) -> Result<()> {
    match sequences {
        0 => Err(Error::usage(
            "analyze --sequences",
            "1 sequence or more",
            "0",
            "leave it out for the default",
        )),
        _ => Ok(()),
    }
}

/// The long parts of an analysis, in their order.
const PHASES: [&str; 6] = [
    "routing",
    "default vectors",
    "similarity to the dense gradient",
    "gradient error",
    "estimators",
    "route regret",
];

/// Does the same on the ranks of `dist`. Calls `begin` with the index of each of [`PHASES`] when it begins.
fn in_phases(
    dist: &dyn Collective,
    (config, model, corpus): (&Config, &Model, &Corpus),
    step: u64,
    sequences: usize,
    begin: &dyn Fn(usize),
) -> Result<Report> {
    let micro_batch = config.train.micro_batch;
    let batches = |all: Batch| MicroBatches { all, micro_batch };
    let batch = batches(corpus.evaluation(sequences));

    begin(0);
    let own = Watched::new(config, routers::build(&config.router)?, model)?;
    let (routed, by_source, left_out) = routed_texts(dist, config, &own, &batch, sequences)?;

    begin(1);
    let trained = gradients::vectors_of(model)?;
    let filled = trained.is_empty();
    let vectors: Vec<Tensor> = match filled {
        true => gradients::fill_vectors(config, model, corpus, FILL_PASSES)?,
        false => trained.clone(),
    };
    // The micro-batch that training would use next.
    let first = step * config.train.sequences_per_step as u64;
    let next = corpus.sequences(first..first + micro_batch as u64);
    let drifts = match filled {
        true => Vec::new(),
        false => vectors::drifts(config, model, next.all())?,
    };
    begin(2);
    let similarity = gradients::dense_similarity(dist, config, model, &vectors, &batch)?;
    begin(3);
    let error = gradients::gradient_error(dist, config, model, &vectors, &batch)?;
    begin(4);
    let compared = estimators::compare(dist, config, model, &vectors, &batch, next.all())?;
    begin(5);
    let sample = batches(corpus.evaluation(sequences.min(regret::SAMPLED)));
    let rerouted = regret::reroute(dist, config, model, &vectors, &sample)?;

    let notes = sections::gradient_notes(config, filled);
    Ok(Report {
        router: config.router.name.clone(),
        step,
        num_experts: config.model.num_experts,
        top_k: config.model.top_k,
        sequences: batch.all.sequences,
        sequence_length: config.model.sequence_length,
        data: config.data.name(),
        analyses: vec![
            sections::entropy(&routed)?,
            sections::vector_similarity(config, &trained)?,
            sections::dense_similarity(&similarity, notes.clone())?,
            sections::frequency(config, &routed)?,
            sections::co_activation(config, &routed)?,
            sections::by_source(&by_source, &left_out)?,
            sections::gradient_error(&error, notes.clone())?,
            sections::drift(config, &drifts)?,
            sections::estimators(&compared, notes.clone())?,
            sections::scale(&compared, notes.clone())?,
            sections::regret(&rerouted, loss_unit(&config.data.tokenizer), notes)?,
        ],
    })
}

/// How the MoE layers route a text; how they route each source of the text, by name; and the sources that are left out.
type RoutedTexts = (Vec<Routed>, Vec<(String, Vec<Routed>)>, LeftOut);

/// Routes the held-out text `batch`, and `sequences` sequences of each source.
fn routed_texts(
    dist: &dyn Collective,
    config: &Config,
    own: &Watched,
    batch: &MicroBatches,
    sequences: usize,
) -> Result<RoutedTexts> {
    let (parts, left_out) = sources(&config.data, &config.model)?;
    let all = shared_out(dist, 1 + parts.len(), |i| {
        let routed = match i {
            0 => routing::routed(own, batch)?,
            i => {
                let all = parts[i - 1].windows(sequences);
                let micro_batch = batch.micro_batch;
                routing::routed(own, &MicroBatches { all, micro_batch })?
            }
        };
        Ok(routed.iter().flat_map(Routed::numbers).collect())
    })?;
    let experts = config.model.num_experts;
    let mut all = all
        .iter()
        .map(|numbers| Routed::of_layers(numbers, experts));
    let routed = all.next().unwrap_or_default();
    let names = parts.iter().map(|source| source.name.clone());
    Ok((routed, names.zip(all).collect(), left_out))
}
