//! Converts text to tokens and back. Each byte is a token, or a Hugging Face `tokenizer.json` defines the tokens.
//!
//! Text is never encoded as a special token: if the name of a special token occurs in a document, its characters are
//! encoded, so that a document cannot contain a false end of document.

#[cfg(feature = "text")]
mod file;
mod stream;

pub use stream::TextStream;

use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

/// Name of a tokenizer's file in a folder of tokens, a run's folder and an exported model.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Name of the file beside it that sets `bos_token` and `eos_token`.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// Value of `model_input_names` in that file. Without it, transformers 4 also passes token type ids, which no model here
/// accepts.
pub const MODEL_INPUTS: [&str; 2] = ["input_ids", "attention_mask"];
/// The fingerprint if each byte is a token; the default of `data.tokenizer`.
pub const BYTES: &str = "bytes";

/// Returns the unit of the loss of a model whose tokens come from the tokenizer with this fingerprint.
pub fn loss_unit(fingerprint: &str) -> &'static str {
    match fingerprint {
        BYTES => "nats per byte",
        _ => "nats per token",
    }
}

/// Encodes text as token ids, from 0 to below [`vocab_size`](Self::vocab_size), and decodes them.
pub struct Tokenizer {
    kind: Kind,
    vocab_size: usize,
    bos: Option<Special>,
    eos: Option<Special>,
    fingerprint: String,
}

/// A special token and its name.
struct Special {
    token: i32,
    // Only tokenizers from a file have names; the name is written with the tokenizer.
    #[cfg_attr(not(feature = "text"), allow(dead_code))]
    name: String,
}

enum Kind {
    Bytes,
    #[cfg(feature = "text")]
    File(Box<file::File>),
}

impl Tokenizer {
    /// The tokenizer whose token n is byte n.
    pub fn bytes() -> Self {
        Tokenizer {
            kind: Kind::Bytes,
            vocab_size: 256,
            bos: None,
            eos: None,
            fingerprint: BYTES.into(),
        }
    }

    /// Reads the `tokenizer.json` at `path`. A `tokenizer_config.json` beside it names the tokens at the beginning and the
    /// end of a text; without it, they are found by common names.
    ///
    /// # Errors
    /// When the file cannot be read or is not a tokenizer; always in a build without the feature `text`.
    pub fn open(path: &Path) -> Result<Self> {
        let json = fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let config = path.with_file_name(TOKENIZER_CONFIG_FILE);
        let config = match config.exists() {
            true => Some(fs::read(&config).map_err(|e| Error::io("read", &config, e))?),
            false => None,
        };
        Self::parse(path, json, config.as_deref())
    }

    #[cfg(not(feature = "text"))]
    fn parse(path: &Path, _: Vec<u8>, _: Option<&[u8]>) -> Result<Self> {
        Err(without_feature(path, "tokenizers other than bytes"))
    }

    /// Returns the size of the vocabulary: the largest token id plus 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the token before a text, if the tokenizer has one.
    pub fn bos(&self) -> Option<i32> {
        self.bos.as_ref().map(|s| s.token)
    }

    /// Returns the token after a text, if the tokenizer has one.
    pub fn eos(&self) -> Option<i32> {
        self.eos.as_ref().map(|s| s.token)
    }

    /// Sets the token for the end of a text (`eos`) or for its beginning to the token `name`, or to none.
    ///
    /// # Errors
    /// When the tokenizer has no token of this name.
    pub fn set_special(&mut self, eos: bool, name: Option<&str>) -> Result<()> {
        let found = name.and_then(|name| self.special(name));
        if let (Some(name), None) = (name, &found) {
            return Err(Error::usage(
                if eos { "--eos" } else { "--bos" },
                "the name of a token of the tokenizer, or none",
                format!("`{name}`"),
                "look among added_tokens of its tokenizer.json",
            ));
        }
        *(if eos { &mut self.eos } else { &mut self.bos }) = found;
        Ok(())
    }

    fn special(&self, _name: &str) -> Option<Special> {
        match &self.kind {
            Kind::Bytes => None,
            #[cfg(feature = "text")]
            Kind::File(file) => file.special(_name),
        }
    }

    /// Returns the identifier of the tokenizer: `bytes`, or the result of [`fingerprint_of`] for its file.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Returns whether each byte is a token.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// Returns the tokens of a text, without tokens for its beginning and end.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(i32::from).collect()),
            #[cfg(feature = "text")]
            Kind::File(file) => file.encode(text, self.vocab_size, false),
        }
    }

    /// Returns the tokens of a text, including those that the post-processor of the file adds to every text. Benchmarks
    /// use it, because their reference harness encodes text in this way.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_processed(&self, text: &str) -> Result<Vec<i32>> {
        match &self.kind {
            Kind::Bytes => self.encode(text),
            #[cfg(feature = "text")]
            Kind::File(file) => file.encode(text, self.vocab_size, true),
        }
    }

    /// Returns the text of tokens. Special tokens are written by name; tokens that do not form a character become U+FFFD.
    ///
    /// # Errors
    /// When a token is not in the vocabulary.
    pub fn decode(&self, tokens: &[i32]) -> Result<String> {
        let known = |t: &&i32| !(0..self.vocab_size as i64).contains(&i64::from(**t));
        if let Some(token) = tokens.iter().find(known) {
            return Err(Error::invalid(
                "decode",
                format!("tokens below the vocabulary of {}", self.vocab_size),
                token.to_string(),
                "use the tokenizer that the tokens were made with",
            ));
        }
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|t| *t as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            #[cfg(feature = "text")]
            Kind::File(file) => file.decode(tokens),
        }
    }

    /// Returns the names and contents of the files to write beside data that was made with this tokenizer, so that
    /// [`open`](Self::open) can read it from there; an empty list if each byte is a token.
    pub fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        match &self.kind {
            Kind::Bytes => Vec::new(),
            #[cfg(feature = "text")]
            Kind::File(file) => {
                let name = |s: &Option<Special>| s.as_ref().map(|s| s.name.clone());
                let config = serde_json::json!({
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "clean_up_tokenization_spaces": false,
                    "model_input_names": MODEL_INPUTS,
                    "add_bos_token": self.bos.is_some(),
                    "bos_token": name(&self.bos),
                    "eos_token": name(&self.eos),
                });
                vec![
                    (TOKENIZER_FILE, file.json().to_vec()),
                    (TOKENIZER_CONFIG_FILE, format!("{config:#}\n").into()),
                ]
            }
        }
    }

    /// Reads the tokenizer from `folder`; if it has no tokenizer files, each byte is a token.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        match path.exists() {
            true => Self::open(&path),
            false => Ok(Self::bytes()),
        }
    }
}

/// Returns the fingerprint of a tokenizer.json with this content: its BLAKE3 digest in hexadecimal.
pub fn fingerprint_of(json: &[u8]) -> String {
    blake3::hash(json).to_hex().to_string()
}

/// Checks that the tokens in `place` were made with the expected tokenizer.
///
/// # Errors
/// When the fingerprints `expected` and `found` differ.
pub(crate) fn expect(expected: &str, found: &str, place: impl AsRef<Path>) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::file(
        place,
        format!("tokens of the tokenizer {expected}"),
        format!("tokens of the tokenizer {found}"),
        "prepare the text with the same tokenizer: routegrad data prepare",
    ))
}

/// Returns the error of a build without the feature `text` for a file that needs it.
#[cfg(not(feature = "text"))]
pub(crate) fn without_feature(path: &Path, what: &str) -> Error {
    Error::file(
        path,
        format!("a program that reads {what}"),
        "a program that was built without this feature",
        "build with --features text",
    )
}

#[cfg(test)]
mod tests;
