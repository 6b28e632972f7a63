//! The launches of an MoE layer on the buffers of [`super::layer`], which are found by their names.

use crate::error::Result;
use crate::kernels::bindings::{ROUTEGRAD_SCORE_SOFTMAX, ROUTEGRAD_WEIGHTING_SUM_P};
use crate::kernels::cost::Sizes;
use crate::kernels::launchers::TILE_AUTO;
use crate::kernels::router::{RouterForward, RouterStatistics};
use crate::kernels::router_backward::{RouterBackward, RouterWeightGradient};
use crate::kernels::{
    Combine, DefaultDots, DispatchChoices, EmbeddingForward, ExpertMean, GateGradient,
    GroupedDownForward, GroupedGemmInputGradient, GroupedGemmWeightGradient, GroupedSwigluBackward,
    GroupedSwigluForward, Stream,
};
use crate::verify::kernels::{Bound, bind};

/// The launches on the buffers `p`. With `default`, a pass does the additional work of the router `default`.
pub struct Launches<'a> {
    pub sizes: Sizes,
    /// Number of partial dots of a row.
    pub dot_columns: usize,
    pub p: &'a Bound,
    pub stream: &'a Stream,
}

impl Launches<'_> {
    pub fn forward(&self, default: bool) -> Result<()> {
        self.router()?;
        self.dispatch()?;
        self.sort("x_rows", "x")?;
        self.gate_up()?;
        self.down(default)?;
        if default {
            self.means()?;
        }
        self.combine(default)
    }

    pub fn backward(&self, default: bool) -> Result<()> {
        let Sizes { hidden, ffn, .. } = self.sizes;
        self.sort_dy(default)?;
        self.swiglu_backward()?;
        self.gate_gradient(default)?;
        self.weight_gradient("ddown", ["dy_rows", "weighted_a"], [hidden, ffn])?;
        self.sort("x_rows", "x")?;
        self.weight_gradient("dgate_up", ["dh", "x_rows"], [2 * ffn, hidden])?;
        self.input_gradient()?;
        self.combine_dx()?;
        self.router_backward()
    }

    pub fn router(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, RouterForward {
            scores, log_sum_exp, choices = "chosen", partials = "score_partials", first_non_finite,
            x, w = "router";
            selection_bias: None, tokens: s.tokens, experts: s.experts, hidden: s.hidden,
            choices_per_token: s.slots, score: ROUTEGRAD_SCORE_SOFTMAX,
        })
        .launch(self.stream)?;
        bind!(p, RouterStatistics {
            statistics, partials = "score_partials";
            tokens: s.tokens, experts: s.experts,
        })
        .launch(self.stream)
    }

    fn dispatch(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, DispatchChoices {
            offsets, row_token, row_slot, slot_row, fault, workspace = "dispatch_space", choices;
            tokens: s.tokens, experts: s.experts, choices_per_token: s.slots, row_capacity: s.rows,
        })
        .launch(self.stream)
    }

    /// Copies rows in sorted order with the embedding lookup kernel.
    fn sort(&self, to: &str, from: &str) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, EmbeddingForward {
            y = to, w = from, ids = "row_token";
            tokens: s.rows, vocabulary: s.tokens, hidden: s.hidden,
        })
        .launch(self.stream)
    }

    /// Sorts dy; with `default`, the same kernel computes the dots with the default vectors.
    pub fn sort_dy(&self, default: bool) -> Result<()> {
        if !default {
            return self.sort("dy_rows", "dy");
        }
        let (p, s) = (self.p, self.sizes);
        bind!(p, DefaultDots {
            dgates, g_rows = "dy_rows", g = "dy", vectors = "average", slot_row;
            tokens: s.tokens, rows: s.rows, experts: s.experts, hidden: s.hidden, slots: s.slots,
        })
        .launch(self.stream)
    }

    fn gate_up(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, GroupedSwigluForward {
            h, a, x = "x_rows", w = "gate_up", offsets;
            row_token: None, rows: s.rows, x_rows: s.rows, experts: s.experts, ffn: s.ffn,
            hidden: s.hidden, tile: TILE_AUTO,
        })
        .launch(self.stream)
    }

    /// Computes the output of the experts; with `sums`, also the column sums that the expert means need.
    fn down(&self, sums: bool) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, GroupedDownForward {
            out = "e_rows", column_sums if sums, a, w = "down", gates = "scores", offsets, row_token;
            rows: s.rows, tokens: s.tokens, experts: s.experts, hidden: s.hidden, ffn: s.ffn,
            tile: TILE_AUTO,
        })
        .launch(self.stream)
    }

    pub fn means(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, ExpertMean {
            average, column_sums, gates = "scores", offsets, row_token, beta;
            rows: s.rows, tokens: s.tokens, experts: s.experts, hidden: s.hidden,
            weighting: ROUTEGRAD_WEIGHTING_SUM_P as i32,
        })
        .launch(self.stream)
    }

    /// Combines the outputs of the experts; with `default`, also the default vectors.
    pub fn combine(&self, default: bool) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, Combine {
            y, rows_in = "e_rows", gates = "scores", slot_row, choices,
            vectors = "average" if default;
            tokens: s.tokens, rows: s.rows, experts: s.experts, hidden: s.hidden, slots: s.slots,
            accumulate: false,
        })
        .launch(self.stream)
    }

    fn combine_dx(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, Combine {
            y = "dx", rows_in = "dx_rows", slot_row, choices;
            gates: None, vectors: None, tokens: s.tokens, rows: s.rows, experts: s.experts,
            hidden: s.hidden, slots: s.slots, accumulate: false,
        })
        .launch(self.stream)
    }

    fn swiglu_backward(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, GroupedSwigluBackward {
            dh, scaled_a = "weighted_a", dots, dout = "dy_rows", w = "down", h, gates = "scores",
            offsets, row_token;
            dout_row_token: None, rows: s.rows, dout_rows: s.rows, experts: s.experts,
            hidden: s.hidden, ffn: s.ffn, dot_columns: self.dot_columns, tile: TILE_AUTO,
        })
        .launch(self.stream)
    }

    /// With `keep`, the dots of the default vectors remain in `dgates`.
    pub fn gate_gradient(&self, keep: bool) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, GateGradient {
            dgates, dots, slot_row, choices;
            tokens: s.tokens, rows: s.rows, experts: s.experts, slots: s.slots,
            dot_columns: self.dot_columns, keep,
        })
        .launch(self.stream)
    }

    fn weight_gradient(&self, to: &str, [dout, x]: [&str; 2], [n, k]: [usize; 2]) -> Result<()> {
        let (p, rows) = (self.p, self.sizes.rows);
        bind!(p, GroupedGemmWeightGradient {
            dw = to, dout = dout, x = x, offsets;
            dout_row_token: None, x_row_token: None, rows, dout_rows: rows, x_rows: rows,
            experts: self.sizes.experts, n, k, accumulate: false, tile: TILE_AUTO,
        })
        .launch(self.stream)
    }

    fn input_gradient(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, GroupedGemmInputGradient {
            dx = "dx_rows", dout = "dh", w = "gate_up", offsets;
            row_token: None, rows: s.rows, dout_rows: s.rows, experts: s.experts, n: 2 * s.ffn,
            k: s.hidden, tile: TILE_AUTO,
        })
        .launch(self.stream)
    }

    fn router_backward(&self) -> Result<()> {
        let (p, s) = (self.p, self.sizes);
        bind!(p, RouterBackward {
            dx, dz, dw_partials = "router_partials", scores, dscores = "dgates", x, w = "router";
            log_sum_exp: None, dmean: None, dlse2: None, tokens: s.tokens, experts: s.experts,
            hidden: s.hidden, score: ROUTEGRAD_SCORE_SOFTMAX, accumulate: true,
        })
        .launch(self.stream)?;
        bind!(p, RouterWeightGradient {
            dw = "drouter", dw_partials = "router_partials";
            tokens: s.tokens, experts: s.experts, hidden: s.hidden, accumulate: false,
        })
        .launch(self.stream)
    }
}
