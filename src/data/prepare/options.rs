//! What a preparation is told.

use crate::data::DOCUMENT_END;
use crate::data::tokenizer::{TOKENIZER_FILE, Tokenizer};
use crate::error::{Error, Result};
use crate::report::nearest;
use std::path::{Path, PathBuf};

/// Where documents say by default where they came from.
const SOURCE_COLUMN: &str = "dump";

/// What is prepared, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Files, or folders of them.
    pub inputs: Vec<PathBuf>,
    /// Files of documents that are all held out; without any, `validation_fraction` of the inputs is.
    pub validation: Vec<PathBuf>,
    /// The new folder.
    pub out: PathBuf,
    /// A `tokenizer.json`; without one a token is a byte.
    pub tokenizer: Option<PathBuf>,
    /// Name of the token before each document; `none` for none. Default: the tokenizer's.
    pub bos: Option<String>,
    /// Name of the token behind each document; `none` for none. Default: the tokenizer's, and three
    /// line feeds where a token is a byte.
    pub eos: Option<String>,
    /// Share of the documents that is held out, spread evenly: from 0, below 1.
    pub validation_fraction: f64,
    /// Column of parquet, or field of an object, that holds the text.
    pub text_column: String,
    /// The one that says where a document came from. Default: `dump`, where it is there.
    pub source_column: Option<String>,
    /// What separates the documents of a text file; empty: a file is one document.
    pub separator: String,
    /// Tokens at which shards are closed.
    pub shard_tokens: u64,
    /// A document that cannot be read is an error, and not left out.
    pub strict: bool,
    /// Decode every document again and count those whose text does not come back.
    pub round_trip: bool,
    /// Show no progress.
    pub quiet: bool,
}

impl Options {
    /// What the command takes where nothing else is given.
    pub fn new(inputs: &[PathBuf], out: &Path) -> Self {
        Options {
            inputs: inputs.to_vec(),
            validation: Vec::new(),
            out: out.to_path_buf(),
            tokenizer: None,
            bos: None,
            eos: None,
            validation_fraction: 0.005,
            text_column: "text".into(),
            source_column: None,
            separator: DOCUMENT_END.into(),
            shard_tokens: 1 << 26,
            strict: false,
            round_trip: false,
            quiet: true,
        }
    }

    pub(super) fn source_column(&self) -> &str {
        self.source_column.as_deref().unwrap_or(SOURCE_COLUMN)
    }

    pub(super) fn required_columns(&self) -> impl Iterator<Item = &String> {
        [Some(&self.text_column), self.source_column.as_ref()]
            .into_iter()
            .flatten()
    }

    pub(super) fn validate(&self) -> Result<()> {
        let share = self.validation_fraction;
        if !(0.0..1.0).contains(&share) {
            return Err(Error::usage(
                "--validation-fraction",
                "a number from 0 to below 1",
                share.to_string(),
                "give the share of the documents to hold out",
            ));
        }
        if self.shard_tokens == 0 {
            return Err(Error::usage(
                "--shard-tokens",
                "at least 1",
                "0",
                "leave it out for the default",
            ));
        }
        Ok(())
    }

    /// The tokenizer, with the tokens that are asked for around a document.
    pub(super) fn open_tokenizer(&self) -> Result<Tokenizer> {
        let mut tokenizer = match &self.tokenizer {
            None => Tokenizer::bytes(),
            Some(path) if path.is_dir() => Tokenizer::open(&path.join(TOKENIZER_FILE))?,
            Some(path) => Tokenizer::open(path)?,
        };
        for (eos, name) in [(false, &self.bos), (true, &self.eos)] {
            if let Some(name) = name {
                tokenizer.set_special(eos, (name != "none").then_some(name))?;
            }
        }
        Ok(tokenizer)
    }

    pub(super) fn behind_document(&self, tokenizer: &Tokenizer) -> Vec<i32> {
        match tokenizer.is_bytes() && self.eos.is_none() {
            true => DOCUMENT_END.bytes().map(i32::from).collect(),
            false => tokenizer.eos().into_iter().collect(),
        }
    }
}

pub(super) fn missing_column(path: &Path, column: &str, names: &[&str]) -> Error {
    let near = nearest(column, names.iter().copied()).unwrap_or("none");
    let option = match column {
        SOURCE_COLUMN => "--source-column",
        _ => "--text-column or --source-column",
    };
    let got = format!("only {}", names.join(", "));
    let help = format!("name one with {option}, as `{near}`");
    Error::file(path, format!("a column `{column}`"), got, help)
}
