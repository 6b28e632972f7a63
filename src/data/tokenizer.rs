//! From text to tokens and back: a token is a byte, or what a `tokenizer.json` of Hugging Face's
//! makes of the text.
//!
//! Text never becomes a special token: one that stands in a document is encoded as the characters it
//! is written with, so that it cannot pass for the document's end.

#[cfg(feature = "text")]
mod file;
mod stream;

pub use stream::TextStream;

use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

/// The file of a tokenizer, in a folder of tokens, of a run and of an exported model.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The file beside it that names `bos_token` and `eos_token`.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// `model_input_names` of that file: without it transformers 4 gives models token types too, which none takes.
pub const MODEL_INPUTS: [&str; 2] = ["input_ids", "attention_mask"];
/// What stands for a fingerprint where a token is a byte; the default of `data.tokenizer`.
pub const BYTES: &str = "bytes";

/// What the loss of a model is counted in whose tokens this tokenizer, given by its fingerprint, makes.
pub fn loss_unit(fingerprint: &str) -> &'static str {
    match fingerprint {
        BYTES => "nats per byte",
        _ => "nats per token",
    }
}

/// Encodes text as tokens, numbers from 0 to below [`vocab_size`](Self::vocab_size), and back.
pub struct Tokenizer {
    kind: Kind,
    vocab_size: usize,
    bos: Option<Special>,
    eos: Option<Special>,
    fingerprint: String,
}

/// A token by its name.
struct Special {
    token: i32,
    // Only a file has names, to be written with it.
    #[cfg_attr(not(feature = "text"), allow(dead_code))]
    name: String,
}

enum Kind {
    Bytes,
    #[cfg(feature = "text")]
    File(Box<file::File>),
}

impl Tokenizer {
    /// Token n is byte n.
    pub fn bytes() -> Self {
        Tokenizer {
            kind: Kind::Bytes,
            vocab_size: 256,
            bos: None,
            eos: None,
            fingerprint: BYTES.into(),
        }
    }

    /// The `tokenizer.json` at `path`. A `tokenizer_config.json` beside it names the tokens at the
    /// beginning and the end of a text; without it they are known by the names that models give them.
    ///
    /// # Errors
    /// When the file cannot be read or is no tokenizer; in a program without the feature `text`.
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

    /// Distinct tokens: one more than the greatest.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token before a text, if the tokenizer has one.
    pub fn bos(&self) -> Option<i32> {
        self.bos.as_ref().map(|s| s.token)
    }

    /// The token behind a text, if the tokenizer has one.
    pub fn eos(&self) -> Option<i32> {
        self.eos.as_ref().map(|s| s.token)
    }

    /// Takes another token for the end of a text (`eos`) or for its beginning, or none.
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

    /// What tells two tokenizers apart: `bytes`, or what [`fingerprint_of`] says of the file.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Whether a token is a byte.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// The tokens of a text, without those of its beginning and end.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(i32::from).collect()),
            #[cfg(feature = "text")]
            Kind::File(file) => file.encode(text, self.vocab_size, false),
        }
    }

    /// The tokens of a text, with those that the file's own post-processor puts around every text: for benchmarks, whose
    /// harness asks the tokenizer for no more and no less.
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

    /// The text of tokens, special ones written by name; U+FFFD where they make no character.
    ///
    /// # Errors
    /// When one is not in the vocabulary.
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

    /// Files to write beside what was made with this tokenizer, so that [`open`](Self::open) finds it
    /// there: names and contents. None for bytes.
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

    /// The tokenizer whose files lie in `folder`; bytes where there are none.
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

/// The fingerprint of a tokenizer.json of this content: its BLAKE3 digest in hexadecimal.
pub fn fingerprint_of(json: &[u8]) -> String {
    blake3::hash(json).to_hex().to_string()
}

/// Refuses tokens of another tokenizer than that of the fingerprint `expected`.
///
/// # Errors
/// When `found`, that of the tokens in `place`, is another.
pub(crate) fn expect(expected: &str, found: &str, place: impl AsRef<Path>) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::file(
        place,
        format!("tokens of the tokenizer {expected}"),
        format!("those of {found}"),
        "prepare the text with the same tokenizer: routegrad data prepare",
    ))
}

/// What a program without the feature says to a file that needs it.
#[cfg(not(feature = "text"))]
pub(crate) fn without_feature(path: &Path, what: &str) -> Error {
    Error::file(
        path,
        format!("a program that reads {what}"),
        "one built without them",
        "build with --features text",
    )
}

#[cfg(test)]
mod tests;
