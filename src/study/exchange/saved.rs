//! A saved model of either kind: a checkpoint of a run, or a folder of transformers.

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

/// A model that is evaluated, analysed, sampled from or exported.
pub enum Saved {
    /// A checkpoint of this program.
    Run(Checkpoint),
    /// A model's folder, which knows nothing of a training.
    Model(Box<Source>),
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
        self.load_on(change, Box::new(SingleRank))
    }

    /// The same as one of several ranks.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_on(
        &self,
        change: impl FnOnce(&mut Config),
        dist: Box<dyn Collective>,
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
fn own_tokenizer(folder: &Path) -> Result<Option<Tokenizer>> {
    match own_fingerprint(folder)? {
        None => Ok(None),
        Some(own) if own == BYTES => Ok(Some(Tokenizer::bytes())),
        Some(_) => Tokenizer::open(&folder.join(TOKENIZER_FILE)).map(Some),
    }
}

/// The fingerprint of that tokenizer, whose file is not looked into: a program without the feature `text` knows it too.
///
/// # Errors
/// When the file is there and cannot be read.
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
