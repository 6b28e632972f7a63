//! The launches of an MoE layer on the buffers of [`super::layer`].

use crate::error::Result;
use crate::kernels::bindings::{ROUTEGRAD_SCORE_SOFTMAX, ROUTEGRAD_WEIGHTING_SUM_P};
use crate::kernels::launchers::TILE_AUTO;
use crate::kernels::router::{RouterForward, RouterStatistics};
use crate::kernels::router_backward::{RouterBackward, RouterWeightGradient};
use crate::kernels::{
    Buffer, Combine, DefaultDots, DispatchChoices, EmbeddingForward, ExpertMean, GateGradient,
    GroupedDownForward, GroupedGemmInputGradient, GroupedGemmWeightGradient, GroupedSwigluBackward,
    GroupedSwigluForward, In, Out, Stream,
};

/// The buffers, in order.
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

/// One launch, or two launches for the router.
#[derive(Clone, Copy)]
pub enum Step {
    Router,
    Dispatch,
    SortX,
    GateUp,
    /// With the column sums that the expert means need.
    Down(bool),
    Means,
    /// With the default vectors.
    Combine(bool),
    /// With the dots of the default vectors.
    SortDy(bool),
    SwigluBackward,
    /// After the dots of the default vectors.
    GateGradient(bool),
    DownWeight,
    GateUpWeight,
    InputGradient,
    CombineDx,
    RouterBackward,
}

/// The sizes of the layer.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub tokens: usize,
    pub rows: usize,
    pub experts: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub top_k: usize,
    pub dot_columns: usize,
}

/// Buffers in the order of [`At`].
struct Buffers<'a>(&'a [Buffer]);

impl<'a> Buffers<'a> {
    fn input<T>(&self, at: At) -> In<'a, T> {
        self.0[at as usize].input()
    }
    fn output<T>(&self, at: At) -> Out<'a, T> {
        self.0[at as usize].output()
    }
}

impl Sizes {
    /// Launches one step on buffers in the order of [`At`].
    ///
    /// # Errors
    /// When a launcher returns an error.
    pub fn launch(self, step: Step, buffers: &[Buffer], stream: &Stream) -> Result<()> {
        use At::*;
        let p = Buffers(buffers);
        match step {
            Step::Router | Step::RouterBackward => self.launch_router(step, &p, stream),
            Step::Dispatch => DispatchChoices {
                offsets: p.output(Offsets),
                row_token: p.output(RowToken),
                row_slot: p.output(RowSlot),
                slot_row: p.output(SlotRow),
                fault: p.output(Fault),
                workspace: p.output(DispatchSpace),
                choices: p.input(Choices),
                tokens: self.tokens,
                experts: self.experts,
                choices_per_token: self.top_k,
                row_capacity: self.rows,
            }
            .launch(stream),
            Step::SortX => self.sort(XRows, X, &p, stream),
            Step::SortDy(false) => self.sort(DyRows, Dy, &p, stream),
            Step::SortDy(true) => DefaultDots {
                dgates: p.output(Dgates),
                g_rows: Some(p.output(DyRows)),
                g: p.input(Dy),
                vectors: p.input(Average),
                slot_row: Some(p.input(SlotRow)),
                tokens: self.tokens,
                rows: self.rows,
                experts: self.experts,
                hidden: self.hidden,
                slots: self.top_k,
            }
            .launch(stream),
            Step::GateUp | Step::Down(_) | Step::SwigluBackward | Step::InputGradient => {
                self.launch_product(step, &p, stream)
            }
            Step::DownWeight => self.weight(
                Ddown,
                [DyRows, WeightedA],
                [self.hidden, self.ffn],
                &p,
                stream,
            ),
            Step::GateUpWeight => self.weight(
                DgateUp,
                [Dh, XRows],
                [2 * self.ffn, self.hidden],
                &p,
                stream,
            ),
            Step::Means => self.means(&p, stream),
            Step::Combine(default) => self.combine(
                Y,
                ERows,
                Some(p.input(Scores)),
                default.then(|| p.input(Average)),
                &p,
                stream,
            ),
            Step::CombineDx => self.combine(Dx, DxRows, None, None, &p, stream),
            Step::GateGradient(default) => GateGradient {
                dgates: p.output(Dgates),
                dots: p.input(Dots),
                slot_row: p.input(SlotRow),
                choices: Some(p.input(Choices)),
                tokens: self.tokens,
                rows: self.rows,
                experts: self.experts,
                slots: self.top_k,
                dot_columns: self.dot_columns,
                keep: default,
            }
            .launch(stream),
        }
    }

    /// Copies rows in sorted order with the embedding lookup kernel.
    fn sort(self, to: At, from: At, p: &Buffers<'_>, stream: &Stream) -> Result<()> {
        EmbeddingForward {
            y: p.output(to),
            w: p.input(from),
            ids: p.input(At::RowToken),
            tokens: self.rows,
            vocabulary: self.tokens,
            hidden: self.hidden,
        }
        .launch(stream)
    }

    fn weight(
        self,
        to: At,
        [dout, x]: [At; 2],
        [n, k]: [usize; 2],
        p: &Buffers<'_>,
        stream: &Stream,
    ) -> Result<()> {
        GroupedGemmWeightGradient {
            dw: p.output(to),
            dout: p.input(dout),
            x: p.input(x),
            offsets: Some(p.input(At::Offsets)),
            dout_row_token: None,
            x_row_token: None,
            rows: self.rows,
            dout_rows: self.rows,
            x_rows: self.rows,
            experts: self.experts,
            n,
            k,
            accumulate: false,
            tile: TILE_AUTO,
        }
        .launch(stream)
    }

    fn combine(
        self,
        y: At,
        rows: At,
        gates: Option<In<'_, f32>>,
        vectors: Option<In<'_, f32>>,
        p: &Buffers<'_>,
        stream: &Stream,
    ) -> Result<()> {
        Combine {
            y: p.output(y),
            rows_in: p.input(rows),
            gates,
            slot_row: p.input(At::SlotRow),
            choices: Some(p.input(At::Choices)),
            vectors,
            tokens: self.tokens,
            rows: self.rows,
            experts: self.experts,
            hidden: self.hidden,
            slots: self.top_k,
            accumulate: false,
        }
        .launch(stream)
    }

    fn means(self, p: &Buffers<'_>, stream: &Stream) -> Result<()> {
        use At::*;
        ExpertMean {
            average: p.output(Average),
            column_sums: p.input(ColumnSums),
            gates: Some(p.input(Scores)),
            offsets: p.input(Offsets),
            row_token: p.input(RowToken),
            beta: p.input(Beta),
            rows: self.rows,
            tokens: self.tokens,
            experts: self.experts,
            hidden: self.hidden,
            weighting: ROUTEGRAD_WEIGHTING_SUM_P as i32,
        }
        .launch(stream)
    }

    fn launch_product(self, step: Step, p: &Buffers<'_>, stream: &Stream) -> Result<()> {
        use At::*;
        let Sizes {
            tokens,
            rows,
            experts,
            hidden,
            ffn,
            dot_columns,
            ..
        } = self;
        let (offsets, tile) = (Some(p.input(Offsets)), TILE_AUTO);
        match step {
            Step::GateUp => GroupedSwigluForward {
                h: p.output(H),
                a: p.output(A),
                x: p.input(XRows),
                w: p.input(GateUp),
                offsets,
                row_token: None,
                rows,
                x_rows: rows,
                experts,
                ffn,
                hidden,
                tile,
            }
            .launch(stream),
            Step::Down(sums) => GroupedDownForward {
                out: p.output(ERows),
                column_sums: sums.then(|| p.output(ColumnSums)),
                a: p.input(A),
                w: p.input(Down),
                gates: Some(p.input(Scores)),
                offsets,
                row_token: Some(p.input(RowToken)),
                rows,
                tokens,
                experts,
                hidden,
                ffn,
                tile,
            }
            .launch(stream),
            Step::SwigluBackward => GroupedSwigluBackward {
                dh: p.output(Dh),
                scaled_a: p.output(WeightedA),
                dots: p.output(Dots),
                dout: p.input(DyRows),
                w: p.input(Down),
                h: p.input(H),
                gates: p.input(Scores),
                offsets,
                row_token: Some(p.input(RowToken)),
                dout_row_token: None,
                rows,
                dout_rows: rows,
                experts,
                hidden,
                ffn,
                dot_columns,
                tile,
            }
            .launch(stream),
            _ => GroupedGemmInputGradient {
                dx: p.output(DxRows),
                dout: p.input(Dh),
                w: p.input(GateUp),
                offsets,
                row_token: None,
                rows,
                dout_rows: rows,
                experts,
                n: 2 * ffn,
                k: hidden,
                tile,
            }
            .launch(stream),
        }
    }

    fn launch_router(self, step: Step, p: &Buffers<'_>, stream: &Stream) -> Result<()> {
        use At::*;
        let Sizes {
            tokens,
            experts,
            hidden,
            top_k,
            ..
        } = self;
        let score = ROUTEGRAD_SCORE_SOFTMAX;
        if let Step::Router = step {
            RouterForward {
                scores: p.output(Scores),
                log_sum_exp: p.output(LogSumExp),
                choices: Some(p.output(Chosen)),
                partials: p.output(ScorePartials),
                first_non_finite: p.output(FirstNonFinite),
                x: p.input(X),
                w: p.input(Router),
                selection_bias: None,
                tokens,
                experts,
                hidden,
                choices_per_token: top_k,
                score,
            }
            .launch(stream)?;
            return RouterStatistics {
                statistics: p.output(Statistics),
                partials: p.input(ScorePartials),
                tokens,
                experts,
            }
            .launch(stream);
        }
        RouterBackward {
            dx: p.output(Dx),
            dz: p.output(Dz),
            dw_partials: p.output(RouterPartials),
            scores: p.input(Scores),
            log_sum_exp: None,
            dscores: Some(p.input(Dgates)),
            dmean: None,
            dlse2: None,
            x: p.input(X),
            w: p.input(Router),
            tokens,
            experts,
            hidden,
            score,
            accumulate: true,
        }
        .launch(stream)?;
        RouterWeightGradient {
            dw: p.output(Drouter),
            dw_partials: p.input(RouterPartials),
            tokens,
            experts,
            hidden,
            accumulate: false,
        }
        .launch(stream)
    }
}
