//! The probabilities that a model assigns to given tokens.

use super::Model;
use super::rows::Rows;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::linear::linear;
use crate::ops::spans::Spans;
use crate::routers::Pass;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::cpu::vector::{exp_and_sum, max};
use crate::tensor::dtype::Real;
use crate::with_real;
use rayon::prelude::*;
use std::rc::Rc;

/// Number of logits that exist at a time.
const LOGITS: usize = 1 << 24;

/// The model's score of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// ln p, in nats.
    pub log_probability: f64,
    /// Whether the token is the likeliest; of equally likely tokens, the lowest id is the likeliest.
    pub likeliest: bool,
}

impl Model {
    /// Scores `targets`, pairs of a row and a token that may follow it, in an evaluation pass. The rows hold
    /// `tokens`, divided into sequences by `spans`. The output head is computed only for the rows in `targets`.
    ///
    /// # Errors
    /// Returns an error when a row or a token is out of range, a sequence too long, or a score not finite.
    pub fn score(
        &self,
        tokens: &[i32],
        spans: Spans,
        targets: &[(usize, i32)],
    ) -> Result<Vec<Scored>> {
        let (width, vocabulary) = (self.config().hidden, self.config().vocab_size);
        let outside = |&&(row, t): &&(usize, i32)| {
            row >= tokens.len() || !(0..vocabulary as i32).contains(&t)
        };
        if let Some((row, token)) = targets.iter().find(outside) {
            return Err(Error::invalid(
                "score",
                format!("rows below {} and tokens below {vocabulary}", tokens.len()),
                format!("row {row}, token {token}"),
                "use the model's own tokenizer",
            ));
        }
        let (weights, tape) = (self.weights(), Tape::without_gradients());
        let rows = Rows::Spans(Rc::new(spans));
        let ids = Tensor::from_slice([tokens.len()], tokens);
        let (hidden, _) = self
            .transformer
            .hidden(&tape, &weights, &ids, &rows, Pass::EVALUATE)?;
        let hidden = hidden.tensor().widened();
        let head = Var::constant(
            weights[self.transformer.head]
                .tensor()
                .widened()
                .on(Device::Cpu),
        );
        let mut found = Vec::with_capacity(targets.len());
        with_real!(self.dtype(), "score", |T| {
            for targets in targets.chunks((LOGITS / vocabulary).max(1)) {
                let mut x = Tensor::unspecified(Device::Cpu, self.dtype(), [targets.len(), width]);
                let to = x.slice_mut::<T>().chunks_exact_mut(width);
                for (to, (row, _)) in to.zip(targets) {
                    to.copy_from_slice(&hidden.slice::<T>()[row * width..][..width]);
                }
                let logits = linear(&tape, &Var::constant(x), &head, None)?;
                let mut logits = logits.tensor().clone();
                let rows = logits.slice_mut::<T>().par_chunks_exact_mut(vocabulary);
                found.par_extend(rows.zip(targets).map(|(row, (_, target))| {
                    let largest = max(row);
                    let of_target = row[*target as usize];
                    let likeliest = row.iter().position(|z| *z == largest);
                    let sum = exp_and_sum(row, T::of(1.0), largest);
                    Scored {
                        log_probability: (of_target - largest).f64() - sum.f64().ln(),
                        likeliest: likeliest == Some(*target as usize),
                    }
                }));
            }
            Ok(())
        })?;
        match found.iter().all(|s| s.log_probability.is_finite()) {
            true => Ok(found),
            false => Err(Error::NonFinite {
                what: "the probability of a token".into(),
                help: "the model diverged: use an earlier checkpoint".into(),
            }),
        }
    }
}
