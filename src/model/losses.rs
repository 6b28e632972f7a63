//! The losses of a micro-batch: cross-entropy, and the balance losses of all MoE layers.

use super::context::Context;
use super::moe::BalanceLosses;
use crate::config::Reduction;
use crate::error::Result;
use crate::ops::balance::weighted_sum;
use crate::ops::cross_entropy::cross_entropy;
use crate::routers::Balance;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The losses of one micro-batch, scalars on the tape.
pub struct Losses {
    /// Cross-entropy plus weighted auxiliary and z-loss.
    pub total: Var,
    /// Mean cross-entropy of the next token, in nats.
    pub cross_entropy: Var,
    /// The auxiliary loss, multiplied by its coefficient and reduced over layers, if there is one.
    pub auxiliary: Option<Var>,
    /// The z-loss, multiplied by its coefficient and reduced over layers, if there is one.
    pub z: Option<Var>,
}

impl Losses {
    /// Returns cross-entropy, auxiliary loss and z-loss as numbers (0 for an absent loss). Waits for the kernels that
    /// compute them.
    ///
    /// # Errors
    /// Returns an error when a loss is not real.
    pub fn parts(&self) -> Result<[f64; 3]> {
        let number = |loss: Option<&Var>| loss.map_or(Ok(0.0), |loss| loss.tensor().item());
        Ok([
            number(Some(&self.cross_entropy))?,
            number(self.auxiliary.as_ref())?,
            number(self.z.as_ref())?,
        ])
    }
}

/// Computes the cross-entropy of `targets`, the balance losses, and their weighted sum.
pub fn losses(
    context: &Context,
    tape: &Tape,
    hidden: &Var,
    head: &Var,
    targets: &Tensor,
    balance: &[BalanceLosses],
) -> Result<Losses> {
    let tokens = targets.elements() as f64;
    let cross = cross_entropy(tape, hidden, head, targets, tokens)?;
    let layers = match context.balance.aux_reduction {
        Reduction::Mean => balance.len().max(1) as f64,
        Reduction::Sum => 1.0,
    };
    let aux_scale = match context.router.balance() {
        Balance::Own => 1.0,
        _ => context.balance.aux_coefficient / layers,
    };
    let z_scale = context.balance.z_coefficient / layers;
    let auxiliary = balance.iter().filter_map(|l| l.auxiliary.as_ref());
    let z = balance.iter().filter_map(|l| l.z.as_ref());
    let auxiliary = scaled_sum(tape, auxiliary, aux_scale)?;
    let z = scaled_sum(tape, z, z_scale)?;
    let terms = [Some(&cross), auxiliary.as_ref(), z.as_ref()];
    let terms: Vec<_> = terms.into_iter().flatten().map(|t| (t, 1.0)).collect();
    Ok(Losses {
        total: match &terms[..] {
            [_] => cross.clone(),
            terms => weighted_sum(tape, terms)?,
        },
        cross_entropy: cross,
        auxiliary,
        z,
    })
}

/// Returns the sum of the losses multiplied by `scale`, if there are any losses.
fn scaled_sum<'v>(
    tape: &Tape,
    losses: impl Iterator<Item = &'v Var>,
    scale: f64,
) -> Result<Option<Var>> {
    let terms: Vec<_> = losses.map(|loss| (loss, scale)).collect();
    if terms.is_empty() {
        return Ok(None);
    }
    weighted_sum(tape, &terms).map(Some)
}
