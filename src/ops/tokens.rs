//! The check of token ids, shared by the operations that index with them.

use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;

/// Checks, for operation `op`, that `ids` are i32 numbers in `0 .. vocabulary`; `what` is the name of one such number
/// in the error.
pub(crate) fn check(op: &str, what: &str, ids: &Tensor, vocabulary: usize) -> Result<()> {
    ids.expect_dtype(op, what, DType::I32)?;
    let outside = |id: &i32| usize::try_from(*id).map_or(true, |id| id >= vocabulary);
    match ids.slice::<i32>().iter().position(outside) {
        None => Ok(()),
        Some(position) => Err(Error::invalid(
            op,
            format!("every {what} in 0 .. {vocabulary}, the vocabulary"),
            format!("{} at position {position}", ids.slice::<i32>()[position]),
            "tokenize the data for this model's vocabulary",
        )),
    }
}
