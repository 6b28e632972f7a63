//! Reads a `tokenizer.json` with Hugging Face's library.

use super::{Kind, Special, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, fingerprint_of};
use crate::data::catch_panic::catch_panic;
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Common names of the special token at the beginning of a text.
const BOS: &[&str] = &[
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "<|bos|>",
    "[BOS]",
    "<|startoftext|>",
];
/// Common names of the special token at the end of a text.
const EOS: &[&str] = &[
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
];

pub(super) struct File {
    inner: tokenizers::Tokenizer,
    json: Vec<u8>,
}

impl Tokenizer {
    /// Parses the contents of the tokenizer's files.
    pub(super) fn parse(path: &Path, json: Vec<u8>, config: Option<&[u8]>) -> Result<Self> {
        let bad = |got: String| {
            let help = "use the tokenizer.json of a Hugging Face fast tokenizer";
            Error::file(path, "a tokenizer", got, help)
        };
        let mut inner = catch_panic(|| tokenizers::Tokenizer::from_bytes(&json)).map_err(bad)?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| bad(e.to_string()))?;
        inner.set_encode_special_tokens(true);
        let greatest = || Ok::<_, String>(inner.get_vocab(true).into_values().max());
        let greatest = catch_panic(greatest).map_err(bad)?;
        let vocab_size = match greatest {
            Some(greatest) if greatest < i32::MAX as u32 => greatest as usize + 1,
            Some(greatest) => return Err(bad(format!("token {greatest}, more than 31 bits"))),
            None => return Err(bad("a tokenizer without tokens".into())),
        };
        let fingerprint = fingerprint_of(&json);
        let file = File { inner, json };
        let named = |names: &[&str]| names.iter().find_map(|name| file.special(name));
        let (bos, eos) = match config {
            None => (named(BOS), named(EOS)),
            Some(config) => {
                let path = path.with_file_name(TOKENIZER_CONFIG_FILE);
                let config: Value = serde_json::from_slice(config).map_err(|e| {
                    Error::file(&path, "JSON", e.to_string(), "correct or remove the file")
                })?;
                let of = |key| match token_name(&config[key]) {
                    None => Ok(None),
                    Some(name) => file.special(name).map(Some).ok_or_else(|| {
                        Error::file(
                            &path,
                            format!("a token of {TOKENIZER_FILE} as {key}"),
                            format!("`{name}`"),
                            "correct the file, or remove it",
                        )
                    }),
                };
                let (bos, eos) = (of("bos_token")?, of("eos_token")?);
                // Many files with one token at the end of texts name it as the beginning too, though they do not add it
                // there.
                let adds = config["add_bos_token"] == true;
                let same = bos.as_ref().map(|s| s.token) == eos.as_ref().map(|s| s.token);
                (bos.filter(|_| adds || !same), eos)
            }
        };
        Ok(Tokenizer {
            kind: Kind::File(Box::new(file)),
            vocab_size,
            bos,
            eos,
            fingerprint,
        })
    }
}

/// Returns the name of a token: a string, or the field `content` of an object.
fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

impl File {
    pub fn special(&self, name: &str) -> Option<Special> {
        let token = i32::try_from(self.inner.token_to_id(name)?).ok()?;
        let name = name.to_string();
        Some(Special { token, name })
    }

    pub fn json(&self) -> &[u8] {
        &self.json
    }

    pub fn encode(&self, text: &str, vocab_size: usize, processed: bool) -> Result<Vec<i32>> {
        let bad = |got: String| {
            Error::invalid(
                "tokenizer",
                "a text that the tokenizer can encode",
                got,
                "check the tokenizer and the text",
            )
        };
        let encoding = catch_panic(|| self.inner.encode_fast(text, processed)).map_err(bad)?;
        let tokens = encoding.get_ids().iter().map(|id| {
            let known = (*id as usize) < vocab_size;
            known.then_some(*id as i32).ok_or(id)
        });
        let tokens: Result<Vec<i32>, _> = tokens.collect();
        tokens.map_err(|id| bad(format!("token {id}, which is not in the vocabulary")))
    }

    pub fn decode(&self, tokens: &[i32]) -> Result<String> {
        let ids: Vec<u32> = tokens.iter().map(|t| *t as u32).collect();
        catch_panic(|| self.inner.decode(&ids, false)).map_err(|got| {
            let help = "check the tokenizer";
            Error::invalid("tokenizer", "tokens that it can decode", got, help)
        })
    }
}
