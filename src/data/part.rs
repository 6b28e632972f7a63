//! One part of a corpus: text that is read completely into memory, or a folder of tokens.

use super::boundaries::{Boundaries, Text};
use super::folder::{Counts, Entry, Folder, Side};
use super::limits::{DOCUMENT_END, before_and_end, held_out, in_vocabulary, long_enough};
use super::text;
use super::tokenizer::BYTES;
use super::tokens::{Store, Tokens};
use crate::config::{DataConfig, ModelConfig};
use crate::error::{Error, Result};
use std::path::Path;

/// The digests of folders up to this size in bytes are verified before a run.
const VERIFIED: u64 = 4 << 30;

/// Training and validation tokens of one source.
pub(super) struct Part {
    /// Fingerprint of the tokenizer.
    pub tokenizer: String,
    /// Whether the text is one document, whose end is held out.
    pub one_document: bool,
    pub train: Text,
    pub validation: Text,
    /// Counts of the training and of the validation documents.
    pub counts: [Counts; 2],
    /// The documents of the validation tokens; empty for a text of bytes.
    pub documents: Vec<Entry>,
    /// Names of the sources of the documents.
    pub sources: Vec<String>,
    /// A digest of the data.
    pub digest: String,
}

impl Part {
    /// Reads a folder of tokens, or text as bytes.
    pub fn load(source: &str, config: &DataConfig, model: &ModelConfig) -> Result<Self> {
        let part = match Folder::is(Path::new(source)) {
            true => Self::folder(Path::new(source), config, model)?,
            false => Self::text(config, model)?,
        };
        let s = model.sequence_length as u64;
        long_enough("training", part.train.len(), s)?;
        Ok(part)
    }

    fn text(config: &DataConfig, model: &ModelConfig) -> Result<Self> {
        let (mut documents, fraction) = (text::read(config)?, config.validation_fraction);
        let one_document = documents.len() == 1;
        let held_out = match documents.as_slice() {
            [single] => {
                documents = before_and_end(single, fraction).into();
                vec![1]
            }
            _ => held_out(documents.len(), fraction),
        };
        // The text of each side, and the lengths of its documents.
        let mut sides = [(); 2].map(|()| (Vec::new(), Vec::new()));
        for (i, document) in documents.iter().enumerate() {
            let (side, lengths) = &mut sides[usize::from(held_out.binary_search(&i).is_ok())];
            if let Some(before) = lengths.last_mut() {
                side.extend_from_slice(DOCUMENT_END.as_bytes());
                *before += DOCUMENT_END.len();
            }
            side.extend_from_slice(document.as_bytes());
            lengths.push(document.len());
        }
        let mut hash = blake3::Hasher::new();
        for (name, (side, _)) in ["training", "validation"].iter().zip(&sides) {
            long_enough(name, side.len() as u64, model.sequence_length as u64)?;
            in_vocabulary(name, side, model.vocab_size)?;
            hash.update(&(side.len() as u64).to_le_bytes());
            hash.update(side);
        }
        let counts = sides.each_ref().map(|(side, lengths)| Counts {
            documents: lengths.len() as u64,
            tokens: side.len() as u64,
            bytes: side.len() as u64,
        });
        let [train, validation] = sides.map(|(side, lengths)| Text {
            tokens: Tokens::whole(Store::Bytes(side)),
            boundaries: (config.document_boundaries).then(|| Boundaries::of_lengths(lengths)),
        });
        Ok(Part {
            tokenizer: BYTES.into(),
            one_document,
            train,
            validation,
            counts,
            documents: Vec::new(),
            sources: Vec::new(),
            digest: hash.finalize().to_hex().to_string(),
        })
    }

    fn folder(path: &Path, config: &DataConfig, model: &ModelConfig) -> Result<Self> {
        let folder = Folder::open(path)?;
        let manifest = folder.manifest();
        if manifest.vocab_size > model.vocab_size {
            let (needed, place) = (manifest.vocab_size, path.display());
            return Err(Error::usage(
                "model.vocab_size",
                format!("at least {needed}, the vocabulary of {place}"),
                model.vocab_size.to_string(),
                "leave it out, or prepare the text with the model's tokenizer",
            ));
        }
        if folder.bytes() <= VERIFIED {
            folder.verify()?;
        }
        let documents = folder.documents(Side::Validation)?;
        let train = match config.document_boundaries {
            true => Some(Boundaries::new(&folder.documents(Side::Train)?)),
            false => None,
        };
        let validation = (config.document_boundaries).then(|| Boundaries::new(&documents));
        let text = |side, boundaries| -> Result<Text> {
            let tokens = folder.tokens(side)?;
            Ok(Text { tokens, boundaries })
        };
        Ok(Part {
            tokenizer: manifest.tokenizer.clone(),
            one_document: false,
            train: text(Side::Train, train)?,
            validation: text(Side::Validation, validation)?,
            counts: Side::BOTH.map(|side| manifest.counts(side)),
            documents,
            sources: manifest.sources.iter().map(|s| s.name.clone()).collect(),
            digest: manifest.checksum.clone(),
        })
    }

    /// Returns the sources of the validation tokens `from .. to`: one share per document.
    pub fn shares(&self, from: u64, to: u64) -> Vec<Share> {
        if self.documents.is_empty() {
            return vec![Share {
                source: 0,
                tokens: to - from,
                bytes: (to - from) as f64,
            }];
        }
        let first = self.documents.partition_point(|d| d.end <= from);
        let mut begin = first.checked_sub(1).map_or(0, |i| self.documents[i].end);
        let mut shares = Vec::new();
        for document in &self.documents[first..] {
            if begin >= to {
                break;
            }
            let tokens = document.end.min(to) - begin.max(from);
            let all = (document.end - begin) as f64;
            // A tokenizer may make no token of a text.
            if tokens > 0 {
                shares.push(Share {
                    source: document.source as usize,
                    tokens,
                    bytes: document.bytes as f64 * tokens as f64 / all,
                });
            }
            begin = document.end;
        }
        shares
    }
}

/// A run of consecutive tokens of one document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Index of the document's source.
    pub source: usize,
    /// Number of tokens.
    pub tokens: u64,
    /// Bytes of the document's text in proportion to the share of its tokens.
    pub bytes: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_without_tokens_has_no_share() {
        let text = || Text {
            tokens: Tokens::whole(Store::Bytes(vec![b'a'; 9])),
            boundaries: None,
        };
        let ends = [(4, 8), (4, 3), (9, 5)];
        let entry = |(end, bytes)| Entry {
            end,
            bytes,
            source: 0,
        };
        let part = Part {
            tokenizer: "own".into(),
            one_document: false,
            train: text(),
            validation: text(),
            counts: [Counts::default(); 2],
            documents: ends.map(entry).to_vec(),
            sources: vec!["one".into()],
            digest: String::new(),
        };
        let shares = part.shares(1, 9);
        let found: Vec<_> = shares.iter().map(|s| (s.tokens, s.bytes)).collect();
        assert_eq!(found, [(3, 6.0), (5, 5.0)]);
    }
}
