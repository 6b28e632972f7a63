//! How tokens are routed at evaluation: entropy, frequency, co-activation.

use super::gradients::MicroBatches;
use super::probe::Watched;
use crate::error::Result;
use crate::ops::dispatch::Selection;

/// How one MoE layer routed a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    pub tokens: u64,
    /// Mean entropy of a token's probabilities, in nats.
    pub entropy: f64,
    /// Tokens that chose each expert, `[E]`.
    pub counts: Vec<u64>,
    /// Tokens that chose both experts, `[E][E]`; the diagonal contains the counts.
    pub pairs: Vec<Vec<u64>>,
}

impl Routed {
    /// Returns the share of the (token, expert) pairs of each expert, `[E]`; the shares sum to 1.
    pub fn frequency(&self) -> Vec<Option<f64>> {
        let slots: u64 = self.counts.iter().sum();
        let share = |n: &u64| (slots > 0).then(|| *n as f64 / slots as f64);
        self.counts.iter().map(share).collect()
    }

    /// Returns the share of the tokens of expert i that also chose j, `[i][j]`; none on the diagonal and for an expert
    /// without tokens.
    pub fn co_activation(&self) -> Vec<Vec<Option<f64>>> {
        let row = |(i, pairs): (usize, &Vec<u64>)| {
            let of = self.counts[i];
            let share = |(j, n): (usize, &u64)| (i != j && of > 0).then(|| *n as f64 / of as f64);
            pairs.iter().enumerate().map(share).collect()
        };
        self.pairs.iter().enumerate().map(row).collect()
    }

    /// Encodes the layer as numbers, for other ranks.
    pub fn numbers(&self) -> Vec<f64> {
        let counts = self.counts.iter().chain(self.pairs.iter().flatten());
        let counts = counts.map(|n| *n as f64);
        [self.tokens as f64, self.entropy]
            .into_iter()
            .chain(counts)
            .collect()
    }

    /// Decodes layers with `experts` experts from their [`numbers`](Self::numbers), one layer after another.
    pub fn of_layers(numbers: &[f64], experts: usize) -> Vec<Self> {
        let count = |n: &f64| *n as u64;
        let layer = |numbers: &[f64]| {
            let (counts, pairs) = numbers[2..].split_at(experts);
            let pairs = pairs.chunks(experts);
            Routed {
                tokens: count(&numbers[0]),
                entropy: numbers[1],
                counts: counts.iter().map(count).collect(),
                pairs: pairs.map(|row| row.iter().map(count).collect()).collect(),
            }
        };
        let length = 2 + experts + experts * experts;
        numbers.chunks(length).map(layer).collect()
    }

    fn add(&mut self, selection: &Selection) {
        let experts = selection.num_experts();
        self.tokens += selection.num_tokens() as u64;
        self.counts.resize(experts, 0);
        self.pairs.resize(experts, vec![0; experts]);
        for token in 0..selection.num_tokens() {
            let chosen = selection.experts(token);
            for &i in chosen {
                self.counts[i as usize] += 1;
                for &j in chosen {
                    self.pairs[i as usize][j as usize] += 1;
                }
            }
        }
    }
}

/// Routes the batch in every MoE layer, as at evaluation.
pub fn routed(watched: &Watched, batch: &MicroBatches) -> Result<Vec<Routed>> {
    let model = &watched.model;
    let mut layers = vec![Routed::default(); model.layer_states().len()];
    for sequences in batch.parts() {
        model.token_losses(sequences)?;
        for (layer, seen) in layers.iter_mut().zip(watched.take()) {
            layer.add(&seen.chosen);
        }
    }
    for (layer, state) in layers.iter_mut().zip(model.layer_states_mut().iter_mut()) {
        let stats = state.take_stats();
        layer.entropy = stats.entropy / stats.tokens;
    }
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequency_and_co_activation_worked_by_hand() {
        // Four tokens of K = 2 among four experts: {0, 1}, {0, 1}, {0, 2}, {1, 2}; none chose 3.
        let choices = [0, 1, 0, 1, 0, 2, 1, 2];
        let mut layer = Routed::default();
        layer.add(&Selection::from_choices(&choices, 4, 4).unwrap());
        assert_eq!((layer.tokens, &layer.counts), (4, &vec![3, 3, 2, 0]));
        let part = |n: f64, of: f64| Some(n / of);
        assert_eq!(
            layer.frequency(),
            [part(3.0, 8.0), part(3.0, 8.0), part(2.0, 8.0), Some(0.0)]
        );
        assert_eq!(
            layer.co_activation(),
            [
                vec![None, part(2.0, 3.0), part(1.0, 3.0), Some(0.0)],
                vec![part(2.0, 3.0), None, part(1.0, 3.0), Some(0.0)],
                vec![part(1.0, 2.0), part(1.0, 2.0), None, Some(0.0)],
                vec![None; 4],
            ]
        );
        layer.entropy = 0.1 + 0.2;
        let layers = [layer.clone(), layer];
        let numbers: Vec<f64> = layers.iter().flat_map(Routed::numbers).collect();
        assert_eq!(Routed::of_layers(&numbers, 4), layers);
    }
}
