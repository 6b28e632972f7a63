//! Evaluates a model on text that was not used for training.

use crate::config::{Config, Precision};
use crate::data::{Corpus, Window};
use crate::device::Device;
use crate::dist::{Collective, doing_alone, shared};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::report::progress::Progress;
use crate::routers;
use crate::routers::default::VECTORS;
use crate::study::exchange::Saved;
use crate::train::checkpoint::TrainerState;
use crate::train::{check_alike, check_data};
use std::sync::Arc;

/// The result of an evaluation.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Number of predicted tokens.
    pub tokens: usize,
    /// Number of bytes of their text.
    pub bytes: f64,
    /// Mean cross-entropy per token, in nats.
    pub loss: f64,
    /// The report of each source of the text, if there are several.
    pub sources: Vec<(String, Report)>,
}

impl Report {
    /// Returns e^loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }

    /// Returns the loss in bits per byte of the text.
    pub fn bits_per_byte(&self) -> f64 {
        self.loss * self.tokens as f64 / self.bytes / std::f64::consts::LN_2
    }

    /// Adds tokens whose losses sum to `sum`; `loss` holds a sum until [`mean`](Self::mean) is called.
    fn add(&mut self, tokens: usize, bytes: f64, sum: f64) {
        self.tokens += tokens;
        self.bytes += bytes;
        self.loss += sum;
    }

    fn mean(mut self) -> Self {
        self.loss /= self.tokens as f64;
        self
    }
}

/// Loads a saved model for evaluation on the CPU as one of several ranks, in another precision if requested.
/// `default_vectors` decides whether evaluation uses the default vectors of the router `default`; `None` leaves it to the
/// model's settings.
///
/// # Errors
/// When the model cannot be read, or `default_vectors` is given and its router has none, or cannot use them.
pub fn load_on(
    found: &Saved,
    default_vectors: Option<bool>,
    precision: Option<Precision>,
    dist: &Arc<dyn Collective>,
) -> Result<(Model, TrainerState)> {
    let mut possible = Ok(());
    let change = |config: &mut Config| {
        config.train.device = Device::Cpu;
        // If the router cannot be built, the model is rejected when it is read.
        if let (Some(used), Ok(router)) = (default_vectors, routers::build(&config.router)) {
            possible = match found {
                // An export has only the state that evaluation reads.
                Saved::Model(_) if used && !router.evaluation_reads(VECTORS) => {
                    Err("in an export without default vectors")
                }
                _ => router.use_default_vectors(&mut config.router.settings, used),
            };
        }
    };
    let (mut model, mut state) = found.load_on(change, dist.clone())?;
    if let Err(reason) = possible {
        return Err(Error::usage(
            match default_vectors {
                Some(true) => "--compare-default-vectors",
                _ => "--without-default-vectors",
            },
            "a model of the router default whose output has default vectors",
            format!("the router {}, {reason}", state.config.router.name),
            "remove the flag",
        ));
    }
    if let Some(precision) = precision.filter(|p| *p != state.config.train.dtype) {
        state.config.train.dtype = precision;
        let trained = {
            let router = routers::build(&state.config.router)?;
            let new = Model::with_router(&state.config, router, dist.clone())?;
            std::mem::replace(&mut model, new)
        };
        model.take_over(&trained)?;
    }
    Ok((model, state))
}

/// Reads the text `data` and sets `config` to it. Without `data`, reads the text of the run whose checkpoint has this
/// `digest` of the text.
///
/// # Errors
/// When the text cannot be read, or differs from the run's text.
pub(super) fn text(config: &mut Config, digest: &str, data: Option<&str>) -> Result<Corpus> {
    if let Some(data) = data {
        config.data.set_source(data);
    }
    if data.is_none() && digest.is_empty() {
        return Err(Error::usage(
            "--data",
            "held-out text for a model without a run",
            "none",
            "name a folder that `routegrad data prepare` made with the model's tokenizer.json",
        ));
    }
    let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
    let found = corpus.fingerprint();
    if data.is_some() || found == digest {
        return Ok(corpus);
    }
    Err(Error::file(
        config.data.name(),
        format!("the text that the run was trained on, of digest {digest}"),
        format!("another text, of digest {found}"),
        "restore the run's text, or select this text with --data",
    ))
}

/// Evaluates a model on `sequences` sequences (all if 0) of the validation documents of `data`, or of the text that the
/// model was trained on. The ranks share the batches, and every rank gets the report that one process would get. Rank 0 shows
/// progress.
///
/// # Errors
/// When the text cannot be read or differs from the run's text or that of the other ranks, the loss is not finite, or a rank is
/// lost.
pub fn run(
    model: &Model,
    state: &TrainerState,
    data: Option<&str>,
    sequences: usize,
) -> Result<Report> {
    let mut config = state.config.clone();
    let corpus = text(&mut config, &state.data, data)?;
    let dist = model.dist();
    check_alike(dist, &config)?;
    check_data(dist, &corpus.fingerprint())?;
    // Hosts are not equally fast: no limit of time applies to who waits.
    doing_alone("the evaluation");
    let windows = corpus.validation(sequences);
    let all = windows.len();
    let progress = Progress::new(all as u64, dist.rank() != 0);
    let shown = |done: usize| progress.at(done as u64, &format!("{done}/{all} sequences"));
    let report = measured(model, &corpus, &windows, config.evaluation_batch(), shown)?;
    if !report.loss.is_finite() {
        let diverged = Error::NonFinite {
            what: "the validation loss".into(),
            help: "the model diverged: use an earlier checkpoint".into(),
        };
        return Err(shared(dist, diverged));
    }
    Ok(report)
}

/// Returns the loss on `most` validation sequences (all if 0), `batch` sequences at a time, at least 1. Several ranks divide the
/// batches, and every rank gets the same report as one rank alone. The model's state is not changed.
///
/// # Errors
/// When the model returns an error, or another rank has left.
pub fn validation_loss(
    model: &Model,
    corpus: &Corpus,
    most: usize,
    batch: usize,
) -> Result<Report> {
    measured(model, corpus, &corpus.validation(most), batch, |_| ())
}

/// Evaluates the model on these windows; calls `shown` with the number of windows that are done.
fn measured(
    model: &Model,
    corpus: &Corpus,
    windows: &[Window],
    batch: usize,
    shown: impl Fn(usize),
) -> Result<Report> {
    let (dist, batch) = (model.dist(), batch.max(1));
    let of_rank = |rank| windows.chunks(batch).skip(rank).step_by(dist.size());
    let mut sums = Vec::new();
    let mut done = 0;
    for windows in of_rank(dist.rank()) {
        let losses = model.token_losses(corpus.read(windows).all())?;
        let mut losses = losses.as_slice();
        for window in windows {
            losses = &losses[window.repeated()..];
            for share in corpus.shares(*window) {
                let (own, rest) = losses.split_at(share.tokens as usize);
                sums.push(own.iter().sum::<f64>());
                losses = rest;
            }
        }
        done += windows.len();
        shown(done * dist.size());
    }
    let mut sums = gathered(dist, &sums)?;
    let mut whole = Report::default();
    let mut by_source = vec![Report::default(); corpus.sources().len()];
    // Adds the losses in the order of a single rank.
    for (i, windows) in windows.chunks(batch).enumerate() {
        let sums = &mut sums[i % dist.size()];
        for share in windows.iter().flat_map(|w| corpus.shares(*w)) {
            let (tokens, sum) = (share.tokens as usize, sums.next().unwrap_or(f64::NAN));
            whole.add(tokens, share.bytes, sum);
            if let Some(source) = by_source.get_mut(share.source) {
                source.add(tokens, share.bytes, sum);
            }
        }
    }
    // The routing statistics of training must not include these tokens.
    for state in model.layer_states_mut().iter_mut() {
        state.take_stats();
    }
    if by_source.len() > 1 {
        let named = corpus.sources().iter().cloned().zip(by_source);
        let seen = named.filter(|(_, report)| report.tokens > 0);
        whole.sources = seen.map(|(name, report)| (name, report.mean())).collect();
    }
    Ok(whole.mean())
}

/// Gathers the numbers of every rank, in the order of the ranks.
pub(super) fn gathered(dist: &dyn Collective, own: &[f64]) -> Result<Vec<std::vec::IntoIter<f64>>> {
    let all = dist.gather_bytes(bytemuck::cast_slice(own))?;
    let numbers = all.into_iter().map(|bytes| {
        let mut numbers = vec![0.0; bytes.len() / size_of::<f64>()];
        bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(&bytes);
        numbers.into_iter()
    });
    Ok(numbers.collect())
}
