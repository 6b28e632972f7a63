//! The tensors of an export: the tensors of the checkpoint with the names and the dtype that the reader expects.
//!
//! transformers 4 needs one tensor per expert, `experts.3.up_proj.weight [F, D]`; version 5 joins them when it loads a
//! model. The Python code of an export reads the joined `experts.gate_up_proj [E, 2F, D]`, as in checkpoints.

use super::Architecture;
use crate::config::Config;
use crate::error::Result;
use crate::model::{Model, Part};
use crate::routers::Router;
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real, nearest_bf16};
use crate::tensor::shape::Shape;
use crate::train::checkpoint::{Array, Content};
use crate::with_real;
use std::ops::Range;

/// Returns every tensor of the model in `dtype`; elements are rounded when they are written.
pub fn arrays<'a>(
    model: &'a Model,
    config: &Config,
    router: &dyn Router,
    architecture: Architecture,
    dtype: DType,
) -> Vec<Array<'a>> {
    let own = architecture == Architecture::Routegrad;
    let mut arrays = Vec::new();
    for parameter in &model.parameters {
        let value = &parameter.value;
        let mut from = 0;
        for part in &parameter.parts {
            let pieces = if own { vec![part.clone()] } else { split(part) };
            for Part { name, shape } in pieces {
                let to = from + shape.elements();
                arrays.push(Array {
                    name,
                    shape,
                    dtype,
                    content: Content::Made(Box::new(move || {
                        rounded(&value.whole(), from..to, dtype)
                    })),
                });
                from = to;
            }
        }
    }
    let layers = config.model.moe_layers();
    for (layer, state) in layers.iter().zip(model.layer_states().iter()) {
        for (name, tensor) in state.tensors() {
            if !router.evaluation_reads(name) {
                continue;
            }
            let tensor = tensor.clone();
            arrays.push(Array {
                name: format!("model.layers.{layer}.mlp.{name}"),
                shape: tensor.shape(),
                dtype,
                content: Content::Made(Box::new(move || {
                    rounded(&tensor, 0..tensor.elements(), dtype)
                })),
            });
        }
    }
    if architecture == Architecture::Qwen2Moe && config.model.shared_expert_width == 0 {
        let d = config.model.hidden;
        for layer in layers {
            arrays.extend(no_shared_expert(layer, d, dtype));
        }
    }
    arrays
}

/// Splits a joined tensor into its experts, in order; returns any other part unchanged.
fn split(part: &Part) -> Vec<Part> {
    let (joined, names): (_, &[&str]) =
        if let Some(prefix) = part.name.strip_suffix(".experts.gate_up_proj") {
            (prefix, &["gate_proj", "up_proj"])
        } else if let Some(prefix) = part.name.strip_suffix(".experts.down_proj") {
            (prefix, &["down_proj"])
        } else {
            return vec![part.clone()];
        };
    let [experts, rows, width] = *part.shape else {
        return vec![part.clone()];
    };
    let each = |expert: usize| {
        names.iter().map(move |name| Part {
            name: format!("{joined}.experts.{expert}.{name}.weight"),
            shape: [rows / names.len(), width].into(),
        })
    };
    (0..experts).flat_map(each).collect()
}

/// qwen2_moe always has a shared expert: here it has width 0, and a gate `[1, D]`.
fn no_shared_expert(layer: usize, d: usize, dtype: DType) -> [Array<'static>; 4] {
    [
        ("shared_expert.gate_proj", [0, d]),
        ("shared_expert.up_proj", [0, d]),
        ("shared_expert.down_proj", [d, 0]),
        ("shared_expert_gate", [1, d]),
    ]
    .map(|(name, shape)| {
        let shape = Shape::from(shape);
        Array {
            name: format!("model.layers.{layer}.mlp.{name}.weight"),
            shape,
            dtype,
            content: Content::Bytes(vec![0; shape.elements() * dtype.size()]),
        }
    })
}

/// Returns elements of a tensor in f32 or bf16, rounded to nearest, ties to even.
///
/// # Errors
/// When the tensor's dtype is not a floating-point type.
fn rounded(tensor: &Tensor, range: Range<usize>, dtype: DType) -> Result<Vec<u8>> {
    if tensor.dtype() == dtype {
        let size = dtype.size();
        return Ok(tensor.bytes()[range.start * size..range.end * size].to_vec());
    }
    with_real!(tensor.dtype(), "export", |T| {
        let values = tensor.slice::<T>()[range].iter().map(|x| x.f64());
        Ok(match dtype {
            DType::Bf16 => {
                bytemuck::cast_slice(&values.map(nearest_bf16).collect::<Vec<_>>()).to_vec()
            }
            _ => bytemuck::cast_slice(&values.map(f32::of).collect::<Vec<_>>()).to_vec(),
        })
    })
}
