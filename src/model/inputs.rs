//! A micro-batch in the memory from which the model reads it.

use super::rows::Rows;
use crate::device::Device;
use crate::error::Result;
use crate::model::batch::Sequences;
use crate::ops::tokens;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;

/// Input tokens, the tokens that follow them, and how they divide into sequences.
pub struct Inputs {
    device: Device,
    /// `[sequences · S]` each, i32.
    pub(super) ids: Tensor,
    pub(super) targets: Tensor,
    pub(super) rows: Rows,
}

impl Inputs {
    /// Builds the inputs from `sequences`, for a model on `device`.
    ///
    /// # Errors
    /// Returns an error when [`Sequences::length`] does.
    pub fn new(sequences: Sequences, device: Device) -> Result<Self> {
        let length = sequences.length()?;
        let empty = || Tensor::unspecified(device, DType::I32, [sequences.count * length]);
        let mut inputs = Inputs {
            device,
            ids: empty(),
            targets: empty(),
            rows: Rows::new(sequences, device),
        };
        inputs.fill(sequences.tokens, length);
        Ok(inputs)
    }

    /// Replaces the sequences. If their number and length are the same, the memory is reused.
    ///
    /// # Errors
    /// Returns an error when [`Sequences::length`] does.
    pub fn set(&mut self, sequences: Sequences) -> Result<()> {
        let length = sequences.length()?;
        if self.ids.elements() != sequences.count * length || !self.rows.set(sequences) {
            *self = Inputs::new(sequences, self.device)?;
        } else {
            self.fill(sequences.tokens, length);
        }
        Ok(())
    }

    fn fill(&mut self, tokens: &[i32], length: usize) {
        let rows = tokens.chunks(length + 1);
        let ids = self.ids.slice_mut::<i32>().chunks_mut(length);
        let targets = self.targets.slice_mut::<i32>().chunks_mut(length);
        for ((row, ids), targets) in rows.zip(ids).zip(targets) {
            ids.copy_from_slice(&row[..length]);
            targets.copy_from_slice(&row[1..]);
        }
    }

    /// Returns the number of input tokens, which is also the number of predicted tokens.
    pub fn tokens(&self) -> usize {
        self.ids.elements()
    }

    /// Checks that all tokens are in the vocabulary. A replayed step does not check this itself.
    ///
    /// # Errors
    /// Returns an error when a token is not in `0 .. vocabulary`.
    pub fn check(&self, vocabulary: usize) -> Result<()> {
        tokens::check("embedding", "token", &self.ids, vocabulary)?;
        tokens::check("cross_entropy", "target", &self.targets, vocabulary)
    }

    /// Copies the inputs to a device with kernels. Returns the numbers of sequences and tokens, and the addresses.
    pub(crate) fn places(&self) -> [usize; 5] {
        let place = |tensor: &Tensor| tensor.pointer::<i32>() as usize;
        let first_key = self.rows.first_key().map_or(0, place);
        let [ids, targets] = [&self.ids, &self.targets].map(place);
        [self.rows.count(), self.tokens(), ids, targets, first_key]
    }
}
