//! The kernels of `kernels/gates.cu` for gates of chosen experts: `w = p / S` on A, 0 off it, S = `Σ_A p` or 1.

use super::dispatch::Dispatch;
use crate::device::stream;
use crate::error::Result;
use crate::launch;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use std::ptr::null;

/// Which gates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Selected {
    /// Whether they sum to 1 over the chosen experts.
    pub renormalize: bool,
    /// Whether gradients pass to the scores of experts that were not chosen.
    pub through: bool,
}

impl Selected {
    /// Gates `[T, E]` of the scores `p [T, E]`.
    ///
    /// # Errors
    /// When the scores are not f32, or a kernel fails.
    pub fn forward(self, p: &Tensor, dispatch: &Dispatch) -> Result<Tensor> {
        p.expect_dtype("gates", "scores", DType::F32)?;
        let mut w = p.unspecified_like();
        let maps = dispatch.maps(p.device())?;
        // SAFETY: the tensors have the shapes that gates.cu's header names.
        unsafe {
            launch!(
                p.device().launchers()?,
                selected_gates(
                    w.pointer_mut(),
                    p.pointer(),
                    maps.slot_row.pointer(),
                    maps.choices.as_ref().map_or(null(), Tensor::pointer),
                    p.shape()[0] as i64,
                    dispatch.num_rows().max(1) as i64,
                    p.shape()[1] as i32,
                    maps.slots as i32,
                    self.renormalize.into(),
                    stream(),
                )
            )
        }?;
        Ok(w)
    }

    /// The gradient of the scores from that of the gates.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(self, dw: &Tensor, p: &Tensor, dispatch: &Dispatch) -> Result<Tensor> {
        dw.expect_dtype("gates", "the gates' gradient", DType::F32)?;
        let mut dp = p.unspecified_like();
        let maps = dispatch.maps(p.device())?;
        // SAFETY: as in forward.
        unsafe {
            launch!(
                p.device().launchers()?,
                selected_gates_backward(
                    dp.pointer_mut(),
                    dw.pointer(),
                    p.pointer(),
                    maps.slot_row.pointer(),
                    maps.choices.as_ref().map_or(null(), Tensor::pointer),
                    p.shape()[0] as i64,
                    dispatch.num_rows().max(1) as i64,
                    p.shape()[1] as i32,
                    maps.slots as i32,
                    self.renormalize.into(),
                    self.through.into(),
                    stream(),
                )
            )
        }?;
        Ok(dp)
    }
}
