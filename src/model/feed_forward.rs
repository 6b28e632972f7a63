//! The dense SwiGLU feed-forward network, used by dense layers and by shared experts.

use super::parameters::Layout;
use crate::error::Result;
use crate::ops::expert_rows::network;
use crate::tape::{Tape, Var};

/// The indices of the parameters of one SwiGLU network.
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

    /// Returns `down(silu(gate(x)) ⊙ up(x))`.
    pub fn forward(&self, tape: &Tape, weights: &[Var], x: &Var) -> Result<Var> {
        network(tape, [x, &weights[self.gate_up], &weights[self.down]])
    }
}
