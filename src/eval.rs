//! How well a model predicts text that it did not learn from.

use crate::checkpoint::{self, Checkpoint};
use crate::data::Corpus;
use crate::error::{Error, Result};
use crate::model::Model;

/// What an evaluation found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Tokens predicted.
    pub tokens: usize,
    /// Mean cross-entropy of a token, in nats.
    pub loss: f64,
}

impl Report {
    /// e^loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }

    /// Since a token is a byte, the loss in bits.
    pub fn bits_per_byte(&self) -> f64 {
        self.loss / std::f64::consts::LN_2
    }
}

/// Measures the model of a checkpoint on the validation documents of `data`, or of what it was
/// trained on; on `sequences` sequences of them, or all if 0.
///
/// # Errors
/// When checkpoint or text cannot be read, or the loss is not finite.
pub fn run(found: &Checkpoint, data: Option<&str>, sequences: usize) -> Result<Report> {
    let (model, state) = checkpoint::load_model(found)?;
    let mut config = state.config;
    if let Some(data) = data {
        config.data.source = data.into();
    }
    let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
    let (loss, tokens) = validation_loss(&model, &corpus, sequences, config.train.micro_batch)?;
    if !loss.is_finite() {
        return Err(Error::NonFinite {
            what: "the validation loss".into(),
            help: "the model diverged: use an earlier checkpoint".into(),
        });
    }
    Ok(Report { tokens, loss })
}

/// Mean cross-entropy over `most` validation sequences (all if 0), `batch` of them at a time, and
/// the number of tokens predicted. The model's state is left as it was.
///
/// # Errors
/// Those of the model.
pub fn validation_loss(
    model: &Model,
    corpus: &Corpus,
    most: usize,
    batch: usize,
) -> Result<(f64, usize)> {
    let (windows, n) = corpus.evaluation(most);
    let width = windows.len() / n;
    let (mut sum, mut tokens) = (0.0, 0);
    for windows in windows.chunks(batch * width) {
        let losses = model.token_losses(windows, windows.len() / width)?;
        sum += losses.iter().sum::<f64>();
        tokens += losses.len();
    }
    // Routing statistics of training must not see these tokens.
    for state in model.layer_states_mut().iter_mut() {
        state.take_stats();
    }
    Ok((sum / tokens as f64, tokens))
}
