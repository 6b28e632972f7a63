//! One optimizer step: micro-batches forward and backward, clipping, update, and the commitment of
//! whatever the routers changed. A step that is not finite is not applied and leaves no trace.

use crate::config::TrainConfig;
use crate::error::Result;
use crate::model::Model;
use crate::optim::{AdamW, gradient_norm};
use crate::routers::{LayerStats, Pass, Phase};
use crate::tape::{Gradients, Tape};

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

    /// The gradients of the last step, before clipping.
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// Trains on `micro_batches`, each `[sequences, S + 1]` tokens of `sequences` sequences, at
    /// learning rate `rate`. The loss is the mean over all of them.
    ///
    /// # Errors
    /// When the tokens do not fit the model, or an operation fails.
    pub fn step(
        &mut self,
        model: &mut Model,
        micro_batches: &[&[i32]],
        sequences: usize,
        rate: f64,
    ) -> Result<StepReport> {
        let share = 1.0 / micro_batches.len() as f64;
        let n = micro_batches.len();
        self.gradients.reset();
        let mut sums = [0.0; 3];
        for (m, tokens) in micro_batches.iter().enumerate() {
            // Ranks hold consecutive parts of the global batch; a sequence of S + 1 trains S tokens.
            let place = model.dist().rank() * n + m;
            let own = tokens.len().saturating_sub(sequences);
            let pass = Pass {
                phase: Phase::Train,
                micro_batches: n,
                step: self.optimizer.steps(),
                first_token: (place * own) as u64,
            };
            let weights = model.weights();
            let tape = Tape::new();
            let losses = model.loss(&tape, &weights, tokens, sequences, pass)?;
            let parts = [losses.cross_entropy, losses.auxiliary, losses.z];
            sums.iter_mut()
                .zip(parts)
                .for_each(|(sum, part)| *sum += share * part);
            tape.backward(&losses.total, share, &mut self.gradients)?;
        }
        let norm = gradient_norm(&self.gradients, model.parameters.len())?;
        let refused = refusal(model, sums[0], norm);
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
                state.take_stats()
            })
            .collect();
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

/// The first thing that is not finite: logits by layer and token, the loss, the gradient.
fn refusal(model: &Model, loss: f64, norm: f64) -> Option<String> {
    let states = model.layer_states();
    let flagged = states
        .iter()
        .enumerate()
        .find_map(|(l, s)| Some((l, s.first_non_finite()?)));
    if let Some((layer, token)) = flagged {
        return Some(format!("router logits of MoE layer {layer}, token {token}"));
    }
    if !loss.is_finite() {
        return Some("the loss".into());
    }
    (!norm.is_finite()).then(|| "the gradient".into())
}
