//! RoPE and causal attention in one operation, where kernels turn while they have queries and keys at hand.
//!
//! Forward turns them in the epilogue of the projection `qkv = x Wᵀ` (`kernels/qkv_rope.cu`), or, where something stands
//! between projection and RoPE, in a pass of its own (`kernels/rope.cu`). Backward turns dQ and dK back before attention's
//! kernel stores them, so that dqkv is the gradient of what was turned. Mathematically it is
//! [`linear`](fn@linear), [`rope`](fn@rope) and [`attention`] one after another; the CPU does just that.

use super::{attention, kernels};
use crate::device::Device;
use crate::error::Result;
use crate::ops::heads::Heads;
use crate::ops::linear::{self, linear};
use crate::ops::rope::{self, RopeTables, rope};
use crate::tape::{Forward, Grads, Op, Tape, Var, only};
use crate::tensor::Tensor;

/// What attention goes over.
pub struct Places<'a> {
    /// Number and width of the heads.
    pub heads: Heads,
    /// Rows of a sequence.
    pub sequence: usize,
    /// Cosines and sines of the positions.
    pub tables: &'a RopeTables,
    /// `[B·S]` as [`attention`] takes it.
    pub first_key: Option<&'a Tensor>,
}

/// [`rope`](fn@rope), then [`attention`] of `qkv [B·S, (H + 2 KV) hd]`; the result is `[B·S, H hd]`.
///
/// # Errors
/// Those of both.
pub fn rotary_attention(tape: &Tape, qkv: &Var, places: &Places) -> Result<Var> {
    if qkv.tensor().device() == Device::Cpu {
        let turned = rope(tape, qkv, places.heads, places.sequence, places.tables)?;
        return attention(
            tape,
            &turned,
            places.heads,
            places.sequence,
            places.first_key,
        );
    }
    places
        .heads
        .check("attention", qkv.tensor(), places.sequence)?;
    tape.apply_one(RotaryAttention::new(places, false)?, &[qkv])
}

/// The projection `x Wᵀ` to queries, keys and values, then [`rotary_attention`].
///
/// # Errors
/// Those of [`linear`](crate::ops::linear::linear) and [`rotary_attention`].
pub fn projected_attention(tape: &Tape, x: &Var, weight: &Var, places: &Places) -> Result<Var> {
    if x.tensor().device() == Device::Cpu {
        return rotary_attention(tape, &linear(tape, x, weight, None)?, places);
    }
    let (x_shape, heads) = (x.tensor().shape(), places.heads);
    let shape = [heads.row_width(), x_shape.width()];
    weight.tensor().expect_shape("attention", "weight", shape)?;
    tape.apply_one(RotaryAttention::new(places, true)?, &[x, weight])
}

struct RotaryAttention {
    heads: Heads,
    sequence: usize,
    tables: RopeTables,
    first_key: Option<Tensor>,
    /// Whether it begins with the projection.
    projects: bool,
}

impl RotaryAttention {
    fn new(places: &Places, projects: bool) -> Result<Self> {
        Ok(RotaryAttention {
            heads: places.heads,
            sequence: places.sequence,
            tables: places.tables.of(places.sequence, places.heads)?,
            first_key: places.first_key.cloned(),
            projects,
        })
    }
}

impl Op for RotaryAttention {
    fn name(&self) -> &'static str {
        "rotary attention"
    }

    fn runs_on(&self, device: Device) -> bool {
        device != Device::Cpu
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (heads, sequence, tables) = (self.heads, self.sequence, &self.tables);
        let qkv = match self.projects {
            true => kernels::project(inputs[0], inputs[1], tables, heads, sequence)?,
            false => rope::turned(inputs[0], tables, heads, sequence, false)?,
        };
        let [out, lse] = kernels::forward(&qkv, self.first_key.as_ref(), heads, sequence)?;
        let mut saved = vec![qkv, out.clone(), lse];
        if self.projects {
            saved.extend(inputs.iter().map(|&input| input.clone()));
        }
        Ok(Forward {
            outputs: vec![out],
            saved,
        })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
        let (qkv, kept) = (&saved[0], [&saved[1], &saved[2]]);
        let dqkv = kernels::backward(
            only(douts),
            qkv,
            kept,
            self.first_key.as_ref(),
            Some(&self.tables),
            self.heads,
            self.sequence,
        )?;
        match self.projects {
            true => linear::kernels::backward(grads, &saved[3], &saved[4], &dqkv),
            false => grads.give(0, dqkv),
        }
    }
}
