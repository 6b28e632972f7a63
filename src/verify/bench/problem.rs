//! The kernels of a group of cases as launches on shared buffers.

use crate::tensor::dtype::DType;
use crate::verify::kernels::{Buffer, Errors, Launch, Problem};

/// A group of cases that run as kernels.
pub struct Kernels {
    /// The problem with all buffers, whose results are not checked. Its launch does the work of all parts once and writes
    /// the buffers that they read.
    pub whole: Problem,
    /// The launch of each case of the group, on the buffers of `whole`.
    pub parts: Vec<Launch>,
    /// The buffers that hold the results, and their dtypes.
    pub outputs: Vec<(&'static str, DType)>,
}

impl Kernels {
    /// A group whose parts, one after the other, do the whole work.
    pub fn in_order<const N: usize>(
        label: &str,
        buffers: Vec<Buffer>,
        parts: impl Fn() -> [Launch; N],
        outputs: &[(&'static str, DType)],
    ) -> Self {
        let all = parts();
        let launch: Launch = Box::new(move |p, stream| all.iter().try_for_each(|l| l(p, stream)));
        Self::new(label, buffers, launch, parts(), outputs)
    }

    /// A group with a launch for the whole work.
    pub fn new<const N: usize>(
        label: &str,
        buffers: Vec<Buffer>,
        launch: Launch,
        parts: [Launch; N],
        outputs: &[(&'static str, DType)],
    ) -> Self {
        let whole = Problem {
            label: label.into(),
            buffers,
            launch,
            judge: Box::new(|_| Ok(Errors::none(0))),
        };
        Self {
            whole,
            parts: parts.into(),
            outputs: outputs.to_vec(),
        }
    }
}
