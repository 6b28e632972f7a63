//! The dense SwiGLU feed-forward network: of dense layers and of shared experts.

use super::parameters::Layout;
use crate::device::Device;
use crate::error::Result;
use crate::ops::expert_rows::network;
use crate::ops::linear::linear;
use crate::ops::swiglu::swiglu;
use crate::tape::{Tape, Var};

/// Where the parameters of one SwiGLU network are.
pub struct SwigluSlots {
    /// `[2F, D]`: gate above up.
    pub gate_up: usize,
    /// `[D, F]`.
    pub down: usize,
}

impl SwigluSlots {
    pub fn new(layout: &mut Layout, prefix: &str, hidden: usize, width: usize) -> Self {
        let parts = ["gate", "up"].map(|m| (format!("{prefix}.{m}_proj.weight"), width));
        SwigluSlots {
            gate_up: layout.stacked(&format!("{prefix}.gate_up_proj.weight"), &parts, hidden),
            down: layout.residual(&format!("{prefix}.down_proj.weight"), &[hidden, width]),
        }
    }

    /// `down(silu(gate(x)) ⊙ up(x))`.
    pub fn forward(&self, tape: &Tape, weights: &[Var], x: &Var) -> Result<Var> {
        let (gate_up, down) = (&weights[self.gate_up], &weights[self.down]);
        if x.tensor().device() == Device::Cpu {
            return network(tape, [x, gate_up, down]);
        }
        let h = linear(tape, x, gate_up, None)?;
        linear(tape, &swiglu(tape, &h)?, down, None)
    }
}
