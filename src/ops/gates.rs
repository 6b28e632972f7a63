//! The kernels of `kernels/gates.cu` for the gates of the chosen experts A: `w = p / S` on A, 0 off A, S = `Σ_A p` or
//! 1.

use super::dispatch::Dispatch;
use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::gates::{SelectedGates, SelectedGatesBackward};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;

/// The form of the gates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Selected {
    /// Whether they sum to 1 over the chosen experts.
    pub renormalize: bool,
    /// Whether gradients pass to the scores of experts that were not chosen.
    pub through: bool,
}

impl Selected {
    /// Returns the gates `[T, E]` for the scores `p [T, E]`.
    ///
    /// # Errors
    /// Returns an error when the scores are not f32, or a kernel fails.
    pub fn forward(self, p: &Tensor, dispatch: &Dispatch) -> Result<Tensor> {
        p.expect_dtype("gates", "scores", DType::F32)?;
        let mut w = p.unspecified_like();
        let maps = dispatch.maps(p.device())?;
        let kernel = SelectedGates {
            w: w.output()?,
            p: p.input()?,
            slot_row: maps.slot_row.input()?,
            choices: maps.choices.as_ref().map(Tensor::input).transpose()?,
            tokens: p.shape()[0],
            rows: dispatch.num_rows().max(1),
            experts: p.shape()[1],
            slots: maps.slots,
            renormalize: self.renormalize,
        };
        kernel.launch(&Stream::of(p.device())?)?;
        Ok(w)
    }

    /// Returns the gradient of the scores from the gradient of the gates.
    ///
    /// # Errors
    /// The same errors as [`forward`](Self::forward).
    pub fn backward(self, dw: &Tensor, p: &Tensor, dispatch: &Dispatch) -> Result<Tensor> {
        dw.expect_dtype("gates", "the gates' gradient", DType::F32)?;
        let mut dp = p.unspecified_like();
        let maps = dispatch.maps(p.device())?;
        let kernel = SelectedGatesBackward {
            dp: dp.output()?,
            dw: dw.input()?,
            p: p.input()?,
            slot_row: maps.slot_row.input()?,
            choices: maps.choices.as_ref().map(Tensor::input).transpose()?,
            tokens: p.shape()[0],
            rows: dispatch.num_rows().max(1),
            experts: p.shape()[1],
            slots: maps.slots,
            renormalize: self.renormalize,
            through: self.through,
        };
        kernel.launch(&Stream::of(p.device())?)?;
        Ok(dp)
    }
}
