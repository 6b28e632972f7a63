//! The kernels of the groups: buffers with the shared inputs, and a launch for each case.

use super::case::{Group, Work};
use super::inputs::{Inputs, unit_sum};
use super::layer;
use super::problem::{Kernels, part, whole};
use crate::error::Result;
use crate::kernels::adamw::{AdamwUpdate, BLOCK};
use crate::kernels::attention::AttentionSizes;
use crate::kernels::attention_backward::workspace;
use crate::kernels::bindings::{routegrad_parameter, routegrad_step_outcome};
use crate::kernels::cross_entropy::CrossEntropyRows;
use crate::kernels::launchers::TILE_AUTO;
use crate::kernels::norm::{NormBackward, NormForward, NormWeightGradient, partials};
use crate::kernels::{
    AttentionBackward, AttentionForward, GroupedGemmForward, GroupedGemmInputGradient,
    GroupedGemmWeightGradient, Stream,
};
use crate::tensor::dtype::DType;
use crate::verify::kernels::grouped_gemm::{Product, Shape};
use crate::verify::kernels::{Bound, Buffer, Launch, Machine};

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

/// Buffers: output, a, b, offsets.
fn gemm(inputs: &Inputs, product: Product, shape: &Shape) -> Kernels {
    let (rows, experts) = (shape.rows(), shape.counts.len());
    let (n, k) = (shape.n, shape.k);
    let mut offsets = vec![0i32];
    offsets.extend(shape.counts.iter().scan(0, |sum, &count| {
        *sum += count as i32;
        Some(*sum)
    }));
    let weights = |deviation| Buffer::input("w", &inputs.bf16("w", experts * n * k, deviation));
    let x = || Buffer::input("x", &inputs.bf16("x", rows * k, 1.0));
    let dout = || Buffer::input("dout", &inputs.bf16("dout", rows * n, 1.0));
    let (name, dtype, output, a, b) = match product {
        Product::Forward => ("out", DType::Bf16, 2 * rows * n, x(), weights(unit_sum(k))),
        Product::InputGradient => (
            "dx",
            DType::Bf16,
            2 * rows * k,
            dout(),
            weights(unit_sum(n)),
        ),
        Product::WeightGradient => ("dw", DType::F32, 4 * experts * n * k, dout(), x()),
    };
    let buffers = vec![
        Buffer::output(name, output),
        a,
        b,
        Buffer::input("offsets", &offsets),
    ];
    let launch = || launch_gemm(product, rows, experts, n, k);
    Kernels {
        whole: whole(inputs.0, buffers, launch()),
        parts: vec![part(launch())],
        outputs: vec![(0, name, dtype)],
    }
}

/// Returns the launch of a product on the buffers of [`gemm`].
fn launch_gemm(product: Product, rows: usize, experts: usize, n: usize, k: usize) -> Launch {
    match product {
        Product::Forward => Box::new(move |p, stream| {
            GroupedGemmForward {
                out: p[0].output(),
                x: p[1].input(),
                w: p[2].input(),
                offsets: Some(p[3].input()),
                row_token: None,
                rows,
                x_rows: rows,
                experts,
                n,
                k,
                tile: TILE_AUTO,
            }
            .launch(stream)
        }),
        Product::InputGradient => Box::new(move |p, stream| {
            GroupedGemmInputGradient {
                dx: p[0].output(),
                dout: p[1].input(),
                w: p[2].input(),
                offsets: Some(p[3].input()),
                row_token: None,
                rows,
                dout_rows: rows,
                experts,
                n,
                k,
                tile: TILE_AUTO,
            }
            .launch(stream)
        }),
        Product::WeightGradient => Box::new(move |p, stream| {
            GroupedGemmWeightGradient {
                dw: p[0].output(),
                dout: p[1].input(),
                x: p[2].input(),
                offsets: Some(p[3].input()),
                dout_row_token: None,
                x_row_token: None,
                rows,
                dout_rows: rows,
                x_rows: rows,
                experts,
                n,
                k,
                accumulate: false,
                tile: TILE_AUTO,
            }
            .launch(stream)
        }),
    }
}

/// ε of the LayerNorms.
pub const EPS: f32 = 1e-5;

/// Buffers: y, sum, dx, dweight, dbias, partials, x, residual, weight, bias, dy.
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
    let forward = move |p: &Bound, stream: &Stream| {
        let kernel = NormForward {
            y: p[0].output(),
            sum: Some(p[1].output()),
            x: p[6].input(),
            residual: Some(p[7].input()),
            weight: p[8].input(),
            bias: Some(p[9].input()),
            rows,
            hidden,
            eps: EPS,
        };
        kernel.launch(stream)
    };
    let backward = move |p: &Bound, stream: &Stream| {
        let kernel = NormBackward {
            dx: p[2].output(),
            partials: p[5].output(),
            dy: p[10].input(),
            skip: None,
            x: p[1].input(),
            weight: p[8].input(),
            rows,
            hidden,
            layernorm: true,
            eps: EPS,
        };
        kernel.launch(stream)?;
        for (parameter, gradient) in [3, 4].into_iter().enumerate() {
            let sum = NormWeightGradient {
                gradient: p[gradient].output(),
                partials: p[5].input().from_element(parameter * floats),
                rows,
                hidden,
                accumulate: false,
            };
            sum.launch(stream)?;
        }
        Ok(())
    };
    let both = move |p: &Bound, stream: &Stream| {
        forward(p, stream)?;
        backward(p, stream)
    };
    let (bf16, f32) = (DType::Bf16, DType::F32);
    Ok(Kernels {
        whole: whole(inputs.0, buffers, Box::new(both)),
        parts: vec![part(Box::new(forward)), part(Box::new(backward))],
        outputs: vec![
            (0, "y", bf16),
            (1, "sum", bf16),
            (2, "dx", bf16),
            (3, "dweight", f32),
            (4, "dbias", f32),
        ],
    })
}

/// Buffers: losses, dlogits, logits, targets.
fn cross_entropy(inputs: &Inputs, tokens: usize, vocabulary: usize) -> Kernels {
    let buffers = vec![
        Buffer::output("losses", 4 * tokens),
        Buffer::output("dlogits", 2 * tokens * vocabulary),
        Buffer::input("logits", &inputs.f32("logits", tokens * vocabulary, 2.0)),
        Buffer::input("targets", &inputs.ids("targets", tokens, vocabulary)),
    ];
    let launch = move |p: &Bound, stream: &Stream| {
        let kernel = CrossEntropyRows {
            losses: p[0].output(),
            dlogits: Some(p[1].output()),
            logits: p[2].input(),
            statistics: None,
            targets: p[3].input(),
            tokens,
            vocabulary,
            factor: 1.0 / tokens as f32,
        };
        kernel.launch(stream)
    };
    Kernels {
        whole: whole(inputs.0, buffers, Box::new(launch)),
        parts: vec![part(Box::new(launch))],
        outputs: vec![(0, "losses", DType::F32), (1, "dlogits", DType::Bf16)],
    }
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

/// Buffers: w, m, v, gradient; the table with this single parameter, the parameter of each block, the outcome of the step.
fn adamw(inputs: &Inputs, numbers: usize) -> Kernels {
    let normals = |name| inputs.f32(name, numbers, 1.0);
    let squares: Vec<f32> = normals("v").iter().map(|x| x * x).collect();
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
        Buffer::input("block_parameter", &vec![0i32; numbers.div_ceil(BLOCK)]),
        Buffer::table("outcome", 1, |_| {
            vec![routegrad_step_outcome {
                accepted: 1,
                coefficients: [COEFFICIENTS; 2],
                ..Default::default()
            }]
        }),
    ];
    let launch = move |p: &Bound, stream: &Stream| {
        let kernel = AdamwUpdate {
            parameters: p[4].input(),
            block_parameter: p[5].input(),
            outcome: p[6].input(),
            blocks: numbers.div_ceil(BLOCK),
            bf16_moments: false,
        };
        kernel.launch(stream)
    };
    let f32 = DType::F32;
    Kernels {
        whole: whole(inputs.0, buffers, Box::new(launch)),
        parts: vec![part(Box::new(launch))],
        outputs: vec![(0, "w", f32), (1, "m", f32), (2, "v", f32)],
    }
}

/// Buffers: out, log_sum_exp, dqkv, workspace, qkv, dout.
fn attention(machine: &dyn Machine, inputs: &Inputs, sizes: &AttentionSizes) -> Result<Kernels> {
    let s = *sizes;
    let tokens = s.sequences * s.sequence;
    let launchers = machine.launchers();
    let floats = workspace(launchers, tokens, s.sequence, s.heads)?;
    let (row, qkv) = (
        s.heads * s.width,
        (s.heads + 2 * s.key_value_heads) * s.width,
    );
    let buffers = vec![
        Buffer::output("out", 2 * tokens * row),
        Buffer::output("log_sum_exp", 4 * tokens * s.heads),
        Buffer::output("dqkv", 2 * tokens * qkv),
        Buffer::workspace("workspace", 4 * floats),
        Buffer::input("qkv", &inputs.bf16("qkv", tokens * qkv, 1.0)),
        Buffer::input("dout", &inputs.bf16("dout", tokens * row, 1.0)),
    ];
    let forward = move |p: &Bound, stream: &Stream| {
        AttentionForward {
            out: p[0].output(),
            log_sum_exp: p[1].output(),
            qkv: p[4].input(),
            first_key: None,
            tokens,
            sequence: s.sequence,
            heads: s.heads,
            key_value_heads: s.key_value_heads,
            head_width: s.width,
        }
        .launch(stream)
    };
    let backward = move |p: &Bound, stream: &Stream| {
        AttentionBackward {
            dqkv: p[2].output(),
            workspace: p[3].output(),
            dout: p[5].input(),
            qkv: p[4].input(),
            out: p[0].input(),
            log_sum_exp: p[1].input(),
            first_key: None,
            cosines: None,
            sines: None,
            tokens,
            sequence: s.sequence,
            heads: s.heads,
            key_value_heads: s.key_value_heads,
            head_width: s.width,
        }
        .launch(stream)
    };
    let both = move |p: &Bound, stream: &Stream| {
        forward(p, stream)?;
        backward(p, stream)
    };
    Ok(Kernels {
        whole: whole(inputs.0, buffers, Box::new(both)),
        parts: vec![part(Box::new(forward)), part(Box::new(backward))],
        outputs: vec![(0, "out", DType::Bf16), (2, "dqkv", DType::Bf16)],
    })
}
