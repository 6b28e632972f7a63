//! `kernels/sum_parts.cu`: `out = or += Σ_p parts[p]`, p ascending; joins the parts of a weight gradient.

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
