//! An MoE layer built from kernels: the launches of `ops/routing.rs` and `ops/experts.rs` on fixed buffers, so that a
//! complete pass or a part of it can be timed, eagerly or from a graph.
//!
//! The router computes the scores of every token, but `choices`, an input of the case, determines the experts. The time
//! therefore does not depend on the choices of a router with random weights.

use super::case::Layer;
use super::inputs::{Inputs, unit_sum};
use super::layer_steps::{At, Sizes, Step};
use super::problem::{Kernels, part, whole};
use crate::error::Result;
use crate::kernels::grouped_swiglu::dot_columns;
use crate::kernels::launchers::{Launchers, TILE_AUTO};
use crate::kernels::{dispatch, router, router_backward};
use crate::tensor::dtype::DType;
use crate::verify::kernels::{Buffer, Launch, Machine};

fn forward(default: bool) -> Vec<Step> {
    let mut steps = vec![
        Step::Router,
        Step::Dispatch,
        Step::SortX,
        Step::GateUp,
        Step::Down(default),
    ];
    steps.extend(default.then_some(Step::Means));
    steps.push(Step::Combine(default));
    steps
}

fn backward(default: bool) -> Vec<Step> {
    vec![
        Step::SortDy(default),
        Step::SwigluBackward,
        Step::GateGradient(default),
        Step::DownWeight,
        Step::SortX,
        Step::GateUpWeight,
        Step::InputGradient,
        Step::CombineDx,
        Step::RouterBackward,
    ]
}

/// Workspace sizes that the launchers request.
struct Spaces {
    score_partials: usize,
    dispatch: usize,
    router_partials: usize,
}

/// Builds the layer's buffers; its parts are in the order of the group's cases.
///
/// # Errors
/// When a launcher does not support the sizes.
pub fn build(machine: &dyn Machine, inputs: &Inputs, layer: &Layer) -> Result<Kernels> {
    let s = layer.sizes();
    let mut sizes = Sizes {
        tokens: s.tokens,
        rows: s.rows,
        experts: s.experts,
        hidden: s.hidden,
        ffn: s.ffn,
        top_k: s.slots,
        dot_columns: 0,
    };
    let spaces = spaces(machine.launchers(), &mut sizes)?;
    let buffers = buffers(inputs, layer, &sizes, &spaces);
    let launch = |steps: Vec<Step>| -> Launch {
        Box::new(move |p, stream| {
            let mut steps = steps.iter();
            steps.try_for_each(|&step| sizes.launch(step, p, stream))
        })
    };
    let all = forward(true).into_iter().chain(backward(true)).collect();
    let parts = [
        forward(false),
        backward(false),
        forward(true),
        backward(true),
        vec![Step::Router],
        vec![Step::Combine(true)],
        vec![Step::Means],
        vec![Step::SortDy(true), Step::GateGradient(true)],
    ];
    let (bf16, f32) = (DType::Bf16, DType::F32);
    Ok(Kernels {
        whole: whole(inputs.0, buffers, launch(all)),
        parts: parts.map(|steps| part(launch(steps))).into(),
        outputs: vec![
            (At::Y as usize, "y", bf16),
            (At::Average as usize, "average", f32),
            (At::Dx as usize, "dx", bf16),
            (At::Drouter as usize, "drouter", f32),
            (At::Ddown as usize, "ddown", f32),
            (At::DgateUp as usize, "dgate_up", f32),
        ],
    })
}

fn spaces(launchers: &Launchers, sizes: &mut Sizes) -> Result<Spaces> {
    let Sizes {
        tokens,
        rows,
        experts,
        hidden,
        ffn,
        top_k,
        ..
    } = *sizes;
    sizes.dot_columns = dot_columns(launchers, rows, experts, hidden, ffn, TILE_AUTO)?;
    Ok(Spaces {
        score_partials: router::partials(launchers, tokens, experts)?,
        dispatch: dispatch::workspace(launchers, tokens, experts, top_k)?,
        router_partials: router_backward::workspace(launchers, tokens, experts, hidden)?,
    })
}

fn buffers(inputs: &Inputs, layer: &Layer, sizes: &Sizes, spaces: &Spaces) -> Vec<Buffer> {
    let s = layer.sizes();
    let (t, d, f, e, r) = (s.tokens, s.hidden, s.ffn, s.experts, s.rows);
    let bf16 = |name, count, deviation| Buffer::input(name, &inputs.bf16(name, count, deviation));
    let choices = inputs.choices(&layer.counts, t);
    let space = Buffer::workspace;
    // In the order of `At`.
    vec![
        bf16("x", t * d, 1.0),
        Buffer::input("router", &inputs.f32("router", e * d, unit_sum(d))),
        bf16("gate_up", e * 2 * f * d, unit_sum(d)),
        bf16("down", e * d * f, unit_sum(f)),
        Buffer::input("choices", &choices),
        bf16("dy", t * d, 1.0),
        Buffer::input("beta", &[0.9f32]),
        Buffer::changed("average", &inputs.f32("average", e * d, 1.0)),
        Buffer::changed("first_non_finite", &[i32::MAX]),
        space("scores", 4 * t * e),
        space("log_sum_exp", 4 * t),
        space("chosen", 4 * r),
        space("score_partials", 4 * spaces.score_partials),
        space("statistics", 4 * (2 * e + 2)),
        space("offsets", 4 * (e + 1)),
        space("row_token", 4 * r),
        space("row_slot", 4 * r),
        space("slot_row", 4 * r),
        Buffer::changed("fault", &[0i32]),
        space("dispatch_space", spaces.dispatch),
        space("x_rows", 2 * r * d),
        space("h", 4 * r * f),
        space("a", 2 * r * f),
        space("e_rows", 2 * r * d),
        space("column_sums", 4 * d * (r / 64 + e)),
        Buffer::output("y", 2 * t * d),
        space("dy_rows", 2 * r * d),
        space("dh", 4 * r * f),
        space("weighted_a", 2 * r * f),
        space("dots", 4 * r * sizes.dot_columns),
        space("dgates", 4 * t * e),
        Buffer::output("ddown", 4 * e * d * f),
        Buffer::output("dgate_up", 8 * e * f * d),
        space("dx_rows", 2 * r * d),
        Buffer::output("dx", 2 * t * d),
        space("dz", 4 * t * e),
        space("router_partials", 4 * spaces.router_partials),
        Buffer::output("drouter", 4 * e * d),
    ]
}
