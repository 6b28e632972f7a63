//! The experts of a MoE layer, from dispatched tokens to the layer's output.
//!
//! For token t with chosen experts A_t, gates `w [T, E]` and default vectors ê (or none):
//! `h_r = G_e x_t` (gate above up, `[R, 2F]`), `a = silu(gate) ⊙ up`, `e_r = D_e a_r`,
//! `y_t = Σ_{i∈A} w_ti e_i + Σ_{i∉A} w_ti ê_i` (Default MoE, 2504.12463, eq. 11).
//!
//! On the CPU it is a composition of `expert_rows` and `combine`. On a device with
//! kernels it is one operation, which keeps x, the gates and h, `2·T·D + 4·T·E + 4·R·F` bytes, and no
//! expert's output. With g = dy and `A′ = D_eᵀ g`: `dw_ti = ⟨g, e_i⟩ = ⟨A′, a⟩` on A and `⟨g, ê_i⟩` off
//! it, `dD_e = Σ_r g (w a)ᵀ`, `dh = w A′ ⊙ swiglu′(h)`, `dG_e = Σ_r dh xᵀ`, `dx_t = Σ_r G_eᵀ dh_r`
//! (as SonicMoE, 2512.14080, section 3).

use super::combine::{Defaults, combine};
use super::dispatch::{DeviceMaps, Dispatch};
use super::embedding;
use super::expert_mean::{ExpertSums, Weighting};
use super::expert_rows::expert_rows;
use super::linear::kernels as product;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::grouped_swiglu::dot_columns;
use crate::kernels::launchers::TILE_AUTO;
use crate::kernels::{
    Combine, DefaultDots, GateGradient, GroupedDownForward, GroupedGemmInputGradient,
    GroupedSwigluBackward, GroupedSwigluForward, Stream,
};
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use std::rc::Rc;

/// The inputs of the experts.
pub struct Experts<'a> {
    /// `[T, D]`.
    pub x: &'a Var,
    /// `[T, E]`.
    pub gates: &'a Var,
    /// `[E, 2F, D]`: gate above up.
    pub gate_up: &'a Var,
    /// `[E, D, F]`.
    pub down: &'a Var,
    /// `[T, E]`: the weight of an output in the weighted sums of the outputs; the gates if absent.
    pub sum_weights: Option<&'a Tensor>,
}

/// Returns the layer's output `[T, D]`. `defaults` is called after the experts and before the combination. It gets
/// the sums of the experts' outputs if `weighting` is given.
///
/// # Errors
/// Returns an error when the shapes do not fit each other or the dispatch, and the errors of `defaults`.
pub fn experts(
    tape: &Tape,
    input: Experts<'_>,
    dispatch: &Rc<Dispatch>,
    weighting: Option<Weighting>,
    defaults: impl FnOnce(Option<ExpertSums>) -> Result<Option<Defaults>>,
) -> Result<Var> {
    let Experts {
        x,
        gates,
        gate_up,
        down,
        sum_weights,
    } = input;
    let sum_weights = sum_weights.unwrap_or(gates.tensor());
    if x.tensor().device() == Device::Cpu {
        let e = expert_rows(tape, [x, gate_up, down], dispatch)?;
        let sums = weighting
            .map(|w| ExpertSums::of_rows(e.tensor(), sum_weights, w, dispatch))
            .transpose()?;
        return combine(tape, gates, &e, defaults(sums)?, dispatch);
    }
    let inputs = [x, gates, gate_up, down];
    let mut layer = Layer {
        sizes: Sizes::of(inputs.map(Var::tensor), dispatch)?,
        dispatch: dispatch.clone(),
        defaults: None,
    };
    let forward = layer.run(inputs.map(Var::tensor), sum_weights, weighting, defaults)?;
    let mut outputs = tape.record_run(layer, &inputs, forward);
    Ok(outputs.remove(0))
}

/// Returns the sums of the experts' outputs over the rows of a dispatch, weighted by `weights [T, E]`. The outputs
/// themselves are not returned: these rows belong to no token's output.
///
/// # Errors
/// Returns an error when the shapes do not fit each other or the dispatch.
pub fn sums_of_rows(
    [x, weights, gate_up, down]: [&Tensor; 4],
    dispatch: &Rc<Dispatch>,
    weighting: Weighting,
) -> Result<ExpertSums> {
    if x.device() == Device::Cpu {
        let inputs = [x, gate_up, down].map(|t| Var::constant(t.clone()));
        let [x, gate_up, down] = &inputs;
        let tape = Tape::without_gradients();
        let e = expert_rows(&tape, [x, gate_up, down], dispatch)?;
        return ExpertSums::of_rows(e.tensor(), weights, weighting, dispatch);
    }
    let layer = Layer {
        sizes: Sizes::of([x, weights, gate_up, down], dispatch)?,
        dispatch: dispatch.clone(),
        defaults: None,
    };
    let rows = layer.rows([x, weights, gate_up, down], Some(weighting))?;
    match rows.sums {
        Some(sums) => Ok(sums),
        None => unreachable!("sums were requested"),
    }
}

/// The results of the experts for the dispatched rows.
struct ExpertRows {
    /// Gate above up, `[R, 2F]`.
    h: Tensor,
    /// `[R, D]`.
    e: Tensor,
    sums: Option<ExpertSums>,
}

/// The kernels of `kernels/grouped_swiglu.cu`, `grouped_gemm.cu`, `expert_mean.cu`, `combine.cu` and
/// `gate_gradient.cu`.
struct Layer {
    sizes: Sizes,
    dispatch: Rc<Dispatch>,
    defaults: Option<Defaults>,
}

#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    rows: usize,
    experts: usize,
    hidden: usize,
    ffn: usize,
}

impl Sizes {
    fn of([x, gates, gate_up, down]: [&Tensor; 4], dispatch: &Dispatch) -> Result<Self> {
        let (tokens, hidden) = (x.shape().rows(), x.shape().width());
        let (experts, ffn) = (gates.shape().width(), down.shape().width());
        for (what, t, shape, dtype) in [
            ("x", x, &[tokens, hidden][..], DType::Bf16),
            ("gates", gates, &[tokens, experts], DType::F32),
            ("gate_up", gate_up, &[experts, 2 * ffn, hidden], DType::Bf16),
            ("down", down, &[experts, hidden, ffn], DType::Bf16),
        ] {
            t.expect_shape("experts", what, shape)?;
            t.expect_dtype("experts", what, dtype)?;
        }
        let selection = dispatch.selection();
        if (selection.num_tokens(), selection.num_experts()) != (tokens, experts) {
            let (t, e) = (selection.num_tokens(), selection.num_experts());
            return Err(Error::invalid(
                "experts",
                format!("a dispatch of {tokens} tokens to {experts} experts"),
                format!("one of {t} tokens to {e} experts"),
                "dispatch the tokens that the gates belong to",
            ));
        }
        Ok(Sizes {
            tokens,
            // A kernel needs at least one row; the offsets then state that no expert has a row.
            rows: dispatch.num_rows().max(1),
            experts,
            hidden,
            ffn,
        })
    }
}

impl Layer {
    fn new_rows(&self, like: &Tensor, width: usize) -> Tensor {
        Tensor::unspecified(like.device(), DType::Bf16, [self.sizes.rows, width])
    }

    fn run(
        &mut self,
        [x, gates, gate_up, down]: [&Tensor; 4],
        sum_weights: &Tensor,
        weighting: Option<Weighting>,
        defaults: impl FnOnce(Option<ExpertSums>) -> Result<Option<Defaults>>,
    ) -> Result<Forward> {
        let ExpertRows { h, e, sums } = self.rows([x, sum_weights, gate_up, down], weighting)?;
        let maps = self.dispatch.maps(x.device())?;
        self.defaults = defaults(sums)?;
        let vectors = self.defaults.as_ref().filter(|d| d.in_forward);
        let mut y = x.unspecified_like();
        let vectors = vectors.map(|d| &d.vectors);
        self.combine(&mut y, Accumulate::Assign, &e, Some(gates), vectors, maps)?;
        Ok(Forward::one(
            y,
            [x, gates, gate_up, down]
                .into_iter()
                .cloned()
                .chain([h])
                .collect(),
        ))
    }

    /// Returns the experts' rows, and their sums if `weighting` is given.
    fn rows(
        &self,
        [x, sum_weights, gate_up, down]: [&Tensor; 4],
        weighting: Option<Weighting>,
    ) -> Result<ExpertRows> {
        let device = x.device();
        let stream = Stream::of(device)?;
        let maps = self.dispatch.maps(device)?;
        let s = self.sizes;
        let (mut h, mut a) = (self.new_rows(x, 2 * s.ffn), self.new_rows(x, s.ffn));
        let mut e = self.new_rows(x, s.hidden);
        let sorted = self.sorted(x, maps)?;
        let lines = GroupedDownForward::column_sum_lines(s.rows, s.experts);
        let mut partials =
            weighting.map(|_| Tensor::unspecified(device, DType::F32, [lines, s.hidden]));
        let weights = match weighting {
            Some(Weighting::Plain) | None => None,
            Some(_) => Some(sum_weights.input()?),
        };
        GroupedSwigluForward {
            h: h.output()?,
            a: a.output()?,
            x: sorted.input()?,
            w: gate_up.input()?,
            offsets: Some(maps.offsets.input()?),
            row_token: None,
            rows: s.rows,
            x_rows: s.rows,
            experts: s.experts,
            ffn: s.ffn,
            hidden: s.hidden,
            tile: TILE_AUTO,
        }
        .launch(&stream)?;
        GroupedDownForward {
            out: e.output()?,
            column_sums: partials.as_mut().map(Tensor::output).transpose()?,
            a: a.input()?,
            w: down.input()?,
            gates: weights,
            offsets: Some(maps.offsets.input()?),
            row_token: Some(maps.row_token.input()?),
            rows: s.rows,
            tokens: s.tokens,
            experts: s.experts,
            hidden: s.hidden,
            ffn: s.ffn,
            tile: TILE_AUTO,
        }
        .launch(&stream)?;
        let sums = match (&partials, weighting) {
            (Some(partials), Some(weighting)) => Some(ExpertSums::of_partials(
                partials,
                sum_weights,
                weighting,
                &self.dispatch,
            )?),
            _ => None,
        };
        Ok(ExpertRows { h, e, sums })
    }

    /// `y_t (+)= Σ` of token t's rows, weighted by the gates if there are any, and of the default
    /// vectors.
    #[allow(clippy::too_many_arguments)]
    fn combine(
        &self,
        y: &mut Tensor,
        accumulate: Accumulate,
        rows: &Tensor,
        gates: Option<&Tensor>,
        vectors: Option<&Tensor>,
        maps: &DeviceMaps,
    ) -> Result<()> {
        let s = self.sizes;
        let stream = Stream::of(y.device())?;
        Combine {
            y: y.output()?,
            rows_in: rows.input()?,
            gates: gates.map(Tensor::input).transpose()?,
            slot_row: maps.slot_row.input()?,
            choices: maps.choices.as_ref().map(Tensor::input).transpose()?,
            vectors: vectors.map(Tensor::input).transpose()?,
            tokens: s.tokens,
            rows: s.rows,
            experts: s.experts,
            hidden: s.hidden,
            slots: maps.slots,
            accumulate: accumulate == Accumulate::Add,
        }
        .launch(&stream)
    }
}

impl Layer {
    /// Returns the rows of `tokens [T, D]`, sorted by expert. On an H200, a product that gathers the rows itself
    /// takes 2.6 times as long as one that loads sorted rows by TMA; the copy takes 1% of the time of the product.
    fn sorted(&self, tokens: &Tensor, maps: &DeviceMaps) -> Result<Tensor> {
        let mut rows = self.new_rows(tokens, self.sizes.hidden);
        embedding::kernels::forward(&mut rows, tokens, &maps.row_token)?;
        Ok(rows)
    }

    /// `dw_e (+)= Σ_r dout_r x_rᵀ`.
    fn weight_gradient(
        &self,
        dw: &mut Tensor,
        accumulate: Accumulate,
        [dout, x]: [&Tensor; 2],
        maps: &DeviceMaps,
    ) -> Result<()> {
        let (dout, x, offsets) = (dout.input()?, x.input()?, Some(&maps.offsets));
        product::weight_gradient_of(dw, accumulate, dout, x, self.sizes.rows, offsets)
    }

    /// Returns dy `[R, D]` sorted by expert and, if the gradient of the gates needs them, its dot products with the
    /// default vectors `[T, E]`. dy is read once for both.
    fn sorted_with_dots(
        &self,
        dy: &Tensor,
        of_gates: bool,
        maps: &DeviceMaps,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let Some(defaults) = self.defaults.as_ref().filter(|_| of_gates) else {
            return Ok((self.sorted(dy, maps)?, None));
        };
        let s = self.sizes;
        let mut rows = self.new_rows(dy, s.hidden);
        let mut dots = Tensor::unspecified(dy.device(), DType::F32, [s.tokens, s.experts]);
        DefaultDots {
            dgates: dots.output()?,
            g_rows: Some(rows.output()?),
            g: dy.input()?,
            vectors: defaults.vectors.input()?,
            slot_row: Some(maps.slot_row.input()?),
            tokens: s.tokens,
            rows: s.rows,
            experts: s.experts,
            hidden: s.hidden,
            slots: maps.slots,
        }
        .launch(&Stream::of(dy.device())?)?;
        Ok((rows, Some(dots)))
    }

    /// Returns dw `[T, E]`: on A the dot products of the rows, off A those of the default vectors, or 0.
    fn gate_gradient(
        &self,
        gates: &Tensor,
        dots: &Tensor,
        default_dots: Option<Tensor>,
        maps: &DeviceMaps,
    ) -> Result<Tensor> {
        let (s, keep) = (self.sizes, default_dots.is_some());
        let mut dgates = default_dots.unwrap_or_else(|| gates.unspecified_like());
        GateGradient {
            dgates: dgates.output()?,
            dots: dots.input()?,
            slot_row: maps.slot_row.input()?,
            choices: maps.choices.as_ref().map(Tensor::input).transpose()?,
            tokens: s.tokens,
            rows: s.rows,
            experts: s.experts,
            slots: maps.slots,
            dot_columns: dots.shape().width(),
            keep,
        }
        .launch(&Stream::of(gates.device())?)?;
        Ok(dgates)
    }
}

impl Op for Layer {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn runs_on(&self, device: Device) -> bool {
        device != Device::Cpu
    }

    fn forward(&self, _inputs: &[&Tensor]) -> Result<Forward> {
        unreachable!("the experts run before they are recorded")
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let [x, gates, gate_up, down, h] = saved else {
            unreachable!("the experts keep five tensors")
        };
        let dy = only(douts);
        let device = x.device();
        let stream = Stream::of(device)?;
        let maps = self.dispatch.maps(device)?;
        let s = self.sizes;
        let columns = dot_columns(
            stream.launchers(),
            s.rows,
            s.experts,
            s.hidden,
            s.ffn,
            TILE_AUTO,
        )?;
        let (dy_rows, default_dots) = self.sorted_with_dots(dy, grads.wanted(1), maps)?;
        let mut dh = self.new_rows(x, 2 * s.ffn);
        let mut weighted_a = self.new_rows(x, s.ffn);
        let mut dots = Tensor::unspecified(device, DType::F32, [s.rows, columns]);
        GroupedSwigluBackward {
            dh: dh.output()?,
            scaled_a: weighted_a.output()?,
            dots: dots.output()?,
            dout: dy_rows.input()?,
            w: down.input()?,
            h: h.input()?,
            gates: gates.input()?,
            offsets: Some(maps.offsets.input()?),
            row_token: Some(maps.row_token.input()?),
            dout_row_token: None,
            rows: s.rows,
            dout_rows: s.rows,
            experts: s.experts,
            hidden: s.hidden,
            ffn: s.ffn,
            dot_columns: columns,
            tile: TILE_AUTO,
        }
        .launch(&stream)?;
        if grads.wanted(1) {
            grads.give(1, self.gate_gradient(gates, &dots, default_dots, maps)?)?;
        } else {
            grads.none(1);
        }
        grads.write(3, down, |dw, accumulate| {
            self.weight_gradient(dw, accumulate, [&dy_rows, &weighted_a], maps)
        })?;
        grads.write(2, gate_up, |dw, accumulate| {
            let x = self.sorted(x, maps)?;
            self.weight_gradient(dw, accumulate, [&dh, &x], maps)
        })?;
        grads.write(0, x, |dx, accumulate| {
            let mut rows = self.new_rows(x, s.hidden);
            GroupedGemmInputGradient {
                dx: rows.output()?,
                dout: dh.input()?,
                w: gate_up.input()?,
                offsets: Some(maps.offsets.input()?),
                row_token: None,
                rows: s.rows,
                dout_rows: s.rows,
                experts: s.experts,
                n: 2 * s.ffn,
                k: s.hidden,
                tile: TILE_AUTO,
            }
            .launch(&stream)?;
            self.combine(dx, accumulate, &rows, None, None, maps)
        })
    }
}
