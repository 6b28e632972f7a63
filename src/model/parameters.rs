//! The parameters: names, shapes and initial values.
//!
//! Projections that are multiplied by the same input are one parameter (query, key and value; gate and up), as the
//! kernels require; [`Part`]s name the separate matrices that a checkpoint holds. Matrices begin as Gaussian numbers
//! with standard deviation √(2 / 5D), or 2 / (L √D) if they write into the residual stream, where D is the model
//! width and L the number of all layers. Norm weights begin at 1, biases at 0 (Default MoE, A.2).

use super::weight::Weight;
use crate::config::{ModelConfig, Norm};
use crate::device::Device;
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::tensor::random::{Purpose, Stream};
use crate::tensor::shape::Shape;

/// A trainable tensor.
pub struct Parameter {
    /// Name in reports; the name in the checkpoint if there is only one part.
    pub name: String,
    /// The value, in the form in which the device keeps it.
    pub value: Weight,
    /// The parts that a checkpoint holds: consecutive rows of the value, in order.
    pub parts: Vec<Part>,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// Rows of a parameter that a checkpoint holds as one array.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Shape,
}

/// The indices of a norm's parameters.
#[derive(Clone, Copy)]
pub struct NormSlots {
    pub weight: usize,
    pub bias: Option<usize>,
}

/// Collects the parameters in order and draws their initial values.
pub struct Layout<'c> {
    config: &'c ModelConfig,
    dtype: DType,
    device: Device,
    seed: u64,
    parameters: Vec<Parameter>,
}

/// The initial value of a parameter.
enum Start {
    Value(f64),
    Gaussian { std: f64 },
}

impl<'c> Layout<'c> {
    /// A layout for parameters of type `dtype`, which operations on `device` read.
    pub fn new(config: &'c ModelConfig, dtype: DType, device: Device, seed: u64) -> Self {
        Layout {
            config,
            dtype,
            device,
            seed,
            parameters: Vec::new(),
        }
    }

    pub fn into_parameters(self) -> Vec<Parameter> {
        self.parameters
    }

    /// Adds the router's weight, which operations read in f32 on every device. Returns its index.
    pub fn router(&mut self, name: &str, shape: &[usize]) -> usize {
        let start = self.plain();
        self.push(name, vec![], shape, start, true, true)
    }

    /// Adds a matrix, or a stack of matrices. Returns its index.
    pub fn matrix(&mut self, name: &str, shape: &[usize]) -> usize {
        self.push(name, vec![], shape, self.plain(), true, false)
    }

    /// Adds matrices that are multiplied by the same input, stacked by rows: (checkpoint name, rows). Returns the
    /// index.
    pub fn stacked(&mut self, name: &str, parts: &[(String, usize)], inputs: usize) -> usize {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        let parts = parts
            .iter()
            .map(|(n, rows)| part(n, &[*rows, inputs]))
            .collect();
        self.push(name, parts, &[rows, inputs], self.plain(), true, false)
    }

    /// Adds a matrix, or a stack of matrices, that writes into the residual stream. Returns its index.
    pub fn residual(&mut self, name: &str, shape: &[usize]) -> usize {
        let std = 2.0 / (self.config.layers as f64 * (self.config.hidden as f64).sqrt());
        self.push(name, vec![], shape, Start::Gaussian { std }, true, false)
    }

    /// Adds the embedding, which has no weight decay. Returns its index.
    pub fn embedding(&mut self, name: &str, vocab_size: usize) -> usize {
        self.push(
            name,
            vec![],
            &[vocab_size, self.config.hidden],
            self.plain(),
            false,
            false,
        )
    }

    /// Adds a vector whose entries are all `value`, or several such vectors one after another: (checkpoint name,
    /// length). Returns the index.
    pub fn vectors(&mut self, name: &str, parts: &[(String, usize)], value: f64) -> usize {
        let length = parts.iter().map(|(_, n)| n).sum();
        let parts = parts.iter().map(|(name, n)| part(name, &[*n])).collect();
        self.push(name, parts, &[length], Start::Value(value), false, false)
    }

    /// Adds a norm over the residual stream; `name` is without `.weight`.
    pub fn norm(&mut self, name: &str) -> NormSlots {
        let (width, kind) = (self.config.hidden, self.config.norm);
        let mut vector = |suffix: &str, value| {
            let name = format!("{name}.{suffix}");
            self.vectors(&name, &[(name.clone(), width)], value)
        };
        let weight = vector("weight", 1.0);
        let bias = (kind == Norm::LayerNorm).then(|| vector("bias", 0.0));
        NormSlots { weight, bias }
    }

    fn plain(&self) -> Start {
        Start::Gaussian {
            std: (2.0 / (5.0 * self.config.hidden as f64)).sqrt(),
        }
    }

    fn push(
        &mut self,
        name: &str,
        parts: Vec<Part>,
        shape: &[usize],
        start: Start,
        decays: bool,
        exact: bool,
    ) -> usize {
        let index = self.parameters.len();
        let parts = if parts.is_empty() {
            vec![part(name, shape)]
        } else {
            parts
        };
        let mut value = Tensor::unspecified(Device::Cpu, self.dtype, shape);
        let stream = Stream::new(self.seed, Purpose::Weights, 0, index);
        match self.dtype {
            DType::F64 => fill(value.slice_mut::<f64>(), &start, stream),
            _ => fill(value.slice_mut::<f32>(), &start, stream),
        }
        self.parameters.push(Parameter {
            name: name.into(),
            value: Weight::new(value, self.device, exact),
            parts,
            decays,
        });
        index
    }
}

fn part(name: &str, shape: &[usize]) -> Part {
    Part {
        name: name.into(),
        shape: shape.into(),
    }
}

fn fill<T: Real>(out: &mut [T], start: &Start, stream: Stream) {
    match start {
        Start::Value(value) => out.fill(T::of(*value)),
        Start::Gaussian { std } => stream.fill_normal(out, *std),
    }
}
