//! What stands between documents of bytes, which of them are held out, and what a corpus must have.

use crate::error::{Error, Result};

/// What stands between two documents of bytes.
pub const DOCUMENT_END: &str = "\n\n\n";

/// Indices of the documents held out, increasing.
pub(super) fn held_out(documents: usize, fraction: f64) -> Result<Vec<usize>> {
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
