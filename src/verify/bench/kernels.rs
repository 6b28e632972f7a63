//! The kernels of the groups: buffers with the shared inputs, and a launch for each case.

use super::case::{Group, Work};
use super::inputs::{Inputs, unit_sum};
use super::layer;
use super::problem::Kernels;
use crate::error::Result;
use crate::kernels::adamw::{AdamwUpdate, BLOCK};
use crate::kernels::attention::AttentionSizes;
use crate::kernels::attention_backward::workspace;
use crate::kernels::bindings::{ROUTEGRAD_TILE_AUTO, routegrad_parameter, routegrad_step_outcome};
use crate::kernels::cross_entropy::CrossEntropyRows;
use crate::kernels::norm::{NormBackward, NormForward, NormWeightGradient, partials};
use crate::kernels::{AttentionBackward, AttentionForward};
use crate::tensor::dtype::DType;
use crate::verify::kernels::grouped_gemm::{self, Operands, Product, Shape};
use crate::verify::kernels::{Buffer, Launch, Machine, bind, launch_of};
use std::sync::Arc;

/// Builds the kernels of a group; returns `None` if it has no kernels.
///
/// # Errors
/// When a launcher does not support the sizes.
pub fn build(machine: &dyn Machine, group: &Group) -> Result<Option<Kernels>> {
    let inputs = Inputs(&group.name);
    Ok(Some(match &group.work {
        Work::Gemm { product, shape } => gemm(&inputs, *product, shape),
        Work::Layer(layer) => layer::build(machine, &inputs, layer)?,
        Work::Norm { rows, hidden } => norm(machine, &inputs, *rows, *hidden)?,
        Work::CrossEntropy { tokens, vocabulary } => cross_entropy(&inputs, *tokens, *vocabulary),
        Work::AdamW { numbers } => adamw(&inputs, *numbers),
        Work::Attention(sizes) => attention(machine, &inputs, sizes)?,
        Work::Operation(_) | Work::Step(_) => return Ok(None),
    }))
}

fn gemm(inputs: &Inputs, product: Product, shape: &Shape) -> Kernels {
    let (n, k) = (shape.n, shape.k);
    let rows = |name, width| inputs.bf16(name, shape.rows() * width, 1.0);
    let weights = |depth| inputs.bf16("w", shape.counts.len() * n * k, unit_sum(depth));
    let (dtype, a, b) = match product {
        Product::Forward => (DType::Bf16, rows("x", k), weights(k)),
        Product::InputGradient => (DType::Bf16, rows("dout", n), weights(n)),
        Product::WeightGradient => (DType::F32, rows("dout", n), rows("x", k)),
    };
    let operands = Arc::new(Operands::of(product, shape, a, b));
    let problem = grouped_gemm::problem(&operands, ROUTEGRAD_TILE_AUTO);
    let launch = || [grouped_gemm::launch(&operands, ROUTEGRAD_TILE_AUTO)];
    let outputs = [(product.result(), dtype)];
    Kernels::in_order(inputs.0, problem.buffers, launch, &outputs)
}

/// ε of the LayerNorms.
const EPS: f32 = 1e-5;

fn norm(machine: &dyn Machine, inputs: &Inputs, rows: usize, hidden: usize) -> Result<Kernels> {
    let floats = partials(machine.launchers(), rows, hidden)?;
    let matrix = |name| Buffer::input(name, &inputs.bf16(name, rows * hidden, 1.0));
    let vector = |name| Buffer::input(name, &inputs.bf16(name, hidden, 1.0));
    let output = |name, bytes| Buffer::output(name, bytes * hidden);
    let buffers = vec![
        output("y", 2 * rows),
        output("sum", 2 * rows),
        output("dx", 2 * rows),
        output("dweight", 4),
        output("dbias", 4),
        Buffer::workspace("partials", 8 * floats),
        matrix("x"),
        matrix("residual"),
        vector("weight"),
        vector("bias"),
        matrix("dy"),
    ];
    let (bf16, f32) = (DType::Bf16, DType::F32);
    let outputs = [
        ("y", bf16),
        ("sum", bf16),
        ("dx", bf16),
        ("dweight", f32),
        ("dbias", f32),
    ];
    let passes = || -> [Launch; 2] {
        [
            launch_of!(NormForward {
                y, sum, x, residual, weight, bias;
                rows, hidden, eps: EPS,
            }),
            Box::new(move |p, stream| {
                bind!(p, NormBackward {
                    dx, partials, dy, x = "sum", weight;
                    skip: None, rows, hidden, layernorm: true, eps: EPS,
                })
                .launch(stream)?;
                for (parameter, name) in ["dweight", "dbias"].into_iter().enumerate() {
                    let partials = p.named("partials").input().from_element(parameter * floats);
                    bind!(p, NormWeightGradient {
                        gradient = name;
                        partials, rows, hidden, accumulate: false,
                    })
                    .launch(stream)?;
                }
                Ok(())
            }),
        ]
    };
    Ok(Kernels::in_order(inputs.0, buffers, passes, &outputs))
}

fn cross_entropy(inputs: &Inputs, tokens: usize, vocabulary: usize) -> Kernels {
    let buffers = vec![
        Buffer::output("losses", 4 * tokens),
        Buffer::output("dlogits", 2 * tokens * vocabulary),
        Buffer::input("logits", &inputs.f32("logits", tokens * vocabulary, 2.0)),
        Buffer::input("targets", &inputs.ids("targets", tokens, vocabulary)),
    ];
    let launch = || -> [Launch; 1] {
        [launch_of!(CrossEntropyRows {
            losses, dlogits, logits, targets;
            statistics: None, tokens, vocabulary, factor: 1.0 / tokens as f32,
        })]
    };
    let outputs = [("losses", DType::F32), ("dlogits", DType::Bf16)];
    Kernels::in_order(inputs.0, buffers, launch, &outputs)
}

/// β₁, β₂, η / (1 − β₁³), 1 / (1 − β₂³), ε, 1 − η λ, scale: the values of a third step with η = 1e-3 and λ = 0.1.
const COEFFICIENTS: [f32; 7] = [
    0.9,
    0.95,
    (1e-3 / 0.271) as f32,
    (1.0 / 0.142_625) as f32,
    1e-8,
    1.0 - 1e-4,
    1.0,
];

/// The table has one parameter: the first four buffers.
fn adamw(inputs: &Inputs, numbers: usize) -> Kernels {
    let normals = |name| inputs.f32(name, numbers, 1.0);
    let squares: Vec<f32> = normals("v").iter().map(|x| x * x).collect();
    let blocks = numbers.div_ceil(BLOCK);
    let buffers = vec![
        Buffer::changed("w", &normals("w")),
        Buffer::changed("m", &normals("m")),
        Buffer::changed("v", &squares),
        Buffer::input("gradient", &normals("gradient")),
        Buffer::table("parameters", 1, move |p| {
            vec![routegrad_parameter {
                whole: p[0].cast(),
                first: p[1].cast(),
                second: p[2].cast(),
                gradient: p[3].cast(),
                elements: numbers as i64,
                decays: 1,
                ..Default::default()
            }]
        }),
        Buffer::input("block_parameter", &vec![0i32; blocks]),
        Buffer::table("outcome", 1, |_| {
            vec![routegrad_step_outcome {
                accepted: 1,
                coefficients: [COEFFICIENTS; 2],
                ..Default::default()
            }]
        }),
    ];
    let launch = || -> [Launch; 1] {
        [launch_of!(AdamwUpdate {
            parameters, block_parameter, outcome;
            blocks, bf16_moments: false,
        })]
    };
    let outputs = ["w", "m", "v"].map(|name| (name, DType::F32));
    Kernels::in_order(inputs.0, buffers, launch, &outputs)
}

fn attention(machine: &dyn Machine, inputs: &Inputs, sizes: &AttentionSizes) -> Result<Kernels> {
    let AttentionSizes {
        sequences,
        sequence,
        heads,
        key_value_heads,
        width: head_width,
    } = *sizes;
    let tokens = sequences * sequence;
    let floats = workspace(machine.launchers(), tokens, sequence, heads)?;
    let (row, qkv) = (
        heads * head_width,
        (heads + 2 * key_value_heads) * head_width,
    );
    let buffers = vec![
        Buffer::output("out", 2 * tokens * row),
        Buffer::output("log_sum_exp", 4 * tokens * heads),
        Buffer::output("dqkv", 2 * tokens * qkv),
        Buffer::workspace("workspace", 4 * floats),
        Buffer::input("qkv", &inputs.bf16("qkv", tokens * qkv, 1.0)),
        Buffer::input("dout", &inputs.bf16("dout", tokens * row, 1.0)),
    ];
    let passes = || -> [Launch; 2] {
        [
            launch_of!(AttentionForward {
                out, log_sum_exp, qkv;
                first_key: None, tokens, sequence, heads, key_value_heads, head_width,
            }),
            launch_of!(AttentionBackward {
                dqkv, workspace, dout, qkv, out, log_sum_exp;
                first_key: None, cosines: None, sines: None, tokens, sequence, heads,
                key_value_heads, head_width,
            }),
        ]
    };
    let outputs = [("out", DType::Bf16), ("dqkv", DType::Bf16)];
    Ok(Kernels::in_order(inputs.0, buffers, passes, &outputs))
}
