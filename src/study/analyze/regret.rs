//! Route regret: the loss that a token would have had if a layer had sent it to another expert.
//!
//! For a sample of held-out tokens and one MoE layer at a time, the least probable of a token's K experts is replaced
//! by each expert that was not chosen, with that expert's own gate; the rest of the model is computed from the changed
//! output. A pass reroutes one token of each sequence, so that the other tokens of the sequence change only because of
//! it.

use super::gradients::{MicroBatches, estimator, layer_weights, own_method};
use super::probe::{Seen, Watched};
use super::shares::shared_out;
use crate::config::Config;
use crate::dist::Collective;
use crate::error::Result;
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::ops::dispatch::Selection;
use crate::routers::{Pass, Phase};
use crate::tensor::Tensor;
use crate::tensor::random::{Purpose, Stream};

/// Smallest number of tokens that are rerouted in each layer, and largest number of sequences that they come from.
pub const SAMPLED: usize = 32;

/// The losses of one rerouted token at one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Rerouted {
    /// With the experts that the router chose.
    pub chosen: Loss,
    /// With each expert that was not chosen, the most probable first.
    pub others: Vec<Loss>,
}

/// Losses of one token in one forward pass, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Loss of the next token.
    pub own: f64,
    /// Sum of the losses from this token to the end of the sequence.
    pub from_here: f64,
}

impl Rerouted {
    /// Encodes it as numbers, for other ranks: two for each [`Loss`].
    fn numbers(&self) -> Vec<f64> {
        let losses = [&self.chosen].into_iter().chain(&self.others);
        losses.flat_map(|l| [l.own, l.from_here]).collect()
    }

    /// Decodes it from its numbers.
    fn of(numbers: &[f64]) -> Self {
        let loss = |l: &[f64]| Loss {
            own: l[0],
            from_here: l[1],
        };
        Rerouted {
            chosen: loss(numbers),
            others: numbers[2..].chunks(2).map(loss).collect(),
        }
    }
}

/// Means over the tokens of a layer, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Regret {
    pub tokens: usize,
    /// Loss of the next token with the chosen expert and with the runner-up, the mean of the losses with the other
    /// experts, and the smallest of them.
    pub chosen: f64,
    pub runner_up: f64,
    pub mean_other: f64,
    pub best_other: f64,
    /// Share of the tokens for which another expert gives a lower loss.
    pub better: f64,
    /// Mean over tokens of `max(0, chosen − best other)`, for the next token, and for the rest of the sequence.
    pub regret: f64,
    pub regret_from_here: f64,
}

impl Regret {
    /// Computes the means over the tokens of a layer; all zeros without tokens.
    pub fn of(tokens: &[Rerouted]) -> Self {
        let n = tokens.len().max(1) as f64;
        let mean = |f: &dyn Fn(&Rerouted) -> f64| tokens.iter().map(f).sum::<f64>() / n;
        let least = |t: &Rerouted, f: fn(&Loss) -> f64| {
            t.others.iter().map(f).fold(f64::INFINITY, f64::min)
        };
        let missed = |t: &Rerouted, f: fn(&Loss) -> f64| (f(&t.chosen) - least(t, f)).max(0.0);
        Regret {
            tokens: tokens.len(),
            chosen: mean(&|t| t.chosen.own),
            runner_up: mean(&|t| t.others[0].own),
            mean_other: mean(&|t| {
                t.others.iter().map(|o| o.own).sum::<f64>() / t.others.len() as f64
            }),
            best_other: mean(&|t| least(t, |l| l.own)),
            better: mean(&|t| f64::from(least(t, |l| l.own) < t.chosen.own)),
            regret: mean(&|t| missed(t, |l| l.own)),
            regret_from_here: mean(&|t| missed(t, |l| l.from_here)),
        }
    }
}

/// Returns the rerouted tokens of every MoE layer, `[MoE layer][token]`; no tokens if every expert is chosen.
pub fn reroute(
    dist: &dyn Collective,
    config: &Config,
    source: &Model,
    vectors: &[Tensor],
    batch: &MicroBatches,
) -> Result<Vec<Vec<Rerouted>>> {
    let (top_k, experts) = (config.model.top_k, config.model.num_experts);
    let router = own_method(config)?.router(config)?;
    let watched = estimator(config, source, vectors, router, top_k)?;
    let mut found = vec![Vec::new(); vectors.len()];
    if top_k >= experts {
        return Ok(found);
    }
    let rounds = SAMPLED.div_ceil(batch.all.sequences.max(1));
    let mut first = 0;
    for sequences in batch.parts() {
        let length = sequences.length()?;
        let (base, seen) = losses(&watched, sequences)?;
        let passes = shared_out(dist, found.len() * rounds, |i| {
            let (layer, round) = (i / rounds, i % rounds);
            let draws = Stream::new(config.train.seed, Purpose::Check, 0, layer);
            // A position in each sequence, drawn with the index of the sequence in the whole batch.
            let place = |s: usize| {
                let index = (first + s) * rounds + round;
                s * length + draws.bits(index as u64)[0] as usize % length
            };
            let places: Vec<usize> = (0..sequences.count).map(place).collect();
            let pass = Round {
                watched: &watched,
                sequences,
                layer,
                places: &places,
            };
            let rerouted = pass.run(&base, &seen[layer])?;
            Ok(rerouted.iter().flat_map(Rerouted::numbers).collect())
        })?;
        for (i, numbers) in passes.iter().enumerate() {
            let tokens = numbers.chunks(2 * (1 + experts - top_k));
            found[i / rounds].extend(tokens.map(Rerouted::of));
        }
        first += sequences.count;
    }
    Ok(found)
}

/// Returns the loss of every token, and the records of the layers.
fn losses(watched: &Watched, sequences: Sequences<'_>) -> Result<(Vec<f64>, Vec<Seen>)> {
    let losses = watched
        .model
        .token_losses_in(sequences, Pass::single(Phase::Frozen))?;
    Ok((losses, watched.take()))
}

/// One token of every sequence, rerouted at one layer.
struct Round<'a> {
    watched: &'a Watched,
    sequences: Sequences<'a>,
    layer: usize,
    /// The row in the batch of the rerouted token of each sequence.
    places: &'a [usize],
}

impl Round<'_> {
    fn run(&self, base: &[f64], seen: &Seen) -> Result<Vec<Rerouted>> {
        let length = self.sequences.length()?;
        let at = |losses: &[f64], row: usize| Loss {
            own: losses[row],
            from_here: losses[row..(row / length + 1) * length].iter().sum(),
        };
        let orders = self.orders(seen)?;
        let mut found: Vec<Rerouted> = self
            .places
            .iter()
            .map(|row| Rerouted {
                chosen: at(base, *row),
                others: Vec::new(),
            })
            .collect();
        for other in 0..orders.first().map_or(0, |o| o.others.len()) {
            let selection = self.rerouted(&seen.chosen, &orders, other)?;
            let force = |selection| {
                self.watched.model.layer_states_mut()[self.layer].force(selection);
            };
            force(Some(selection));
            let changed = losses(self.watched, self.sequences);
            force(None);
            let (changed, _) = changed?;
            for (found, row) in found.iter_mut().zip(self.places) {
                found.others.push(at(&changed, *row));
            }
        }
        Ok(found)
    }

    /// Returns for each place the expert to replace, and the experts that were not chosen, the most probable first.
    fn orders(&self, seen: &Seen) -> Result<Vec<Order>> {
        let weights = layer_weights(&self.watched.model)?[self.layer];
        let z = weights.logits(&seen.x)?.to_f64()?;
        let experts = seen.chosen.num_experts();
        let order = |row: &usize| {
            let z = &z[row * experts..(row + 1) * experts];
            let mut by_logit: Vec<usize> = (0..experts).collect();
            // The sort is stable: of equal logits the lower expert comes first, as in the routers.
            by_logit.sort_by(|a, b| z[*b].total_cmp(&z[*a]));
            let is_chosen = |e: &usize| seen.chosen.experts(*row).contains(&(*e as i32));
            let (chosen, others): (Vec<usize>, Vec<usize>) =
                by_logit.into_iter().partition(is_chosen);
            Order {
                replaced: chosen.last().copied(),
                others,
            }
        };
        Ok(self.places.iter().map(order).collect())
    }

    /// Returns the choices, where the least probable chosen expert of each place is replaced by the `other`-th expert
    /// that was not chosen.
    fn rerouted(&self, chosen: &Selection, orders: &[Order], other: usize) -> Result<Selection> {
        Selection::new(chosen.num_tokens(), chosen.num_experts(), |token, list| {
            let first = list.len();
            list.extend_from_slice(chosen.experts(token));
            if let Some(i) = self.places.iter().position(|row| *row == token) {
                let Order { replaced, others } = &orders[i];
                for e in &mut list[first..] {
                    if Some(*e as usize) == *replaced {
                        *e = others[other] as i32;
                    }
                }
                list[first..].sort_unstable();
            }
        })
    }
}

struct Order {
    replaced: Option<usize>,
    others: Vec<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_over_tokens_worked_by_hand() {
        let loss = |own, from_here| Loss { own, from_here };
        let tokens = [
            Rerouted {
                chosen: loss(2.0, 10.0),
                others: vec![loss(3.0, 9.0), loss(1.5, 12.0)],
            },
            Rerouted {
                chosen: loss(1.0, 4.0),
                others: vec![loss(2.0, 5.0), loss(4.0, 6.0)],
            },
        ];
        let expected = Regret {
            tokens: 2,
            chosen: 1.5,
            runner_up: 2.5,
            mean_other: (2.25 + 3.0) / 2.0,
            best_other: (1.5 + 2.0) / 2.0,
            better: 0.5,
            regret: 0.25,
            regret_from_here: 0.5,
        };
        assert_eq!(Regret::of(&tokens), expected);
        assert_eq!(Regret::of(&[]), Regret::default());
    }
}
