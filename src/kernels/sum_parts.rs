//! `kernels/sum_parts.cu`: `out = or += Σ_p parts[p]`, p ascending; joins the parts of a weight gradient.

use super::cost::Cost;
use super::{In, Out, kernel};

kernel! {
    /// `out = or += Σ_p parts[p]`.
    pub struct SumParts = sum_parts {
        /// `[elements]`, assigned, or added to.
        out: Out<'a, f32> [elements];
        /// `[count, elements]`.
        parts: In<'a, f32> [count * elements];
        /// Parts.
        count: usize;
        /// A multiple of 8.
        elements: usize;
        /// Whether `out` is added to, or assigned.
        accumulate: bool;
    }
}

impl SumParts<'_> {
    /// Each part read and the sum written; additions are not counted.
    pub fn cost(count: usize, elements: usize) -> Cost {
        Cost::new(0, 4 * (count + 1) * elements)
    }
}
