//! An MoE layer built from kernels: the launches of `ops/routing.rs` and `ops/experts.rs` on fixed buffers, so that a
//! complete pass or a part of it can be timed, eagerly or from a graph.
//!
//! The router computes the scores of every token, but `choices`, an input of the case, determines the experts. The time
//! therefore does not depend on the choices of a router with random weights.

use super::case::Layer;
use super::inputs::{Inputs, unit_sum};
use super::layer_launches::Launches;
use super::problem::Kernels;
use crate::error::Result;
use crate::kernels::cost::Sizes;
use crate::kernels::grouped_swiglu::dot_columns;
use crate::kernels::launchers::{Launchers, TILE_AUTO};
use crate::kernels::{dispatch, router, router_backward};
use crate::tensor::dtype::DType;
use crate::verify::kernels::{Buffer, Launch, Machine};

/// Workspace sizes that the launchers request.
struct Spaces {
    score_partials: usize,
    dispatch: usize,
    dot_columns: usize,
    router_partials: usize,
}

impl Spaces {
    fn new(launchers: &Launchers, s: &Sizes) -> Result<Self> {
        let (tokens, experts, hidden) = (s.tokens, s.experts, s.hidden);
        Ok(Self {
            score_partials: router::partials(launchers, tokens, experts)?,
            dispatch: dispatch::workspace(launchers, tokens, experts, s.slots)?,
            dot_columns: dot_columns(launchers, s.rows, experts, hidden, s.ffn, TILE_AUTO)?,
            router_partials: router_backward::workspace(launchers, tokens, experts, hidden)?,
        })
    }
}

/// Builds the layer's buffers; its parts are in the order of the group's cases.
///
/// # Errors
/// When a launcher does not support the sizes.
pub fn build(machine: &dyn Machine, inputs: &Inputs, layer: &Layer) -> Result<Kernels> {
    let sizes = layer.sizes();
    let spaces = Spaces::new(machine.launchers(), &sizes)?;
    let buffers = buffers(inputs, layer, &spaces);
    let dot_columns = spaces.dot_columns;
    let launch = |part: fn(&Launches) -> Result<()>| -> Launch {
        Box::new(move |p, stream| {
            part(&Launches {
                sizes,
                dot_columns,
                p,
                stream,
            })
        })
    };
    let parts: [fn(&Launches) -> Result<()>; 8] = [
        |l| l.forward(false),
        |l| l.backward(false),
        |l| l.forward(true),
        |l| l.backward(true),
        |l| l.router(),
        |l| l.combine(true),
        |l| l.means(),
        |l| {
            l.sort_dy(true)?;
            l.gate_gradient(true)
        },
    ];
    let whole = |l: &Launches| {
        l.forward(true)?;
        l.backward(true)
    };
    let (bf16, f32) = (DType::Bf16, DType::F32);
    let outputs = [
        ("y", bf16),
        ("average", f32),
        ("dx", bf16),
        ("drouter", f32),
        ("ddown", f32),
        ("dgate_up", f32),
    ];
    Ok(Kernels::new(
        inputs.0,
        buffers,
        launch(whole),
        parts.map(launch),
        &outputs,
    ))
}

fn buffers(inputs: &Inputs, layer: &Layer, spaces: &Spaces) -> Vec<Buffer> {
    let s = layer.sizes();
    let (t, d, f, e, r) = (s.tokens, s.hidden, s.ffn, s.experts, s.rows);
    let bf16 = |name, count, deviation| Buffer::input(name, &inputs.bf16(name, count, deviation));
    let choices = inputs.choices(&layer.counts, t);
    let space = Buffer::workspace;
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
        space("dots", 4 * r * spaces.dot_columns),
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
