//! A saved model: a checkpoint of a run, or a model's folder of transformers.

use super::source::Source;
use crate::config::{Config, DataConfig, Layers};
use crate::data::Tokenizer;
use crate::data::tokenizer::{BYTES, TOKENIZER_FILE, fingerprint_of};
use crate::dist::{Collective, SingleRank};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::study::export::tokenizer as bytes;
use crate::train::checkpoint::{self, Checkpoint, TrainerState};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

/// A model to evaluate, analyse, sample from or export.
pub enum Saved {
    /// A checkpoint of this program.
    Run(Checkpoint),
    /// A model's folder, which has no information about training.
    Model(Box<Source>),
}

impl Saved {
    /// Opens the checkpoint or the model's folder at `path`, or, if `path` is a run, its newest undamaged checkpoint. The
    /// errors of damaged newer checkpoints are returned with it.
    ///
    /// # Errors
    /// When there is no model, or the program cannot compute it.
    pub fn open(path: &Path) -> Result<(Self, Vec<Error>)> {
        if Source::is(path) {
            return Ok((Saved::Model(Box::new(Source::open(path)?)), Vec::new()));
        }
        let (found, damaged) = checkpoint::find(path)?;
        Ok((Saved::Run(found), damaged))
    }

    /// Returns the folder of the model's files.
    pub fn path(&self) -> &Path {
        match self {
            Saved::Run(checkpoint) => checkpoint.path(),
            Saved::Model(source) => source.folder(),
        }
    }

    /// Returns the number of optimizer steps done; 0 if it is not known.
    pub fn step(&self) -> u64 {
        match self {
            Saved::Run(checkpoint) => checkpoint.step(),
            Saved::Model(_) => 0,
        }
    }

    /// Loads the model and its run's state. `change` can change the parts of the configuration that the files do not
    /// determine. A model's folder gets the training configuration of `tiny`, one sequence at a time, and no digest of a
    /// text.
    ///
    /// # Errors
    /// When a file is damaged, the tensors do not belong to the model, or a weight is not finite.
    pub fn load(&self, change: impl FnOnce(&mut Config)) -> Result<(Model, TrainerState)> {
        self.load_on(change, Arc::new(SingleRank))
    }

    /// The same as one of several ranks.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_on(
        &self,
        change: impl FnOnce(&mut Config),
        dist: Arc<dyn Collective>,
    ) -> Result<(Model, TrainerState)> {
        let source = match self {
            Saved::Run(checkpoint) => return checkpoint::load_model_on(checkpoint, change, dist),
            Saved::Model(source) => source,
        };
        let mut config = source.config(&Layers::preset("tiny"))?;
        config.train.micro_batch = 1;
        if let Some(own) = own_fingerprint(source.folder())? {
            config.data.tokenizer = own;
        }
        change(&mut config);
        let (model, _) = source.model_on(&config, dist)?;
        Ok((model, TrainerState::at_start(config, String::new())))
    }

    /// Returns the model's tokenizer; `config` is the data configuration of its run.
    ///
    /// # Errors
    /// When there is no tokenizer, or it is not the run's.
    pub fn tokenizer(&self, config: &DataConfig) -> Result<Tokenizer> {
        match self {
            Saved::Run(checkpoint) => checkpoint::load_tokenizer(checkpoint, config),
            Saved::Model(source) => own_tokenizer(source.folder())?.ok_or_else(|| {
                let help = "copy the model's tokenizer.json to this path";
                Error::file(source.folder(), "a tokenizer.json", "none", help)
            }),
        }
    }
}

/// Returns the tokenizer in a model's folder, if there is one; the tokenizer of bytes if `export` wrote it.
///
/// # Errors
/// When the file is not a tokenizer; also, in a build without the feature `text`, unless each byte is a token.
fn own_tokenizer(folder: &Path) -> Result<Option<Tokenizer>> {
    match own_fingerprint(folder)? {
        None => Ok(None),
        Some(own) if own == BYTES => Ok(Some(Tokenizer::bytes())),
        Some(_) => Tokenizer::open(&folder.join(TOKENIZER_FILE)).map(Some),
    }
}

/// Returns the fingerprint of that tokenizer without parsing its file, so that it also works in a build without the
/// feature `text`.
///
/// # Errors
/// When the file exists and cannot be read.
pub(super) fn own_fingerprint(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(TOKENIZER_FILE);
    let json = match fs::read(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        json => json.map_err(|e| Error::io("read", &path, e))?,
    };
    let found = serde_json::from_slice(&json);
    Ok(Some(
        match found.is_ok_and(|found: serde_json::Value| found == bytes::tokenizer()) {
            true => BYTES.into(),
            false => fingerprint_of(&json),
        },
    ))
}
