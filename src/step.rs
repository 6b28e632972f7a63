//! One optimizer step: micro-batches forward and backward, clipping, update, and the commitment of
//! whatever the routers changed. A step that is not finite is not applied and leaves no trace.
//!
//! On several ranks micro-batch m of the step is cut into equal, consecutive parts
//! ([`Collective::part`]); losses, gradients and statistics are those of the global batch, and all
//! ranks make the same update, or refuse it for the same reason.

use crate::config::TrainConfig;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::optim::{AdamW, gradient_norm};
use crate::routers::{LayerStats, Pass, Phase};
use crate::tape::{Gradients, Tape};
use std::cmp::Ordering;

/// What a step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Mean cross-entropy over the global batch, in nats.
    pub cross_entropy: f64,
    pub auxiliary: f64,
    pub z: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// What was not finite, if the step was not applied.
    pub refused: Option<String>,
    /// Routing statistics of every MoE layer.
    pub layers: Vec<LayerStats>,
}

/// What changes from step to step beside the model: optimizer and gradient memory.
pub struct Trainer {
    pub optimizer: AdamW,
    gradients: Gradients,
    clip: f64,
}

impl Trainer {
    pub fn new(config: &TrainConfig, model: &Model) -> Self {
        Trainer {
            optimizer: AdamW::new(config, &model.parameters),
            gradients: Gradients::new(model.parameters.len()),
            clip: config.gradient_clip,
        }
    }

    /// The gradients of the last step, of the global batch, before clipping.
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// Trains on `micro_batches`, each `[sequences, S + 1]` tokens of `sequences` sequences, this
    /// rank's part of them, at learning rate `rate`. The loss is the mean over all of them.
    ///
    /// # Errors
    /// When the tokens do not fit the model, the ranks do not share them equally, or an operation
    /// fails.
    pub fn step(
        &mut self,
        model: &mut Model,
        micro_batches: &[&[i32]],
        sequences: usize,
        rate: f64,
    ) -> Result<StepReport> {
        let n = micro_batches.len();
        let (rank, ranks) = (model.dist().rank(), model.dist().size());
        equal_shares(model.dist(), micro_batches, sequences)?;
        let share = 1.0 / (n * ranks) as f64;
        self.gradients.reset();
        let mut sums = [0.0; 3];
        let weights = model.weights();
        for (m, tokens) in micro_batches.iter().enumerate() {
            // The ranks' parts of a micro-batch follow one another; a sequence of S + 1 trains S tokens.
            let place = m * ranks + rank;
            let own = tokens.len().saturating_sub(sequences);
            let pass = Pass {
                phase: Phase::Train,
                micro_batches: n,
                step: self.optimizer.steps(),
                first_token: (place * own) as u64,
            };
            let tape = Tape::new();
            let losses = model.loss(&tape, &weights, tokens, sequences, pass)?;
            let parts = [losses.cross_entropy, losses.auxiliary, losses.z];
            sums.iter_mut()
                .zip(parts)
                .for_each(|(sum, part)| *sum += share * part);
            tape.backward(&losses.total, share, &mut self.gradients)?;
        }
        drop(weights); // else the update would copy what they share
        model.dist().sum(&mut sums)?;
        sum_gradients(model, &mut self.gradients)?;
        let norm = gradient_norm(&self.gradients, model.parameters.len())?;
        let refused = refusal(model, sums[0], norm)?;
        if refused.is_none() {
            let scale = if self.clip > 0.0 && norm > self.clip {
                self.clip / norm
            } else {
                1.0
            };
            self.optimizer
                .update(&mut model.parameters, &self.gradients, rate, scale)?;
            model.end_step()?;
        }
        let mut states = model.layer_states_mut();
        let layers = states
            .iter_mut()
            .map(|state| {
                if refused.is_none() {
                    state.commit()
                } else {
                    state.discard()
                }
                state.take_stats().over_ranks(model.dist())
            })
            .collect::<Result<_>>()?;
        let [cross_entropy, auxiliary, z] = sums;
        Ok(StepReport {
            cross_entropy,
            auxiliary,
            z,
            gradient_norm: norm,
            refused,
            layers,
        })
    }
}

/// Refuses micro-batches whose equal weight would not make the mean over the global batch.
fn equal_shares(dist: &dyn Collective, micro_batches: &[&[i32]], sequences: usize) -> Result<()> {
    let own = [micro_batches.len(), sequences];
    let all = dist.gather(&own.map(|n| n as f64))?;
    if all.chunks(2).all(|rank| rank == own.map(|n| n as f64)) {
        return Ok(());
    }
    Err(Error::invalid(
        "step",
        "equally many micro-batches and sequences on every rank",
        format!("(micro-batches, sequences) by rank: {all:?}"),
        "give every rank its part of each micro-batch, as Collective::part does",
    ))
}

/// Sums the gradients over the ranks.
fn sum_gradients(model: &Model, gradients: &mut Gradients) -> Result<()> {
    let dist = model.dist();
    if dist.size() == 1 {
        return Ok(());
    }
    for (i, parameter) in model.parameters.iter().enumerate() {
        // A rank without a gradient counts with zeros.
        gradients
            .get_or_zeros(i, &parameter.value)
            .sum_over_ranks(dist)?;
    }
    Ok(())
}

/// The first thing that is not finite on any rank: logits by layer and token, the loss, the
/// gradient.
fn refusal(model: &Model, loss: f64, norm: f64) -> Result<Option<String>> {
    let states = model.layer_states();
    let flagged = states
        .iter()
        .enumerate()
        .find_map(|(l, s)| Some([l as f64, s.first_non_finite()? as f64]));
    let all = model
        .dist()
        .gather(&flagged.unwrap_or([f64::INFINITY; 2]))?;
    let first = all.chunks(2).map(|f| (f[0], f[1]));
    let first = first.min_by(|a, b| a.partial_cmp(b).unwrap_or(Ordering::Equal));
    Ok(match first {
        Some((layer, token)) if layer.is_finite() => {
            Some(format!("router logits of MoE layer {layer}, token {token}"))
        }
        _ if !loss.is_finite() => Some("the loss".into()),
        _ => (!norm.is_finite()).then(|| "the gradient".into()),
    })
}
