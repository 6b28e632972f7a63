//! The kernels of a group of cases as problems on shared buffers.

use crate::tensor::dtype::DType;
use crate::verify::kernels::{Buffer, Errors, Launch, Problem};

/// A group of cases that run as kernels.
pub struct Kernels {
    /// The problem with all buffers. Its launch does the work of all parts once and writes the buffers that they read.
    pub whole: Problem,
    /// One problem for each case of the group, on the buffers of `whole`.
    pub parts: Vec<Problem>,
    /// Buffers that hold the results: index, name, dtype.
    pub outputs: Vec<(usize, &'static str, DType)>,
}

/// Returns a problem without buffers, whose launch uses the buffers of another problem.
pub fn part(launch: Launch) -> Problem {
    Problem {
        label: String::new(),
        buffers: Vec::new(),
        launch,
        judge: Box::new(|_| Ok(Errors::none(0))),
    }
}

/// Returns a problem with its own buffers.
pub fn whole(label: &str, buffers: Vec<Buffer>, launch: Launch) -> Problem {
    Problem {
        label: label.into(),
        buffers,
        ..part(launch)
    }
}
