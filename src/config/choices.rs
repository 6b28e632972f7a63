//! Types of configuration keys with a fixed set of values: the learning-rate schedule, the precision, and the layers whose
//! activations are recomputed.

use crate::tensor::dtype::DType;
use serde::{Deserialize, Serialize};

/// How the learning rate decreases after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// The rate follows half a cosine down to the final rate.
    #[default]
    Cosine,
    /// The rate decreases linearly to the final rate.
    Linear,
    /// The rate stays constant.
    Constant,
    /// The rate stays constant, and decreases linearly to the final rate in the last steps: warm-up, stable, decay (Hu et
    /// al., arXiv 2404.06395).
    Wsd,
}

/// Floating-point type of the arithmetic on the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    F32,
    /// 64-bit floating point, for finite differences and comparisons.
    F64,
}

impl Precision {
    /// Returns the dtype of weights and activations.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::F64 => DType::F64,
        }
    }
}

/// Layers whose activations are recomputed in backward: `false`, `true` for every layer, or a list of layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "true, false, or a list of layer numbers")]
pub enum Recompute {
    /// Every layer (`true`) or no layer (`false`).
    All(bool),
    /// The layers with these indices, counted from 0.
    Layers(Vec<usize>),
}

impl Default for Recompute {
    fn default() -> Self {
        Recompute::All(false)
    }
}

impl Recompute {
    /// Returns whether the activations of layer `layer`, counted from 0, are recomputed.
    pub fn covers(&self, layer: usize) -> bool {
        match self {
            Recompute::All(all) => *all,
            Recompute::Layers(layers) => layers.contains(&layer),
        }
    }
}
