//! A saved model of either kind: a checkpoint of a run, or a folder of transformers.

use super::source::Source;
use crate::config::{Config, DataConfig, Layers};
use crate::data::Tokenizer;
use crate::data::tokenizer::TOKENIZER_FILE;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::study::export::tokenizer as bytes;
use crate::train::checkpoint::{self, Checkpoint, TrainerState};
use std::fs;
use std::path::Path;

/// A model that is evaluated, analysed, sampled from or exported.
pub enum Saved {
    /// A checkpoint of this program.
    Run(Checkpoint),
    /// A model's folder, which knows nothing of a training.
    Model(Box<Source>),
}

impl From<Checkpoint> for Saved {
    fn from(checkpoint: Checkpoint) -> Self {
        Saved::Run(checkpoint)
    }
}

impl Saved {
    /// The checkpoint or the model's folder at `path`, or the newest whole checkpoint of the run there; errors of damaged newer
    /// ones come with it.
    ///
    /// # Errors
    /// When there is none, or a model's folder is none that can be computed.
    pub fn open(path: &Path) -> Result<(Self, Vec<Error>)> {
        if Source::is(path) {
            return Ok((Saved::Model(Box::new(Source::open(path)?)), Vec::new()));
        }
        let (found, damaged) = checkpoint::find(path)?;
        Ok((Saved::Run(found), damaged))
    }

    /// Where its files lie.
    pub fn path(&self) -> &Path {
        match self {
            Saved::Run(checkpoint) => checkpoint.path(),
            Saved::Model(source) => source.folder(),
        }
    }

    /// Optimizer steps done, 0 where none are known of.
    pub fn step(&self) -> u64 {
        match self {
            Saved::Run(checkpoint) => checkpoint.step(),
            Saved::Model(_) => 0,
        }
    }

    /// The model, its configuration changed in what the files do not fix, and what its run was told; of a model's folder
    /// `tiny`'s training, one sequence at a time, and no digest of a text.
    ///
    /// # Errors
    /// When a file is damaged, the tensors are of another model, or a weight is not finite.
    pub fn load(&self, change: impl FnOnce(&mut Config)) -> Result<(Model, TrainerState)> {
        let source = match self {
            Saved::Run(checkpoint) => return checkpoint::load_model_with(checkpoint, change),
            Saved::Model(source) => source,
        };
        let mut config = source.config(&Layers::preset("tiny"))?;
        config.train.micro_batch = 1;
        if let Some(own) = own_tokenizer(source.folder())? {
            config.data.tokenizer = own.fingerprint().into();
        }
        change(&mut config);
        let (model, _) = source.model(&config)?;
        let state = TrainerState {
            step: 0,
            optimizer_steps: 0,
            skipped_in_a_row: 0,
            data: String::new(),
            config,
        };
        Ok((model, state))
    }

    /// The tokenizer that it reads text with, where its run had this `config`.
    ///
    /// # Errors
    /// When there is none, or it is another one than the run's.
    pub fn tokenizer(&self, config: &DataConfig) -> Result<Tokenizer> {
        match self {
            Saved::Run(checkpoint) => checkpoint::load_tokenizer(checkpoint, config),
            Saved::Model(source) => own_tokenizer(source.folder())?.ok_or_else(|| {
                let help = "put the model's tokenizer.json there";
                Error::file(source.folder(), "a tokenizer.json", "none", help)
            }),
        }
    }
}

/// The tokenizer beside a model, if there is one; that of bytes where `export` wrote it.
///
/// # Errors
/// When the file is no tokenizer; in a program without the feature `text`, unless it is that of bytes.
pub(super) fn own_tokenizer(folder: &Path) -> Result<Option<Tokenizer>> {
    let path = folder.join(TOKENIZER_FILE);
    let Ok(text) = fs::read_to_string(&path) else {
        return Ok(None);
    };
    if serde_json::from_str(&text).is_ok_and(|found: serde_json::Value| found == bytes::tokenizer())
    {
        return Ok(Some(Tokenizer::bytes()));
    }
    Tokenizer::open(&path).map(Some)
}
