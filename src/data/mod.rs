//! The text that a model learns from: read, split into training and validation documents, and cut
//! into windows of tokens. A token is a byte.
//!
//! Whole documents are held out: of n documents m = round(`validation_fraction` · n), at least one,
//! spread evenly over their order: number k is document ⌊(k + ½) n / m⌋. The documents of each side
//! are joined by [`DOCUMENT_END`], and a window may span several.

#[cfg_attr(not(feature = "text"), allow(dead_code))]
mod guard;
mod order;
mod sources;
mod text;
pub mod tokenizer;

pub use sources::{Source, sources};
pub(crate) use text::read_text;
pub use tokenizer::Tokenizer;

use crate::config::{DataConfig, ModelConfig};
use crate::error::{Error, Result};
use order::Order;
use std::ops::Range;

/// What stands between two documents.
pub const DOCUMENT_END: &str = "\n\n\n";

/// Training and validation text, as windows of S + 1 tokens: S inputs and the S that follow them.
pub struct Corpus {
    train: Vec<u8>,
    validation: Vec<u8>,
    documents: [usize; 2],
    sequence_length: usize,
    order: Order,
}

impl Corpus {
    /// Reads `config.source` for a model that takes `model.sequence_length` tokens, in the order
    /// that `seed` gives.
    ///
    /// # Errors
    /// Missing, empty, truncated or non-UTF-8 files; too few documents or too little text; a byte
    /// that the vocabulary lacks.
    pub fn load(config: &DataConfig, model: &ModelConfig, seed: u64) -> Result<Self> {
        let documents = text::read(config)?;
        let held_out = held_out(documents.len(), config.validation_fraction)?;
        let mut sides = [Vec::new(), Vec::new()];
        for (i, document) in documents.iter().enumerate() {
            let side = &mut sides[usize::from(held_out.contains(&i))];
            if !side.is_empty() {
                side.extend_from_slice(DOCUMENT_END.as_bytes());
            }
            side.extend_from_slice(document.as_bytes());
        }
        let [train, validation] = sides;
        let s = model.sequence_length;
        for (name, side) in [("training", &train), ("validation", &validation)] {
            long_enough(name, side.len(), s)?;
            in_vocabulary(name, side, model.vocab_size)?;
        }
        Ok(Corpus {
            order: Order::new(train.len() as u64, s as u64, seed),
            documents: [documents.len() - held_out.len(), held_out.len()],
            sequence_length: s,
            train,
            validation,
        })
    }

    /// Training sequences by their global index, [indices, S + 1] row-major. Step t of n sequences
    /// takes indices t · n to (t + 1) · n, however micro-batches and ranks divide them; a rank's part
    /// of a micro-batch is [`Collective::part`](crate::dist::Collective::part).
    pub fn sequences(&self, indices: Range<u64>) -> Vec<i32> {
        let starts = indices.map(|i| self.order.start(i) as usize);
        self.windows(&self.train, starts)
    }

    /// Validation windows, [n, S + 1] row-major, and n. All of them predict each validation token
    /// but the first once, save the last fewer than S; `most` > 0 takes that many, evenly spread.
    pub fn evaluation(&self, most: usize) -> (Vec<i32>, usize) {
        let all = (self.validation.len() - 1) / self.sequence_length;
        let n = if most == 0 { all } else { most.min(all) };
        let starts = (0..n).map(|k| k * all / n * self.sequence_length);
        (self.windows(&self.validation, starts), n)
    }

    fn windows(&self, side: &[u8], starts: impl Iterator<Item = usize>) -> Vec<i32> {
        starts
            .flat_map(|start| &side[start..=start + self.sequence_length])
            .map(|byte| i32::from(*byte))
            .collect()
    }

    /// Documents to train on and documents held out.
    pub fn documents(&self) -> [usize; 2] {
        self.documents
    }

    /// Bytes to train on and bytes held out.
    pub fn bytes(&self) -> [usize; 2] {
        [self.train.len(), self.validation.len()]
    }

    /// A digest of both sides: a resumed run must read what it began with.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for side in [&self.train, &self.validation] {
            hash.update(&(side.len() as u64).to_le_bytes());
            hash.update(side);
        }
        hash.finalize().to_hex().to_string()
    }
}

/// Indices of the documents held out, increasing.
fn held_out(documents: usize, fraction: f64) -> Result<Vec<usize>> {
    if documents < 2 {
        return Err(Error::invalid(
            "data",
            "at least two documents, one to train on and one held out for validation",
            format!("{documents}"),
            "add files, or give what separates documents, as in --set 'data.document_separator=\"\\n\\n\"'",
        ));
    }
    let m = (documents as f64 * fraction).round() as usize;
    let m = m.clamp(1, documents - 1);
    Ok((0..m).map(|k| (2 * k + 1) * documents / (2 * m)).collect())
}

fn long_enough(side: &str, length: usize, sequence: usize) -> Result<()> {
    if length > sequence {
        return Ok(());
    }
    Err(Error::invalid(
        "data",
        format!("{side} text of more than {sequence} bytes, one sequence and the byte after it"),
        format!("{length}"),
        "add text, or lower model.sequence_length",
    ))
}

fn in_vocabulary(side: &str, text: &[u8], vocab_size: usize) -> Result<()> {
    match text
        .iter()
        .position(|byte| usize::from(*byte) >= vocab_size)
    {
        None => Ok(()),
        Some(at) => Err(Error::invalid(
            "data",
            format!("bytes below model.vocab_size = {vocab_size}"),
            format!("byte {} at offset {at} of the {side} text", text[at]),
            "set model.vocab_size=256, which holds every byte",
        )),
    }
}

#[cfg(test)]
mod tests;
