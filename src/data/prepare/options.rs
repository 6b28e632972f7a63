//! The options of a preparation.

use crate::data::DOCUMENT_END;
use crate::data::tokenizer::{TOKENIZER_FILE, Tokenizer};
use crate::error::{Error, Result};
use crate::report::nearest;
use std::path::{Path, PathBuf};

/// Default name of the column that holds a document's source.
const SOURCE_COLUMN: &str = "dump";

/// The inputs and options of a preparation.
#[derive(Clone, Debug)]
pub struct Options {
    /// Files, or folders of files.
    pub inputs: Vec<PathBuf>,
    /// Files whose documents are all held out; if empty, `validation_fraction` of the documents is held out.
    pub validation: Vec<PathBuf>,
    /// The folder to create.
    pub out: PathBuf,
    /// A `tokenizer.json`; without one, each byte is a token.
    pub tokenizer: Option<PathBuf>,
    /// Name of the token before each document, or `none`. Default: the tokenizer's.
    pub bos: Option<String>,
    /// Name of the token after each document, or `none`. Default: the tokenizer's, or three line feeds if each byte is a
    /// token.
    pub eos: Option<String>,
    /// Share of the documents that is held out, spread evenly: at least 0 and below 1.
    pub validation_fraction: f64,
    /// Parquet column, or field of a JSON object, that holds the text.
    pub text_column: String,
    /// Column or field that holds the source of a document. Default: `dump`, if it is present.
    pub source_column: Option<String>,
    /// Text that separates the documents of a text file; if empty, a file is one document.
    pub separator: String,
    /// Number of tokens after which a shard is closed.
    pub shard_tokens: u64,
    /// Whether a document that cannot be read is an error; otherwise it is left out.
    pub strict: bool,
    /// Whether every document is decoded again, to count the documents whose text changed.
    pub round_trip: bool,
    /// Whether progress is hidden.
    pub quiet: bool,
}

impl Options {
    /// The default options for `inputs` and `out`.
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

    /// Returns the share of the documents of the inputs that is held out.
    pub(super) fn fraction(&self) -> f64 {
        match self.validation.is_empty() {
            true => self.validation_fraction,
            false => 0.0,
        }
    }

    pub(super) fn required_columns(&self) -> impl Iterator<Item = &String> {
        [Some(&self.text_column), self.source_column.as_ref()]
            .into_iter()
            .flatten()
    }

    pub(super) fn validate(&self) -> Result<()> {
        let share = self.validation_fraction;
        if !(0.0..1.0).contains(&share) {
            let (option, expected) = ("--validation-fraction", "a number from 0 to below 1");
            let help = "give the share of the documents to hold out";
            return Err(Error::usage(option, expected, share.to_string(), help));
        }
        if self.shard_tokens == 0 {
            let help = "leave it out for the default";
            return Err(Error::usage("--shard-tokens", "at least 1", "0", help));
        }
        Ok(())
    }

    /// Opens the tokenizer, with the requested tokens before and after each document.
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
    let help = format!("name a column with {option}, such as `{near}`");
    Error::file(path, format!("a column `{column}`"), got, help)
}
