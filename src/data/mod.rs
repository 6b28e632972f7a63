//! The corpus of a model: training and validation documents, as windows of tokens. The source is a folder that [`prepare`]
//! created, a mix of several such folders, or text whose bytes are the tokens.
//!
//! From text, complete documents are held out: of n documents m = round(`validation_fraction` · n), at least one, spread
//! evenly: held-out document k is document ⌊(k + ½) n / m⌋. The documents of each side are joined by [`DOCUMENT_END`]. A
//! window may contain several documents; if `document_boundaries` is on, its batch holds the positions at which they
//! begin.

mod boundaries;
mod catch_panic;
mod changed;
mod compressed;
pub mod folder;
mod frames;
mod limits;
mod mix;
mod order;
mod part;
mod plain;
mod prefetch;
pub mod prepare;
mod sources;
mod text;
pub mod tokenizer;
mod tokens;

pub use folder::{Counts, Folder};
pub use limits::DOCUMENT_END;
pub use part::Share;
pub use prefetch::Prefetch;
pub use sources::{LeftOut, Source, sources};
pub(crate) use text::read_text;
pub use tokenizer::Tokenizer;

use crate::config::{Config, DataConfig, Layers, ModelConfig, RouterCheck};
use crate::error::{Error, Result};
use crate::model::batch::Batch;
use limits::long_enough;
use mix::Mix;
use order::Order;
use part::Part;
use std::collections::BTreeSet;
use std::path::Path;

/// Training and validation text in windows of S + 1 tokens: S inputs, and as targets the tokens that follow them.
pub struct Corpus {
    parts: Vec<Part>,
    /// The order of the training windows of each part.
    orders: Vec<Order>,
    mix: Mix,
    /// Names of the sources of the validation documents.
    sources: Vec<String>,
    sequence_length: u64,
    /// The folder with the tokenizer's files.
    folder: Option<Folder>,
    fingerprint: String,
}

/// A window of S + 1 consecutive validation tokens.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    part: usize,
    start: u64,
    /// Number of tokens at the beginning that another window predicts too: the last window of a part begins earlier so
    /// that it has the same length as the others.
    repeated: u64,
}

impl Window {
    /// Returns the number of predicted tokens at the beginning that must not be counted, since another window predicts
    /// them too.
    pub fn repeated(&self) -> usize {
        self.repeated as usize
    }
}

impl Corpus {
    /// Reads `config.source`, or `config.mix`, for a model with sequences of `model.sequence_length` tokens. `seed`
    /// determines the order of the training sequences.
    ///
    /// # Errors
    /// When a file is missing, empty, truncated or not UTF-8; there are too few documents or too little text; the
    /// vocabulary is larger than the model's; a folder of tokens is unfinished or was changed, or its tokenizer differs
    /// from that of the run or of the other folders.
    pub fn load(config: &DataConfig, model: &ModelConfig, seed: u64) -> Result<Self> {
        let mut parts = Vec::new();
        for source in config.sources() {
            if !config.mix.is_empty() && !Folder::is(Path::new(source)) {
                let expected = "a folder of tokens in data.mix";
                let help = "prepare the text: routegrad data prepare";
                return Err(Error::file(source, expected, "none", help));
            }
            let part = Part::load(source, config, model)?;
            tokenizer::expect(&config.tokenizer, &part.tokenizer, source)?;
            parts.push(part);
        }
        let s = model.sequence_length as u64;
        let validation = parts.iter().map(|p| p.validation.len()).max().unwrap_or(0);
        long_enough("validation", validation, s)?;
        let names = parts
            .iter()
            .flat_map(|p| p.documents.iter().map(|d| &p.sources[d.source as usize]));
        let sources: BTreeSet<&String> = names.collect();
        let sources = sources.into_iter().cloned().collect();
        Ok(Corpus {
            sources,
            mix: match config.mix.is_empty() {
                true => Mix::single(),
                false => Mix::new(&config.mix, seed)?,
            },
            orders: parts
                .iter()
                .map(|p| Order::new(p.train.len(), s, seed))
                .collect(),
            sequence_length: s,
            folder: folders(config)?.into_iter().next(),
            fingerprint: fingerprint(&parts, config),
            parts,
        })
    }

    /// Returns the training sequences with these global indices. Step t, with n sequences per step, uses the indices t · n
    /// to (t + 1) · n - 1, independent of micro-batches and ranks; for a rank's part of a micro-batch see
    /// [`Collective::part`](crate::dist::Collective::part).
    pub fn sequences(&self, indices: impl IntoIterator<Item = u64>) -> Batch {
        let (mut batch, indices) = (Batch::default(), indices.into_iter());
        let count = indices.size_hint().0;
        batch
            .tokens
            .reserve(count * (self.sequence_length as usize + 1));
        for index in indices {
            let (part, local) = self.mix.place(index);
            let start = self.orders[part].start(local);
            let text = &self.parts[part].train;
            text.copy(start, self.sequence_length, &mut batch);
        }
        batch
    }

    /// Returns windows of validation text: `most` windows, evenly spread, or all if `most` is 0 or there are not more. All
    /// windows together predict every validation token once, except the first of a part, if the
    /// [repeated](Window::repeated) tokens are not counted.
    pub fn validation(&self, most: usize) -> Vec<Window> {
        let mut windows = self.held_out(most);
        if most > 0 && most <= self.whole_windows() {
            return windows;
        }
        let s = self.sequence_length;
        for (part, p) in self.parts.iter().enumerate() {
            let predicted = p.validation.len().saturating_sub(1);
            if predicted > s && predicted % s > 0 {
                windows.push(Window {
                    part,
                    start: predicted - s,
                    repeated: s - predicted % s,
                });
            }
        }
        if most > 0 {
            windows.truncate(most);
        }
        windows
    }

    /// Returns the number of validation windows of S + 1 tokens that have no predicted token in common.
    fn whole_windows(&self) -> usize {
        self.parts.iter().map(|p| self.whole_windows_of(p)).sum()
    }

    fn whole_windows_of(&self, part: &Part) -> usize {
        (part.validation.len().saturating_sub(1) / self.sequence_length) as usize
    }

    /// Returns validation windows that have no predicted token in common: `most` windows, evenly spread, or all if `most`
    /// is 0.
    pub fn held_out(&self, most: usize) -> Vec<Window> {
        let all = self.whole_windows();
        let n = if most == 0 { all } else { most.min(all) };
        let window = |k: usize| {
            let (mut part, mut k) = (0, k * all / n);
            while k >= self.whole_windows_of(&self.parts[part]) {
                k -= self.whole_windows_of(&self.parts[part]);
                part += 1;
            }
            let start = k as u64 * self.sequence_length;
            Window {
                part,
                start,
                repeated: 0,
            }
        };
        (0..n).map(window).collect()
    }

    /// Reads the tokens of validation windows.
    pub fn read(&self, windows: &[Window]) -> Batch {
        let mut batch = Batch::default();
        for Window { part, start, .. } in windows {
            let text = &self.parts[*part].validation;
            text.copy(*start, self.sequence_length, &mut batch);
        }
        batch
    }

    /// Returns the sources of the tokens that a validation window predicts, without repeated tokens: one [`Share`] per run
    /// of consecutive tokens of a document; its source is an index into [`sources`](Self::sources).
    pub fn shares(&self, window: Window) -> Vec<Share> {
        let part = &self.parts[window.part];
        let first = window.start + 1;
        let mut shares = part.shares(first + window.repeated, first + self.sequence_length);
        for share in &mut shares {
            let name = part.sources.get(share.source);
            let number = name.and_then(|name| self.sources.binary_search(name).ok());
            share.source = number.unwrap_or(0);
        }
        shares
    }

    /// Returns the names of the sources of the validation documents; empty if the text has no sources.
    pub fn sources(&self) -> &[String] {
        &self.sources
    }

    /// Reads the windows of [`held_out`](Self::held_out).
    pub fn evaluation(&self, most: usize) -> Batch {
        self.read(&self.held_out(most))
    }

    /// Returns the counts of the training and of the validation documents.
    pub fn counts(&self) -> [Counts; 2] {
        let mut counts = [Counts::default(); 2];
        for part in &self.parts {
            counts
                .iter_mut()
                .zip(part.counts)
                .for_each(|(sum, c)| sum.add(c));
        }
        counts
    }

    /// Returns whether the text is one document, whose end is held out.
    pub fn is_one_document(&self) -> bool {
        self.parts.iter().all(|part| part.one_document)
    }

    /// Returns the tokenizer that produced the tokens.
    ///
    /// # Errors
    /// When its files cannot be read; also, in a build without the feature `text`, unless each byte is a token.
    pub fn load_tokenizer(&self) -> Result<Tokenizer> {
        let folder = self.folder.as_ref();
        folder.map_or(Ok(Tokenizer::bytes()), Folder::tokenizer)
    }

    /// Returns the names and contents of the tokenizer's files; an empty list if each byte is a token.
    ///
    /// # Errors
    /// When the files cannot be read.
    pub fn tokenizer_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let folder = self.folder.as_ref();
        folder.map_or(Ok(Vec::new()), Folder::tokenizer_files)
    }

    /// Returns a digest of the training and validation data. A resumed run must use data with the digest that the run
    /// started with.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}

fn fingerprint(parts: &[Part], config: &DataConfig) -> String {
    if let [single] = parts {
        return single.digest.clone();
    }
    let mut hash = blake3::Hasher::new();
    for (part, weighted) in parts.iter().zip(&config.mix) {
        hash.update(part.digest.as_bytes());
        hash.update(&weighted.weight.to_le_bytes());
    }
    hash.finalize().to_hex().to_string()
}

/// Resolves a configuration as [`Config::load`] does. If no source sets `data.tokenizer` or `model.vocab_size`, they are
/// taken from the training data; the vocabulary size is rounded up to a multiple of 8, as the kernels require.
///
/// # Errors
/// As [`Config::load`], and when a folder of tokens cannot be opened.
pub fn configure(layers: &Layers, check_router: &RouterCheck) -> Result<Config> {
    let mut config = Config::load(layers, check_router)?;
    if !layers.gives("data.tokenizer")? {
        adopt_tokenizer(&mut config.data)?;
    }
    let found = folders(&config.data)?;
    if let Some(needed) = found.iter().map(|f| f.manifest().vocab_size).max()
        && !layers.gives("model.vocab_size")?
    {
        config.model.vocab_size = needed.next_multiple_of(8);
        config.validate()?;
    }
    Ok(config)
}

/// Sets `tokenizer` to that of the first folder of tokens, if there is one.
///
/// # Errors
/// When a folder cannot be opened.
pub fn adopt_tokenizer(config: &mut DataConfig) -> Result<()> {
    if let Some(folder) = folders(config)?.first() {
        config.tokenizer = folder.manifest().tokenizer.clone();
    }
    Ok(())
}

fn folders(config: &DataConfig) -> Result<Vec<Folder>> {
    let paths = config.sources().map(Path::new);
    paths.filter(|p| Folder::is(p)).map(Folder::open).collect()
}

#[cfg(test)]
mod tests;
