//! `kernels/sum_parts.cu`: `out = Σ_p parts[p]` or `out += Σ_p parts[p]`, p ascending; adds the parts of a weight
//! gradient.

use super::cost::Cost;
use super::{In, Out, kernel};

kernel! {
    /// Computes `out = Σ_p parts[p]` or `out += Σ_p parts[p]`.
    pub struct SumParts = sum_parts {
        /// `[elements]`, assigned, or added to.
        out: Out<'a, f32> [elements];
        /// `[count, elements]`.
        parts: In<'a, f32> [count * elements];
        /// Number of parts.
        count: usize;
        /// A multiple of 8.
        elements: usize;
        /// Whether to add to `out` instead of assigning it.
        accumulate: bool;
    }
}

impl SumParts<'_> {
    /// The cost: each part is read and the sum is written. Additions are not counted.
    pub fn cost(count: usize, elements: usize) -> Cost {
        Cost::new(0, 4 * (count + 1) * elements)
    }
}
