//! Values that the keys of a configuration choose from: schedule, arithmetic, what is computed again.

use crate::tensor::dtype::DType;
use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Along half a cosine to the final rate.
    #[default]
    Cosine,
    /// In a straight line to the final rate.
    Linear,
    /// Not at all.
    Constant,
    /// Not at all, and in the last steps in a straight line to the final rate: warm-up, stable, decay (Hu et al.,
    /// arXiv 2404.06395).
    Wsd,
}

/// Arithmetic on the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    F32,
    /// 64-bit floating point: for finite differences and comparisons.
    F64,
}

impl Precision {
    /// The dtype of weights and activations.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::F64 => DType::F64,
        }
    }
}

/// `false`, `true` for every layer, or a list of layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "true, false, or a list of layer numbers")]
pub enum Recompute {
    /// Every layer, or none.
    All(bool),
    /// The layers of these numbers, from 0.
    Layers(Vec<usize>),
}

impl Default for Recompute {
    fn default() -> Self {
        Recompute::All(false)
    }
}

impl Recompute {
    /// Whether this layer's activations are computed again.
    pub fn covers(&self, layer: usize) -> bool {
        match self {
            Recompute::All(all) => *all,
            Recompute::Layers(layers) => layers.contains(&layer),
        }
    }
}
