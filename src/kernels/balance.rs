//! `kernels/balance.cu`: the scalars of a step's loss.
//!
//! The auxiliary loss of a layer is `E Σ_i f_i P_i` (Switch Transformer, 2101.03961, eq. 4), its gradient `dmean[i] = dloss E
//! f_i`. The sum of all losses is `Σ_k c_k s_k`, its gradient `dterms[k] = dout c_k`. E is at most 256, and there are at most
//! 128 terms.

use super::argument::{InList, OutList};
use super::{In, Out, kernel};

kernel! {
    /// `E Σ_i f_i P_i`.
    pub struct AuxiliaryLoss = auxiliary_loss {
        /// `[1]`.
        loss: Out<'a, f32> [1];
        /// P `[E]`.
        mean: In<'a, f32> [experts];
        /// f `[E]`.
        fractions: In<'a, f32> [experts];
        /// E, the number of experts.
        experts: usize;
    }
}

kernel! {
    /// `dmean[i] = dloss E f_i`.
    pub struct AuxiliaryLossBackward = auxiliary_loss_backward {
        /// `[E]`.
        dmean: Out<'a, f32> [experts];
        /// `[1]`.
        dloss: In<'a, f32> [1];
        /// f `[E]`.
        fractions: In<'a, f32> [experts];
        /// E, the number of experts.
        experts: usize;
    }
}

kernel! {
    /// `Σ_k c_k s_k`.
    pub struct WeightedSum = weighted_sum {
        /// `[1]`.
        out: Out<'a, f32> [1];
        /// `[1]` each.
        terms: &'a InList<'a, f32> [count];
        /// c `[N]`.
        coefficients: In<'a, f32> [count];
        /// N, the number of terms.
        count: usize;
    }
}

kernel! {
    /// `dterms[k] = dout c_k`.
    pub struct WeightedSumBackward = weighted_sum_backward {
        /// `[1]` each.
        dterms: &'a OutList<'a, f32> [count];
        /// `[1]`.
        dout: In<'a, f32> [1];
        /// c `[N]`.
        coefficients: In<'a, f32> [count];
        /// N, the number of terms.
        count: usize;
    }
}
