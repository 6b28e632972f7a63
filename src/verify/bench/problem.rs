//! The kernels of a group of cases as problems on shared buffers.

use crate::tensor::dtype::DType;
use crate::verify::kernels::{Buffer, Errors, Launch, Problem};

/// A group on kernels.
pub struct Kernels {
    /// Every buffer; its launch is all there is to do, once, and leaves what the parts read.
    pub whole: Problem,
    /// One for each case of the group, on the same buffers.
    pub parts: Vec<Problem>,
    /// Buffers whose content is the result: place, name, type.
    pub outputs: Vec<(usize, &'static str, DType)>,
}

/// A launch on the buffers of another problem.
pub fn part(launch: Launch) -> Problem {
    Problem {
        label: String::new(),
        buffers: Vec::new(),
        launch,
        judge: Box::new(|_| Ok(Errors::none(0))),
    }
}

/// `launch` with these buffers of its own.
pub fn whole(label: &str, buffers: Vec<Buffer>, launch: Launch) -> Problem {
    Problem {
        label: label.into(),
        buffers,
        ..part(launch)
    }
}
