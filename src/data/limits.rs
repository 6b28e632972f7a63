//! The separator of documents of bytes, the choice of held-out documents, and the minimum size of a corpus.

use crate::error::{Error, Result};

/// Separator between two documents of bytes.
pub const DOCUMENT_END: &str = "\n\n\n";

/// Returns the indices of the held-out documents, increasing: at least one, and of several documents not all.
pub(super) fn held_out(documents: usize, fraction: f64) -> Vec<usize> {
    let m = (documents as f64 * fraction).round() as usize;
    let m = m.min(documents.saturating_sub(1)).max(1);
    (0..m).map(|k| (2 * k + 1) * documents / (2 * m)).collect()
}

/// Splits a text into the part before its last `fraction` and that last part. The cut is between two characters.
pub(super) fn before_and_end(text: &str, fraction: f64) -> [String; 2] {
    let mut at = (text.len() as f64 * (1.0 - fraction)) as usize;
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let (before, end) = text.split_at(at);
    [before, end].map(str::to_owned)
}

pub(super) fn long_enough(side: &str, length: u64, sequence: u64) -> Result<()> {
    if length > sequence {
        return Ok(());
    }
    Err(Error::invalid(
        "data",
        format!("{side} text of more than {sequence} tokens, one sequence and the token after it"),
        format!("{length}"),
        "add text, hold out more of it, or lower model.sequence_length",
    ))
}

pub(super) fn in_vocabulary(side: &str, text: &[u8], vocab_size: usize) -> Result<()> {
    let unknown = |byte: &u8| usize::from(*byte) >= vocab_size;
    let Some(at) = text.iter().position(unknown) else {
        return Ok(());
    };
    Err(Error::invalid(
        "data",
        format!("bytes below model.vocab_size = {vocab_size}"),
        format!("byte {} at offset {at} of the {side} text", text[at]),
        "set model.vocab_size=256, which holds every byte",
    ))
}
