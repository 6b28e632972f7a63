//! The launches of a MoE layer on the buffers of [`super::layer`].

use crate::error::Result;
use crate::kernels::bindings::{
    ROUTEGRAD_SCORE_SOFTMAX, ROUTEGRAD_WEIGHTING_SUM_P, routegrad_stream,
};
use crate::kernels::launchers::{Launchers, TILE_AUTO};
use crate::launch;
use std::ptr::{null, null_mut};

/// The buffers, in their order.
#[derive(Clone, Copy)]
pub enum At {
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
pub enum Step {
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

/// The sizes as launchers take them.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub tokens: i64,
    pub rows: i64,
    pub experts: i32,
    pub hidden: i32,
    pub ffn: i32,
    pub top_k: i32,
    pub dot_columns: i32,
}

impl Sizes {
    /// Launches one step on buffers that lie as [`At`] has them.
    ///
    /// # Errors
    /// When a launcher refuses.
    pub fn launch(
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
                launch! { launchers, embedding_forward(
                    at!(to), at!(from), at!(RowToken), rows, tokens as i32, hidden, stream
                ) }
            }
        };
        let weight = |to: At, dout: At, x: At, n: i32, k: i32| {
            // SAFETY: as below.
            unsafe {
                launch! { launchers, grouped_gemm_weight_gradient(
                    at!(to), at!(dout), at!(x), at!(Offsets), null(), null(), rows, rows, rows, experts, n, k,
                    0, TILE_AUTO, stream
                ) }
            }
        };
        let score = ROUTEGRAD_SCORE_SOFTMAX as i32;
        // SAFETY: every buffer has the size that the launchers' headers state.
        unsafe {
            match step {
                Step::Router => {
                    launch! { launchers, router_forward(
                        at!(Scores), at!(LogSumExp), at!(Chosen), at!(ScorePartials), at!(FirstNonFinite),
                        at!(X), at!(Router), null(), tokens, experts, hidden, top_k, score, stream
                    ) }?;
                    launch! { launchers, router_statistics(
                        at!(Statistics), at!(ScorePartials), tokens, experts, stream
                    ) }
                }
                Step::Dispatch => launch! { launchers, dispatch_choices(
                    at!(Offsets), at!(RowToken), at!(RowSlot), at!(SlotRow), at!(Fault), at!(DispatchSpace),
                    at!(Choices), tokens, experts, top_k, rows, stream
                ) },
                Step::SortX => sort(XRows, X),
                Step::GateUp => launch! { launchers, grouped_swiglu_forward(
                    at!(H), at!(A), at!(XRows), at!(GateUp), at!(Offsets), null(), rows, rows, experts, ffn,
                    hidden, TILE_AUTO, stream
                ) },
                Step::Down(sums) => {
                    let sums = if sums { at!(ColumnSums) } else { null_mut() };
                    launch! { launchers, grouped_down_forward(
                        at!(ERows), sums, at!(A), at!(Down), at!(Scores), at!(Offsets), at!(RowToken), rows,
                        tokens, experts, hidden, ffn, TILE_AUTO, stream
                    ) }
                }
                Step::Means => {
                    launch! { launchers, expert_sums(
                        at!(Sums), at!(Masses), at!(ColumnSums), at!(Scores), at!(Offsets), at!(RowToken), rows,
                        tokens, experts, hidden, stream
                    ) }?;
                    let weighting = ROUTEGRAD_WEIGHTING_SUM_P as i32;
                    launch! { launchers, expert_mean_update(
                        at!(Average), at!(Sums), at!(Masses), at!(Beta), experts, hidden, weighting, stream
                    ) }
                }
                Step::Combine(default) => launch! { launchers, combine(
                    at!(Y), at!(ERows), at!(Scores), at!(SlotRow), at!(Choices), vectors(default), tokens, rows,
                    experts, hidden, top_k, 0, stream
                ) },
                Step::SortDy => sort(DyRows, Dy),
                Step::SwigluBackward => launch! { launchers, grouped_swiglu_backward(
                    at!(Dh), at!(WeightedA), at!(Dots), at!(DyRows), at!(Down), at!(H), at!(Scores),
                    at!(Offsets), at!(RowToken), null(), rows, rows, experts, hidden, ffn, dot_columns,
                    TILE_AUTO, stream
                ) },
                Step::GateGradient(default) => launch! { launchers, gate_gradient(
                    at!(Dgates), at!(Dots), at!(Dy), vectors(default), at!(SlotRow), at!(Choices), tokens, rows,
                    experts, hidden, top_k, dot_columns, stream
                ) },
                Step::DownWeight => weight(Ddown, DyRows, WeightedA, hidden, ffn),
                Step::GateUpWeight => weight(DgateUp, Dh, XRows, 2 * ffn, hidden),
                Step::InputGradient => launch! { launchers, grouped_gemm_input_gradient(
                    at!(DxRows), at!(Dh), at!(GateUp), at!(Offsets), null(), rows, rows, experts, 2 * ffn,
                    hidden, TILE_AUTO, stream
                ) },
                Step::CombineDx => launch! { launchers, combine(
                    at!(Dx), at!(DxRows), null(), at!(SlotRow), at!(Choices), null(), tokens, rows, experts,
                    hidden, top_k, 0, stream
                ) },
                Step::RouterBackward => {
                    launch! { launchers, router_backward(
                        at!(Dx), at!(Dz), at!(RouterPartials), at!(Scores), null(), at!(Dgates), null(), null(),
                        at!(X), at!(Router), tokens, experts, hidden, score, 1, stream
                    ) }?;
                    launch! { launchers, router_weight_gradient(
                        at!(Drouter), at!(RouterPartials), tokens, experts, hidden, 0, stream
                    ) }
                }
            }
        }
    }
}
