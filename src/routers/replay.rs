//! Replays of recorded choices, and how a router would have chosen instead.

use crate::error::{Error, Result};
use crate::ops::dispatch::Selection;

/// A token whose replayed choice differs from the choice that the router would have made.
#[derive(Clone, Debug, PartialEq)]
pub struct Disagreement {
    /// Index of the token in the batch.
    pub token: usize,
    /// The experts of the replayed choice.
    pub replayed: Vec<i32>,
    /// The experts of the router's own choice.
    pub own: Vec<i32>,
}

/// Returns the tokens for which the replayed choice differs from the router's own.
///
/// # Errors
/// When these are not choices of the same number of tokens.
pub(super) fn disagreements(replayed: &Selection, own: &Selection) -> Result<Vec<Disagreement>> {
    let (given, tokens) = (replayed.num_tokens(), own.num_tokens());
    if given != tokens {
        return Err(Error::invalid(
            "the choices to replay",
            format!("those of {tokens} tokens"),
            format!("those of {given}"),
            "replay the choices of a batch of the same size",
        ));
    }
    let differ = (0..tokens).filter(|&t| replayed.experts(t) != own.experts(t));
    let of = |token| Disagreement {
        token,
        replayed: replayed.experts(token).to_vec(),
        own: own.experts(token).to_vec(),
    };
    Ok(differ.map(of).collect())
}
