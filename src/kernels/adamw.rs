//! `kernels/adamw.cu`: one update of all parameters (Loshchilov and Hutter, 1711.05101), and the sums of squares of their
//! gradients.
//!
//! `g = scale gradient`, `m = β₁ m + (1 − β₁) g`, `v = β₂ v + (1 − β₂) g²`, `w = keep w − rate m / (√(v second_scale) + ε)`. The
//! numbers of each parameter are cut into [blocks](BLOCK); `block_parameter` names the parameter of each block. Values are
//! f32, or split into bf16 and an exact rest; moments are f32, or bf16 rounded stochastically.

use super::bindings::{routegrad_parameter, routegrad_step_outcome};
use super::cost::Cost;
use super::{In, Out, kernel};

/// Numbers of a block of a parameter.
pub const BLOCK: usize = 8192;

kernel! {
    /// Updates values and moments in the rows' memory, if the outcome says that the step is accepted.
    pub struct AdamwUpdate = adamw_update {
        /// `[parameters]`: rows with addresses of device memory, which the caller keeps alive.
        parameters: In<'a, routegrad_parameter> [1];
        /// `[blocks]`: a row of `parameters` each.
        block_parameter: In<'a, i32> [blocks];
        /// `[1]`: the coefficients of the update.
        outcome: In<'a, routegrad_step_outcome> [1];
        /// Blocks of all parameters.
        blocks: usize;
        /// Whether moments are bf16, rounded stochastically, or f32.
        bf16_moments: bool;
    }
}

impl AdamwUpdate<'_> {
    /// Of so many numbers in f32, with f32 moments.
    pub fn cost(numbers: usize) -> Cost {
        Cost::new(0, 28 * numbers)
    }
}

kernel! {
    /// `parts[b] = Σ gradient²` over the numbers of block b.
    pub struct SquareSums = square_sums {
        /// `[blocks]`.
        parts: Out<'a, f64> [blocks];
        /// `[parameters]`: rows with addresses of device memory, which the caller keeps alive.
        parameters: In<'a, routegrad_parameter> [1];
        /// `[blocks]`: a row of `parameters` each.
        block_parameter: In<'a, i32> [blocks];
        /// Blocks of all parameters.
        blocks: usize;
    }
}

impl SquareSums<'_> {
    /// Of so many numbers.
    pub fn cost(numbers: usize) -> Cost {
        Cost::new(0, 4 * numbers)
    }
}
