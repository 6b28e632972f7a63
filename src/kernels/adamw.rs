//! `kernels/adamw.cu`: one update of all parameters (Loshchilov and Hutter, 1711.05101), and the sums of squares of their
//! gradients.
//!
//! `g = scale gradient`, `m = β₁ m + (1 − β₁) g`, `v = β₂ v + (1 − β₂) g²`,
//! `w = keep w − rate m / (√(v second_scale) + ε)`. The elements of each parameter are divided into [blocks](BLOCK);
//! `block_parameter` names the parameter of each block. Values are f32, or split into an upper bf16 half and a lower
//! i16 half; moments are f32, or bf16 rounded stochastically.

use super::bindings::{routegrad_parameter, routegrad_step_outcome};
use super::cost::Cost;
use super::{In, Out, kernel};

/// Number of elements of a block of a parameter.
pub const BLOCK: usize = 8192;

kernel! {
    /// Updates the values and moments that the rows of `parameters` point to, if `outcome` says that the step is
    /// accepted.
    pub struct AdamwUpdate = adamw_update {
        /// `[parameters]`: rows with addresses of device memory, which the caller keeps alive.
        parameters: In<'a, routegrad_parameter> [1];
        /// `[blocks]`: the row of `parameters` to which each block belongs.
        block_parameter: In<'a, i32> [blocks];
        /// `[1]`: the coefficients of the update.
        outcome: In<'a, routegrad_step_outcome> [1];
        /// Number of blocks of all parameters.
        blocks: usize;
        /// Whether moments are bf16, rounded stochastically; otherwise they are f32.
        bf16_moments: bool;
    }
}

impl AdamwUpdate<'_> {
    /// The cost for this many f32 numbers with f32 moments.
    pub fn cost(numbers: usize) -> Cost {
        Cost::new(0, 28 * numbers)
    }
}

kernel! {
    /// `parts[b] = Σ gradient²` over the elements of block b.
    pub struct SquareSums = square_sums {
        /// `[blocks]`.
        parts: Out<'a, f64> [blocks];
        /// `[parameters]`: rows with addresses of device memory, which the caller keeps alive.
        parameters: In<'a, routegrad_parameter> [1];
        /// `[blocks]`: the row of `parameters` to which each block belongs.
        block_parameter: In<'a, i32> [blocks];
        /// Number of blocks of all parameters.
        blocks: usize;
    }
}

impl SquareSums<'_> {
    /// The cost for this many numbers.
    pub fn cost(numbers: usize) -> Cost {
        Cost::new(0, 4 * numbers)
    }
}
