//! Analyzes the default vectors: how similar they are, and how far they are from the current outputs of the experts.

use super::gradients::cosine;
use super::probe::{Seen, Watched};
use crate::config::Config;
use crate::error::Result;
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::routers::{self, Phase};
use crate::tensor::Tensor;

/// Returns the cosine similarity between the rows of `vectors [E, D]`, `[E][E]`; none where a row is zero.
pub fn similarity(vectors: &Tensor) -> Result<Vec<Vec<Option<f64>>>> {
    let width = vectors.shape().width();
    let values = vectors.to_f64()?;
    let rows: Vec<&[f64]> = values.chunks(width).collect();
    Ok(rows
        .iter()
        .map(|a| rows.iter().map(|b| cosine(a, b)).collect())
        .collect())
}

/// Returns `‖m_i − ê_i‖ / ‖m_i‖` of each expert, `[E]`; none for an expert without averaged tokens. `m_i` is the mean
/// output of the expert over the averaged tokens and `ê_i` its default vector.
pub fn drift(seen: &Seen) -> Result<Vec<Option<f64>>> {
    let Some([vectors, means]) = &seen.update else {
        return Ok(Vec::new());
    };
    let width = vectors.shape().width();
    let (vectors, means) = (vectors.to_f64()?, means.to_f64()?);
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let pairs = vectors.chunks(width).zip(means.chunks(width));
    Ok(pairs
        .map(|(vector, mean)| {
            let difference = norm(&mut mean.iter().zip(vector).map(|(m, v)| m - v));
            let relative = difference / norm(&mut mean.iter().copied());
            Some(relative).filter(|r| r.is_finite())
        })
        .collect())
}

/// Returns the [`drift`] of every MoE layer on one training micro-batch, `[MoE layer][E]`; the rows are empty if the
/// router has no default vectors.
pub fn drifts(
    config: &Config,
    source: &Model,
    sequences: Sequences,
) -> Result<Vec<Vec<Option<f64>>>> {
    let watched = Watched::new(config, routers::build(&config.router)?, source)?;
    watched
        .see(sequences, Phase::Train)?
        .iter()
        .map(drift)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dispatch::Selection;

    #[test]
    fn similarities_worked_by_hand() {
        // (3, 4), (4, 3): 24 / 25; (−6, −8) has the opposite direction of the first; a zero row has no direction.
        let vectors = Tensor::from_slice([4, 2], &[3.0, 4.0, 4.0, 3.0, -6.0, -8.0, 0.0, 0.0f64]);
        let found = similarity(&vectors).unwrap();
        for (i, j, expected) in [(0, 0, 1.0), (0, 1, 0.96), (1, 2, -0.96), (0, 2, -1.0)] {
            assert!((found[i][j].unwrap() - expected).abs() <= 1e-15, "{i} {j}");
            assert_eq!(found[i][j], found[j][i]);
        }
        assert_eq!(found[3], [None; 4]);
    }

    #[test]
    fn drift_worked_by_hand() {
        // Expert 0: m = (3, 4), ê = (3, 0): 4 / 5. Expert 1: ê = m. Expert 2 has no averaged token.
        let vectors = Tensor::from_slice([3, 2], &[3.0, 0.0, 1.0, 1.0, 2.0, 2.0f64]);
        let means = Tensor::from_slice([3, 2], &[3.0, 4.0, 1.0, 1.0, 0.0, 0.0f64]);
        let seen = Seen {
            x: Tensor::from_slice([2, 1], &[0.0f64; 2]),
            // Sampled tokens are those that did not choose the expert.
            chosen: Selection::from_choices(&[2, 2], 2, 3).unwrap(),
            update: Some([vectors, means]),
        };
        assert_eq!(drift(&seen).unwrap(), [Some(0.8), Some(0.0), None]);
    }
}
