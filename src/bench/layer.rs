//! A MoE layer in kernels: the launches of `ops/routing.rs` and `ops/experts.rs` on fixed buffers, so that a whole pass or
//! any part of it can be timed, eagerly or from a graph.
//!
//! The router scores every token, but rows go where the case says (`choices`, an input): what is timed does not depend on
//! what a router of random weights would choose.

use super::case::Layer;
use super::inputs::Inputs;
use super::kernels::{Kernels, part, unit_sum, whole};
use crate::check::kernels::{Buffer, Launch, Machine};
use crate::device::bindings::{
    ROUTEGRAD_SCORE_SOFTMAX, ROUTEGRAD_WEIGHTING_SUM_P, routegrad_stream,
};
use crate::device::launchers::{Launchers, TILE_AUTO};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch;
use std::ptr::{null, null_mut};

/// The buffers, in their order.
#[derive(Clone, Copy)]
enum At {
    X,
    Router,
    GateUp,
    Down,
    Choices,
    Dy,
    Beta,
    Average,
    FirstNonFinite,
    Scores,
    LogSumExp,
    Chosen,
    ScorePartials,
    Statistics,
    Offsets,
    RowToken,
    RowSlot,
    SlotRow,
    Fault,
    DispatchSpace,
    XRows,
    H,
    A,
    ERows,
    ColumnSums,
    Sums,
    Masses,
    Y,
    DyRows,
    Dh,
    WeightedA,
    Dots,
    Dgates,
    Ddown,
    DgateUp,
    DxRows,
    Dx,
    Dz,
    RouterPartials,
    Drouter,
}

/// One launch or two.
#[derive(Clone, Copy)]
enum Step {
    Router,
    Dispatch,
    SortX,
    GateUp,
    /// With the sums that the means need.
    Down(bool),
    Means,
    /// With the default vectors.
    Combine(bool),
    SortDy,
    SwigluBackward,
    /// With the default vectors.
    GateGradient(bool),
    DownWeight,
    GateUpWeight,
    InputGradient,
    CombineDx,
    RouterBackward,
}

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
        Step::SortDy,
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

/// The sizes as launchers take them.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: i64,
    rows: i64,
    experts: i32,
    hidden: i32,
    ffn: i32,
    top_k: i32,
    dot_columns: i32,
}

/// What the launchers say that workspaces need.
struct Spaces {
    score_partials: usize,
    dispatch: usize,
    router_partials: usize,
}

/// The layer's buffers; its parts stand in the order of the group's cases.
///
/// # Errors
/// When a launcher refuses the sizes.
pub fn build(machine: &dyn Machine, inputs: &Inputs, layer: &Layer) -> Result<Kernels> {
    let s = layer.sizes();
    let mut sizes = Sizes {
        tokens: s.tokens as i64,
        rows: s.rows as i64,
        experts: s.experts as i32,
        hidden: s.hidden as i32,
        ffn: s.ffn as i32,
        top_k: s.slots as i32,
        dot_columns: 0,
    };
    let spaces = spaces(machine.launchers(), &mut sizes)?;
    let buffers = buffers(inputs, layer, &sizes, &spaces);
    let launch = |steps: Vec<Step>| -> Launch {
        Box::new(move |launchers, p, stream| {
            let mut steps = steps.iter();
            steps.try_for_each(|&step| sizes.launch(step, launchers, p, stream))
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
        vec![Step::GateGradient(true)],
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
    let (mut scores, mut bytes, mut router, mut columns) = (0u64, 0u64, 0u64, 0i32);
    // SAFETY: each writes one number.
    unsafe {
        launch!(launchers, router_partials(&mut scores, tokens, experts))?;
        launch!(
            launchers,
            dispatch_workspace(&mut bytes, tokens, experts, top_k)
        )?;
        launch!(
            launchers,
            router_backward_workspace(&mut router, tokens, experts, hidden)
        )?;
        launch!(
            launchers,
            grouped_swiglu_dot_columns(&mut columns, rows, experts, hidden, ffn, TILE_AUTO)
        )?;
    }
    sizes.dot_columns = columns;
    Ok(Spaces {
        score_partials: scores as usize,
        dispatch: bytes as usize,
        router_partials: router as usize,
    })
}

fn buffers(inputs: &Inputs, layer: &Layer, sizes: &Sizes, spaces: &Spaces) -> Vec<Buffer> {
    let s = layer.sizes();
    let (t, d, f, e, r) = (s.tokens, s.hidden, s.ffn, s.experts, s.rows);
    let bf16 = |name, count, deviation| Buffer::input(name, &inputs.bf16(name, count, deviation));
    let choices = inputs.choices(&layer.counts, t);
    let space = Buffer::workspace;
    // As `At` has them.
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
        space("sums", 4 * e * d),
        space("masses", 8 * e),
        Buffer::output("y", 2 * t * d),
        space("dy_rows", 2 * r * d),
        space("dh", 4 * r * f),
        space("weighted_a", 2 * r * f),
        space("dots", 4 * r * sizes.dot_columns as usize),
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

impl Sizes {
    fn launch(
        self,
        step: Step,
        launchers: &Launchers,
        p: &[*mut u8],
        stream: routegrad_stream,
    ) -> Result<()> {
        use At::*;
        let Sizes {
            tokens,
            rows,
            experts,
            hidden,
            ffn,
            top_k,
            dot_columns,
        } = self;
        // The launchers' pointers have types; buffers have none.
        macro_rules! at {
            ($at:expr) => {
                p[$at as usize].cast()
            };
        }
        let vectors = |with: bool| {
            if with {
                p[Average as usize].cast::<f32>()
            } else {
                null_mut()
            }
        };
        let sort = |to: At, from: At| {
            // SAFETY: as below; a row is looked up as an embedding is.
            unsafe {
                launch!(
                    launchers,
                    embedding_forward(
                        at!(to),
                        at!(from),
                        at!(RowToken),
                        rows,
                        tokens as i32,
                        hidden,
                        stream
                    )
                )
            }
        };
        let weight = |to: At, dout: At, x: At, n: i32, k: i32| {
            // SAFETY: as below.
            unsafe {
                launch!(
                    launchers,
                    grouped_gemm_weight_gradient(
                        at!(to),
                        at!(dout),
                        at!(x),
                        at!(Offsets),
                        null(),
                        null(),
                        rows,
                        rows,
                        rows,
                        experts,
                        n,
                        k,
                        0,
                        TILE_AUTO,
                        stream
                    )
                )
            }
        };
        let score = ROUTEGRAD_SCORE_SOFTMAX as i32;
        // SAFETY: every buffer has the size that the launchers' headers state.
        unsafe {
            match step {
                Step::Router => {
                    launch!(
                        launchers,
                        router_forward(
                            at!(Scores),
                            at!(LogSumExp),
                            at!(Chosen),
                            at!(ScorePartials),
                            at!(FirstNonFinite),
                            at!(X),
                            at!(Router),
                            null(),
                            tokens,
                            experts,
                            hidden,
                            top_k,
                            score,
                            stream
                        )
                    )?;
                    launch!(
                        launchers,
                        router_statistics(
                            at!(Statistics),
                            at!(ScorePartials),
                            tokens,
                            experts,
                            stream
                        )
                    )
                }
                Step::Dispatch => launch!(
                    launchers,
                    dispatch_choices(
                        at!(Offsets),
                        at!(RowToken),
                        at!(RowSlot),
                        at!(SlotRow),
                        at!(Fault),
                        at!(DispatchSpace),
                        at!(Choices),
                        tokens,
                        experts,
                        top_k,
                        rows,
                        stream
                    )
                ),
                Step::SortX => sort(XRows, X),
                Step::GateUp => launch!(
                    launchers,
                    grouped_swiglu_forward(
                        at!(H),
                        at!(A),
                        at!(XRows),
                        at!(GateUp),
                        at!(Offsets),
                        null(),
                        rows,
                        rows,
                        experts,
                        ffn,
                        hidden,
                        TILE_AUTO,
                        stream
                    )
                ),
                Step::Down(sums) => {
                    let sums = if sums { at!(ColumnSums) } else { null_mut() };
                    launch!(
                        launchers,
                        grouped_down_forward(
                            at!(ERows),
                            sums,
                            at!(A),
                            at!(Down),
                            at!(Scores),
                            at!(Offsets),
                            at!(RowToken),
                            rows,
                            tokens,
                            experts,
                            hidden,
                            ffn,
                            TILE_AUTO,
                            stream
                        )
                    )
                }
                Step::Means => {
                    launch!(
                        launchers,
                        expert_sums(
                            at!(Sums),
                            at!(Masses),
                            at!(ColumnSums),
                            at!(Scores),
                            at!(Offsets),
                            at!(RowToken),
                            rows,
                            tokens,
                            experts,
                            hidden,
                            stream
                        )
                    )?;
                    let weighting = ROUTEGRAD_WEIGHTING_SUM_P as i32;
                    launch!(
                        launchers,
                        expert_mean_update(
                            at!(Average),
                            at!(Sums),
                            at!(Masses),
                            at!(Beta),
                            experts,
                            hidden,
                            weighting,
                            stream
                        )
                    )
                }
                Step::Combine(default) => launch!(
                    launchers,
                    combine(
                        at!(Y),
                        at!(ERows),
                        at!(Scores),
                        at!(SlotRow),
                        at!(Choices),
                        vectors(default),
                        tokens,
                        rows,
                        experts,
                        hidden,
                        top_k,
                        0,
                        stream
                    )
                ),
                Step::SortDy => sort(DyRows, Dy),
                Step::SwigluBackward => launch!(
                    launchers,
                    grouped_swiglu_backward(
                        at!(Dh),
                        at!(WeightedA),
                        at!(Dots),
                        at!(DyRows),
                        at!(Down),
                        at!(H),
                        at!(Scores),
                        at!(Offsets),
                        at!(RowToken),
                        null(),
                        rows,
                        rows,
                        experts,
                        hidden,
                        ffn,
                        dot_columns,
                        TILE_AUTO,
                        stream
                    )
                ),
                Step::GateGradient(default) => launch!(
                    launchers,
                    gate_gradient(
                        at!(Dgates),
                        at!(Dots),
                        at!(Dy),
                        vectors(default),
                        at!(SlotRow),
                        at!(Choices),
                        tokens,
                        rows,
                        experts,
                        hidden,
                        top_k,
                        dot_columns,
                        stream
                    )
                ),
                Step::DownWeight => weight(Ddown, DyRows, WeightedA, hidden, ffn),
                Step::GateUpWeight => weight(DgateUp, Dh, XRows, 2 * ffn, hidden),
                Step::InputGradient => launch!(
                    launchers,
                    grouped_gemm_input_gradient(
                        at!(DxRows),
                        at!(Dh),
                        at!(GateUp),
                        at!(Offsets),
                        null(),
                        rows,
                        rows,
                        experts,
                        2 * ffn,
                        hidden,
                        TILE_AUTO,
                        stream
                    )
                ),
                Step::CombineDx => launch!(
                    launchers,
                    combine(
                        at!(Dx),
                        at!(DxRows),
                        null(),
                        at!(SlotRow),
                        at!(Choices),
                        null(),
                        tokens,
                        rows,
                        experts,
                        hidden,
                        top_k,
                        0,
                        stream
                    )
                ),
                Step::RouterBackward => {
                    launch!(
                        launchers,
                        router_backward(
                            at!(Dx),
                            at!(Dz),
                            at!(RouterPartials),
                            at!(Scores),
                            null(),
                            at!(Dgates),
                            null(),
                            null(),
                            at!(X),
                            at!(Router),
                            tokens,
                            experts,
                            hidden,
                            score,
                            1,
                            stream
                        )
                    )?;
                    launch!(
                        launchers,
                        router_weight_gradient(
                            at!(Drouter),
                            at!(RouterPartials),
                            tokens,
                            experts,
                            hidden,
                            0,
                            stream
                        )
                    )
                }
            }
        }
    }
}
