//! Operations on the CPU with the shapes of `tiny`, in f32, forward and backward together: 16 sequences of 256 bytes, D
//! 128, two heads of 64, F 352, V 256, eight experts.

use super::inputs::{Inputs, balanced, unit_sum};
use crate::error::Result;
use crate::kernels::cost::Cost;
use crate::ops::add::add;
use crate::ops::attention::attention;
use crate::ops::cross_entropy::cross_entropy;
use crate::ops::dispatch::{Dispatch, Selection};
use crate::ops::embedding::embedding;
use crate::ops::experts::{Experts, experts};
use crate::ops::heads::Heads;
use crate::ops::layernorm::layernorm;
use crate::ops::linear::linear;
use crate::ops::qk_norm::qk_norm;
use crate::ops::rmsnorm::rmsnorm;
use crate::ops::rope::{RopeTables, rope};
use crate::ops::swiglu::swiglu;
use crate::tape::{Gradients, Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use serde_json::{Value, json};
use std::rc::Rc;

const SEQUENCE: usize = 256;
const TOKENS: usize = 16 * SEQUENCE;
const HIDDEN: usize = 128;
const WIDTH: usize = 352;
const VOCABULARY: usize = 256;
const EXPERTS: usize = 8;
const HEADS: Heads = Heads {
    query: 2,
    key_value: 2,
    dim: 64,
};
const EPS: f64 = 1e-5;
const THETA: f64 = 10_000.0;

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Linear,
    Experts,
    Attention,
    CrossEntropy,
    Add,
    RmsNorm,
    LayerNorm,
    Rope,
    QkNorm,
    SwiGlu,
    Embedding,
}

/// An input that has a gradient: its name, shape and standard deviation.
type Leaf = (&'static str, Vec<usize>, f64);
type Forward = Box<dyn Fn(&Tape, &[Var]) -> Result<Var>>;

impl Operation {
    pub const ALL: [Operation; 11] = [
        Operation::Linear,
        Operation::Experts,
        Operation::Attention,
        Operation::CrossEntropy,
        Operation::Add,
        Operation::RmsNorm,
        Operation::LayerNorm,
        Operation::Rope,
        Operation::QkNorm,
        Operation::SwiGlu,
        Operation::Embedding,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Operation::Linear => "linear",
            Operation::Experts => "experts",
            Operation::Attention => "attention",
            Operation::CrossEntropy => "cross_entropy",
            Operation::Add => "add",
            Operation::RmsNorm => "rmsnorm",
            Operation::LayerNorm => "layernorm",
            Operation::Rope => "rope",
            Operation::QkNorm => "qk_norm",
            Operation::SwiGlu => "swiglu",
            Operation::Embedding => "embedding",
        }
    }

    /// Returns the FLOPs of its products, and the bytes that forward and backward must read and write once.
    pub fn cost(self) -> Cost {
        let row = HEADS.row_width();
        let product = |m: usize, k: usize, n: usize| 6 * m * k * n;
        let flops = match self {
            Operation::Linear => product(TOKENS, HIDDEN, row),
            Operation::Experts => 3 * product(TOKENS, HIDDEN, WIDTH),
            // Two products forward and five backward, over the causal half.
            Operation::Attention => 7 * TOKENS * HEADS.query * HEADS.dim * SEQUENCE,
            Operation::CrossEntropy => product(TOKENS, HIDDEN, VOCABULARY),
            _ => 0,
        };
        let passes = |passes: usize, width: usize| 4 * passes * TOKENS * width;
        let bytes = match self {
            Operation::Linear => passes(3, HIDDEN + row),
            Operation::Experts => passes(3, HIDDEN) + 4 * 3 * 3 * EXPERTS * HIDDEN * WIDTH,
            Operation::Attention => passes(3, row),
            Operation::CrossEntropy => passes(2, HIDDEN) + 4 * 2 * VOCABULARY * HIDDEN,
            Operation::Add => passes(3, HIDDEN),
            Operation::RmsNorm | Operation::LayerNorm => passes(5, HIDDEN),
            Operation::Rope => passes(4, row),
            Operation::QkNorm => passes(5, row),
            Operation::SwiGlu => passes(8, WIDTH),
            Operation::Embedding => passes(3, HIDDEN),
        };
        Cost {
            flops: flops as f64,
            bytes: bytes as f64,
        }
    }

    pub fn sizes(self) -> Value {
        json!({
            "work": "operation", "operation": self.name(), "tokens": TOKENS, "sequence": SEQUENCE, "hidden": HIDDEN,
            "ffn": WIDTH, "vocabulary": VOCABULARY, "heads": HEADS.query, "width": HEADS.dim,
            "counts": balanced(TOKENS, EXPERTS), "top_k": 1,
        })
    }

    fn leaves(self) -> Vec<Leaf> {
        let row = HEADS.row_width();
        let x = || ("x", vec![TOKENS, HIDDEN], 1.0);
        let qkv = || ("x", vec![TOKENS, row], 1.0);
        let vector = |name, width| (name, vec![width], 1.0);
        let weight = |rows| ("weight", vec![rows, HIDDEN], unit_sum(HIDDEN));
        match self {
            Operation::Linear => vec![x(), weight(row)],
            Operation::Experts => vec![
                x(),
                ("gates", vec![TOKENS, EXPERTS], 1.0),
                (
                    "gate_up",
                    vec![EXPERTS, 2 * WIDTH, HIDDEN],
                    unit_sum(HIDDEN),
                ),
                ("down", vec![EXPERTS, HIDDEN, WIDTH], unit_sum(WIDTH)),
            ],
            Operation::Attention | Operation::Rope => vec![qkv()],
            Operation::CrossEntropy => vec![x(), weight(VOCABULARY)],
            Operation::Add => vec![x(), ("residual", vec![TOKENS, HIDDEN], 1.0)],
            Operation::RmsNorm => vec![x(), vector("weight", HIDDEN)],
            Operation::LayerNorm => vec![x(), vector("weight", HIDDEN), vector("bias", HIDDEN)],
            Operation::QkNorm => vec![
                qkv(),
                vector("query_weight", HEADS.dim),
                vector("key_weight", HEADS.dim),
            ],
            Operation::SwiGlu => vec![("x", vec![TOKENS, 2 * WIDTH], 1.0)],
            Operation::Embedding => vec![weight(VOCABULARY)],
        }
    }

    fn forward(self, inputs: &Inputs) -> Result<Forward> {
        let ids = || Tensor::from_slice([TOKENS], &inputs.ids("ids", TOKENS, VOCABULARY));
        Ok(match self {
            Operation::Linear => Box::new(|tape, v| linear(tape, &v[0], &v[1], None)),
            Operation::Experts => {
                let choices = inputs.choices(&balanced(TOKENS, EXPERTS), TOKENS);
                let selection = Selection::from_choices(&choices, TOKENS, EXPERTS)?;
                let dispatch = Rc::new(Dispatch::new(selection));
                Box::new(move |tape, v| {
                    let [x, gates, gate_up, down] = [0, 1, 2, 3].map(|i| &v[i]);
                    let input = Experts {
                        x,
                        gates,
                        gate_up,
                        down,
                        sum_weights: None,
                    };
                    experts(tape, input, &dispatch, None, |_| Ok(None))
                })
            }
            Operation::Attention => {
                Box::new(|tape, v| attention(tape, &v[0], HEADS, SEQUENCE, None))
            }
            Operation::CrossEntropy => {
                let ids = ids();
                Box::new(move |tape, v| cross_entropy(tape, &v[0], &v[1], &ids, TOKENS as f64))
            }
            Operation::Add => Box::new(|tape, v| add(tape, &v[0], &v[1])),
            Operation::RmsNorm => Box::new(|tape, v| rmsnorm(tape, &v[0], &v[1], EPS)),
            Operation::LayerNorm => Box::new(|tape, v| layernorm(tape, &v[0], &v[1], &v[2], EPS)),
            Operation::Rope => {
                let tables = RopeTables::new(DType::F32, SEQUENCE, HEADS.dim, THETA)?;
                Box::new(move |tape, v| rope(tape, &v[0], HEADS, SEQUENCE, &tables))
            }
            Operation::QkNorm => Box::new(|tape, v| qk_norm(tape, &v[0], &v[1], &v[2], HEADS, EPS)),
            Operation::SwiGlu => Box::new(|tape, v| swiglu(tape, &v[0])),
            Operation::Embedding => {
                let ids = ids();
                Box::new(move |tape, v| embedding(tape, &v[0], &ids))
            }
        })
    }

    /// Returns the operation with its inputs, ready to run on the CPU.
    ///
    /// # Errors
    /// When the operation cannot be set up.
    pub fn build(self, group: &str) -> Result<Running> {
        let inputs = Inputs(group);
        // The operations of a group share its name, so the name of the operation is added to the name of each tensor.
        let named = |tensor: &str| format!("{}/{tensor}", self.name());
        let leaves = self.leaves();
        let values = leaves
            .iter()
            .enumerate()
            .map(|(i, (name, shape, deviation))| {
                let numbers = inputs.f32(&named(name), shape.iter().product(), *deviation);
                Var::leaf(Tensor::from_slice(shape.as_slice(), &numbers), i)
            });
        let values: Vec<Var> = values.collect();
        let forward = self.forward(&inputs)?;
        let out = forward(&Tape::without_gradients(), &values)?;
        let shape = out.tensor().shape();
        let dout = inputs.f32(&named("dout"), shape.elements(), 1.0);
        Ok(Running {
            names: leaves.into_iter().map(|leaf| leaf.0).collect(),
            store: Gradients::new(values.len()),
            dout: Tensor::from_slice(shape, &dout),
            values,
            forward,
        })
    }
}

/// An operation with its inputs.
pub struct Running {
    names: Vec<&'static str>,
    values: Vec<Var>,
    dout: Tensor,
    store: Gradients,
    forward: Forward,
}

impl Running {
    /// Runs forward and backward once.
    ///
    /// # Errors
    /// When the operation returns an error.
    pub fn run(&mut self) -> Result<Tensor> {
        let tape = Tape::new();
        let out = (self.forward)(&tape, &self.values)?;
        self.store.reset();
        tape.backward_from(&[(&out, self.dout.clone())], &mut self.store)?;
        Ok(out.tensor().clone())
    }

    /// Returns the output, and the gradient of each input as "dNAME".
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn outputs(&mut self) -> Result<Vec<(String, Vec<f32>)>> {
        let mut outputs = vec![("out".to_owned(), self.run()?.slice::<f32>().to_vec())];
        for (i, name) in self.names.iter().enumerate() {
            if let Some(gradient) = self.store.get(i) {
                outputs.push((format!("d{name}"), gradient.slice::<f32>().to_vec()));
            }
        }
        Ok(outputs)
    }
}
