//! The text that a model learns from, in training and validation documents, and cut into windows of
//! tokens: a folder that [`prepare`] made, several of them in a mix, or text as bytes.
//!
//! Of text whole documents are held out: of n documents m = round(`validation_fraction` · n), at least
//! one, spread evenly over their order: number k is document ⌊(k + ½) n / m⌋. The documents of each side
//! are joined by [`DOCUMENT_END`]. A window may span several documents; where `document_boundaries` are on,
//! its batch says where they begin.

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
use folder::Side;
use limits::long_enough;
use mix::Mix;
use order::Order;
use part::Part;
use std::collections::BTreeSet;
use std::path::Path;

/// Training and validation text, as windows of S + 1 tokens: S inputs and the S that follow them.
pub struct Corpus {
    parts: Vec<Part>,
    /// The order of each part.
    orders: Vec<Order>,
    mix: Mix,
    /// Names of the validation documents' sources.
    sources: Vec<String>,
    sequence_length: u64,
    /// Where a tokenizer's files lie.
    folder: Option<Folder>,
    fingerprint: String,
}

/// Where S + 1 consecutive validation tokens begin.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    part: usize,
    start: u64,
    /// Tokens at its beginning that another window predicts: the last window of a part reaches back to be as long as the others.
    repeated: u64,
}

impl Window {
    /// Predicted tokens at its beginning that do not count.
    pub fn repeated(&self) -> usize {
        self.repeated as usize
    }
}

impl Corpus {
    /// Reads `config.source`, or `config.mix`, for a model that takes `model.sequence_length` tokens,
    /// in the order that `seed` gives.
    ///
    /// # Errors
    /// Missing, empty, truncated or non-UTF-8 files; too few documents or too little text; a
    /// vocabulary that is larger than the model's; folders of tokens that are unfinished or were
    /// changed, or of another tokenizer than the run or each other.
    pub fn load(config: &DataConfig, model: &ModelConfig, seed: u64) -> Result<Self> {
        let mut parts = Vec::new();
        for source in config.sources() {
            if !config.mix.is_empty() && !Folder::is(Path::new(source)) {
                let help = "prepare the text: routegrad data prepare";
                return Err(Error::file(
                    source,
                    "a folder of tokens in data.mix",
                    "none",
                    help,
                ));
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

    /// Training sequences by their global index. Step t of n sequences
    /// takes indices t · n to (t + 1) · n, however micro-batches and ranks divide them; a rank's part
    /// of a micro-batch is [`Collective::part`](crate::dist::Collective::part).
    pub fn sequences(&self, indices: impl IntoIterator<Item = u64>) -> Batch {
        let (mut batch, indices) = (Batch::default(), indices.into_iter());
        let count = indices.size_hint().0;
        batch
            .tokens
            .reserve(count * (self.sequence_length as usize + 1));
        for index in indices {
            let (part, local) = self.mix.place(index);
            let start = self.orders[part].start(local);
            self.parts[part].copy(Side::Train, start, self.sequence_length, &mut batch);
        }
        batch
    }

    /// Windows of validation text: `most` of them, evenly spread; without a limit (0), or where there are no more, they predict
    /// every validation token but the first of a part once, those that [repeat](Window::repeated) left out.
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
        windows
    }

    /// Validation windows of S tokens and the one after them, that share no predicted token.
    fn whole_windows(&self) -> usize {
        self.parts.iter().map(|p| self.whole_windows_of(p)).sum()
    }

    fn whole_windows_of(&self, part: &Part) -> usize {
        (part.validation.len().saturating_sub(1) / self.sequence_length) as usize
    }

    /// Validation windows that share no predicted token: all of them, or `most` > 0, evenly spread.
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

    /// Validation windows, read.
    pub fn read(&self, windows: &[Window]) -> Batch {
        let mut batch = Batch::default();
        for Window { part, start, .. } in windows {
            let (part, length) = (&self.parts[*part], self.sequence_length);
            part.copy(Side::Validation, *start, length, &mut batch);
        }
        batch
    }

    /// Where the tokens that a validation window predicts come from, repeated ones left out: consecutive runs of them, their sources as numbers into [`sources`](Self::sources).
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

    /// Names of the validation documents' sources; none where the text has none.
    pub fn sources(&self) -> &[String] {
        &self.sources
    }

    /// [`held_out`](Self::held_out), read.
    pub fn evaluation(&self, most: usize) -> Batch {
        self.read(&self.held_out(most))
    }

    /// What there is to train on, and what is held out.
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

    /// Whether the text is one document, whose end is held out.
    pub fn is_one_document(&self) -> bool {
        self.parts.iter().all(|part| part.one_document)
    }

    /// The tokenizer that made the tokens.
    ///
    /// # Errors
    /// When its files cannot be read; in a program without the feature `text`, unless a token is a byte.
    pub fn load_tokenizer(&self) -> Result<Tokenizer> {
        let folder = self.folder.as_ref();
        folder.map_or(Ok(Tokenizer::bytes()), Folder::tokenizer)
    }

    /// The files of that tokenizer, names and contents; none for bytes.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn tokenizer_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        self.folder
            .as_ref()
            .map_or(Ok(Vec::new()), Folder::tokenizer_files)
    }

    /// A digest of both sides: a resumed run must read what it began with.
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

/// The configuration of these layers. What none of them gives is that of the tokens to train on:
/// `data.tokenizer`, and `model.vocab_size`, made a multiple of 8, which kernels want.
///
/// # Errors
/// As [`Config::load`], and when a folder of tokens cannot be opened.
pub fn configure(layers: &Layers, check_router: &RouterCheck) -> Result<Config> {
    let mut config = Config::load(layers, check_router)?;
    if !layers.gives("data.tokenizer")? {
        adopt_tokenizer(&mut config.data)?;
    }
    let needed = folders(&config.data)?.iter().map(vocabulary).max();
    if let Some(needed) = needed
        && !layers.gives("model.vocab_size")?
    {
        config.model.vocab_size = needed.next_multiple_of(8);
        config.validate()?;
    }
    Ok(config)
}

/// Takes `tokenizer` from the first folder of tokens, if there is one.
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

fn vocabulary(folder: &Folder) -> usize {
    folder.manifest().vocab_size
}

#[cfg(test)]
mod tests;
