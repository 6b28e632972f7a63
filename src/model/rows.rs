//! The division of the rows of one pass into sequences.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::batch::Sequences;
use crate::ops::attention::rotary::{Places, projected_attention, rotary_attention};
use crate::ops::cached_attention::KeyValueCache;
use crate::ops::heads::Heads;
use crate::ops::linear::linear;
use crate::ops::rope::RopeTables;
use crate::ops::spans::Spans;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use std::rc::Rc;

/// The sequences of a pass.
#[derive(Clone)]
pub enum Rows {
    /// This number of sequences, all of equal length.
    Equal(usize),
    /// This number of sequences, all of equal length, and the first key that each row attends to, `[rows]`.
    Packed(usize, Tensor),
    /// Sequences of any length, some of which continue another; without gradients.
    Spans(Rc<Spans>),
    /// Further rows of one sequence, after the rows whose keys and values are cached; without gradients.
    Cached(Rc<KeyValueCache>),
}

impl Rows {
    /// The division of the inputs of `sequences`.
    pub fn new(sequences: Sequences, device: Device) -> Self {
        match sequences.first_key {
            None => Rows::Equal(sequences.count),
            Some(first_key) => {
                let first_key = Tensor::from_slice([first_key.len()], first_key);
                Rows::Packed(sequences.count, first_key.on(device))
            }
        }
    }

    /// Replaces the sequences if their number and kind are the same. Returns whether it did.
    pub fn set(&mut self, sequences: Sequences) -> bool {
        match (self, sequences.first_key) {
            (Rows::Equal(count), None) => *count == sequences.count,
            (Rows::Packed(count, tensor), Some(first_key)) => {
                let fits = *count == sequences.count && tensor.elements() == first_key.len();
                if fits {
                    tensor.slice_mut::<i32>().copy_from_slice(first_key);
                }
                fits
            }
            _ => false,
        }
    }

    /// Returns the number of sequences of equal length; 0 for the other kinds.
    pub fn count(&self) -> usize {
        match self {
            Rows::Equal(count) | Rows::Packed(count, _) => *count,
            Rows::Spans(_) | Rows::Cached(_) => 0,
        }
    }

    /// Returns the first key that each row attends to, if documents have boundaries.
    pub fn first_key(&self) -> Option<&Tensor> {
        match self {
            Rows::Packed(_, first_key) => Some(first_key),
            _ => None,
        }
    }

    /// Checks that `tokens` tokens divide into these sequences, and that no sequence is longer than `longest`.
    pub fn check(&self, tokens: usize, longest: usize) -> Result<()> {
        let (fits, got) = match self {
            Rows::Equal(sequences) | Rows::Packed(sequences, _) => {
                let length = tokens / (*sequences).max(1);
                let fits = (1..=longest).contains(&length) && length * sequences == tokens;
                (fits, format!("{tokens} tokens for {sequences} sequences"))
            }
            Rows::Spans(spans) => (
                spans.rows() == tokens && (1..=longest).contains(&spans.longest()),
                format!(
                    "{tokens} tokens for sequences of {} in all, of {} at most",
                    spans.rows(),
                    spans.longest()
                ),
            ),
            Rows::Cached(cache) => (
                (1..=longest).contains(&(cache.rows() + tokens)) && tokens > 0,
                format!("{tokens} tokens after {} cached rows", cache.rows()),
            ),
        };
        if fits {
            return Ok(());
        }
        let kind = match self {
            Rows::Equal(_) | Rows::Packed(..) => "sequences of equal length",
            Rows::Spans(_) | Rows::Cached(_) => "sequences",
        };
        Err(Error::invalid(
            "model",
            format!("{kind}, from 1 to model.sequence_length = {longest}"),
            got,
            "cut or pad the tokens, or raise model.sequence_length",
        ))
    }

    /// RoPE, then causal attention within each sequence, of `qkv [T, (H + 2 KV) hd]`. Returns `[T, H hd]`.
    pub fn attention(
        &self,
        tape: &Tape,
        qkv: &Var,
        heads: Heads,
        tables: &RopeTables,
    ) -> Result<Var> {
        match self {
            Rows::Spans(spans) => spans
                .attention(qkv.tensor(), heads, tables)
                .map(Var::constant),
            Rows::Cached(cache) => cache
                .attention(qkv.tensor(), heads, tables)
                .map(Var::constant),
            _ => rotary_attention(tape, qkv, &self.places(qkv, heads, tables)),
        }
    }

    /// The projection `x Wᵀ`, then RoPE and causal attention.
    pub fn projected_attention(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        heads: Heads,
        tables: &RopeTables,
    ) -> Result<Var> {
        if let Rows::Spans(_) | Rows::Cached(_) = self {
            return self.attention(tape, &linear(tape, x, weight, None)?, heads, tables);
        }
        projected_attention(tape, x, weight, &self.places(x, heads, tables))
    }

    fn places<'a>(&'a self, rows: &Var, heads: Heads, tables: &'a RopeTables) -> Places<'a> {
        let (sequences, first_key) = match self {
            Rows::Equal(sequences) => (sequences, None),
            Rows::Packed(sequences, first_key) => (sequences, Some(first_key)),
            Rows::Spans(_) | Rows::Cached(_) => {
                unreachable!("their rows have places of their own")
            }
        };
        Places {
            heads,
            // Positions continue across the ends of documents, because RoPE depends only on distances.
            sequence: rows.tensor().shape().rows() / sequences,
            tables,
            first_key,
        }
    }
}
