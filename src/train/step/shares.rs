//! Communication between the hosts of the ranks in a step: the shape of its micro-batches, and the gradients if the
//! optimizer is not sharded.

use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::tape::Gradients;
use crate::tensor::Tensor;

/// Returns the number of micro-batches, and the smallest and largest number of sequences of one.
pub fn shape_of(micro_batches: &[Sequences]) -> [usize; 3] {
    let sequences = micro_batches.iter().map(|m| m.count);
    let (least, most) = (sequences.clone().min(), sequences.max());
    [micro_batches.len(), least.unwrap_or(0), most.unwrap_or(0)]
}

/// Checks that the micro-batches of all ranks have the same shape. Otherwise equal weights would not give the mean
/// over the global batch.
///
/// # Errors
/// Returns an error when shapes differ.
pub fn equal_shares(dist: &dyn Collective, shape: [usize; 3]) -> Result<()> {
    let own = shape.map(|n| n as f64);
    let all = dist.gather(&own)?;
    if own[1] == own[2] && all.chunks(3).all(|rank| rank == own) {
        return Ok(());
    }
    Err(Error::invalid(
        "step",
        "equally many micro-batches and sequences on every rank",
        format!("(micro-batches, fewest and most sequences) by rank: {all:?}"),
        "pass to every rank its part of each micro-batch, see Collective::part",
    ))
}

/// Sums the gradients over the ranks.
///
/// # Errors
/// Returns an error when a rank has left.
pub fn sum_gradients(model: &Model, gradients: &mut Gradients) -> Result<()> {
    let dist = model.dist();
    if dist.size() == 1 {
        return Ok(());
    }
    for (i, parameter) in model.parameters.iter().enumerate() {
        let value = &parameter.value;
        // A rank without a gradient contributes zeros.
        let zeros = || Tensor::zeros(value.device(), value.dtype(), value.shape());
        gradients.get_or(i, zeros).sum_over_ranks(dist)?;
    }
    Ok(())
}
