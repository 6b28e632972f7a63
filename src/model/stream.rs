//! The residual stream.

use crate::error::Result;
use crate::ops::add::add;
use crate::tape::{Tape, Var};

/// The residual stream between two norms: rows `[T, D]`, and a term that the next norm adds to them in
/// the same pass.
pub struct Stream {
    pub x: Var,
    pub pending: Option<Var>,
}

impl Stream {
    pub fn new(x: Var) -> Self {
        Stream { x, pending: None }
    }

    /// Returns the rows with the term added.
    pub fn joined(&self, tape: &Tape) -> Result<Var> {
        match &self.pending {
            Some(term) => add(tape, &self.x, term),
            None => Ok(self.x.clone()),
        }
    }
}
