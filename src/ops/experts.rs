//! The experts of a MoE layer, from dispatched tokens to the layer's output.
//!
//! For token t with chosen experts A_t, gates `w [T, E]` and default vectors ê (or none):
//! `h_r = G_e x_t` (gate above up, `[R, 2F]`), `a = silu(gate) ⊙ up`, `e_r = D_e a_r`,
//! `y_t = Σ_{i∈A} w_ti e_i + Σ_{i∉A} w_ti ê_i` (Default MoE, 2504.12463, eq. 11).
//!
//! On the CPU it is a composition of `grouped_linear`, `swiglu` and `combine`. On a device with
//! kernels it is one operation, which keeps x, the gates and h, `2·T·D + 4·T·E + 4·R·F` bytes, and no
//! expert's output. With g = dy and `A′ = D_eᵀ g`: `dw_ti = ⟨g, e_i⟩ = ⟨A′, a⟩` on A and `⟨g, ê_i⟩` off
//! it, `dD_e = Σ_r g (w a)ᵀ`, `dh = w A′ ⊙ swiglu′(h)`, `dG_e = Σ_r dh xᵀ`, `dx_t = Σ_r G_eᵀ dh_r`
//! (as SonicMoE, 2512.14080, section 3).

use super::combine::{Defaults, combine};
use super::dispatch::{DeviceMaps, Dispatch};
use super::embedding;
use super::expert_mean::{ExpertSums, Weighting};
use super::grouped_linear::{Rows, grouped_linear};
use super::linear::kernels as product;
use super::swiglu::swiglu;
use crate::device::{Device, stream};
use crate::error::{Error, Result};
use crate::kernels::launchers::{Launchers, TILE_AUTO};
use crate::kernels::{Combine, Stream};
use crate::tape::{Forward, Grads, Op, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use crate::{launch, query};
use std::ptr::{null, null_mut};
use std::rc::Rc;

/// What the experts work on.
pub struct Experts<'a> {
    /// `[T, D]`.
    pub x: &'a Var,
    /// `[T, E]`.
    pub gates: &'a Var,
    /// `[E, 2F, D]`: gate above up.
    pub gate_up: &'a Var,
    /// `[E, D, F]`.
    pub down: &'a Var,
}

/// The layer's output `[T, D]`. `defaults` is asked between the experts and the combination; it
/// gets the sums of the experts' outputs where `weighting` says how.
///
/// # Errors
/// When the shapes do not fit each other or the dispatch, and those of `defaults`.
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
    } = input;
    if x.tensor().device() == Device::Cpu {
        let h = grouped_linear(tape, x, Rows::Tokens, gate_up, dispatch)?;
        let a = swiglu(tape, &h)?;
        let e = grouped_linear(tape, &a, Rows::Dispatched, down, dispatch)?;
        let sums = weighting
            .map(|w| ExpertSums::of_rows(e.tensor(), gates.tensor(), w, dispatch))
            .transpose()?;
        return combine(tape, gates, &e, defaults(sums)?, dispatch);
    }
    let inputs = [x, gates, gate_up, down];
    let mut layer = Layer {
        sizes: Sizes::of(inputs.map(Var::tensor), dispatch)?,
        dispatch: dispatch.clone(),
        defaults: None,
    };
    let forward = layer.run(inputs.map(Var::tensor), weighting, defaults)?;
    let mut outputs = tape.record_run(layer, &inputs, forward);
    Ok(outputs.remove(0))
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
    tokens: i64,
    rows: i64,
    experts: i32,
    hidden: i32,
    ffn: i32,
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
            tokens: tokens as i64,
            // A kernel takes one row or more; offsets say that there is none.
            rows: dispatch.num_rows().max(1) as i64,
            experts: experts as i32,
            hidden: hidden as i32,
            ffn: ffn as i32,
        })
    }
}

impl Layer {
    fn new_rows(&self, like: &Tensor, width: i32) -> Tensor {
        let shape = [self.sizes.rows as usize, width as usize];
        Tensor::unspecified(like.device(), DType::Bf16, shape)
    }

    fn run(
        &mut self,
        [x, gates, gate_up, down]: [&Tensor; 4],
        weighting: Option<Weighting>,
        defaults: impl FnOnce(Option<ExpertSums>) -> Result<Option<Defaults>>,
    ) -> Result<Forward> {
        let (device, launchers) = (x.device(), x.device().launchers()?);
        let maps = self.dispatch.maps(device)?;
        let s = self.sizes;
        let (mut h, mut a) = (self.new_rows(x, 2 * s.ffn), self.new_rows(x, s.ffn));
        let mut e = self.new_rows(x, s.hidden);
        let sorted = self.sorted(x, maps)?;
        let blocks = s.rows as usize / 64 + s.experts as usize;
        let mut partials =
            weighting.map(|_| Tensor::unspecified(device, DType::F32, [blocks, s.hidden as usize]));
        let weights = match weighting {
            Some(Weighting::Plain) | None => null(),
            Some(_) => gates.pointer::<f32>(),
        };
        // SAFETY: the tensors have the shapes that grouped_swiglu.cu's header names.
        unsafe {
            launch!(
                launchers,
                grouped_swiglu_forward(
                    h.pointer_mut(),
                    a.pointer_mut(),
                    sorted.pointer(),
                    gate_up.pointer(),
                    maps.offsets.pointer(),
                    null(),
                    s.rows,
                    s.rows,
                    s.experts,
                    s.ffn,
                    s.hidden,
                    TILE_AUTO,
                    stream(),
                )
            )?;
            launch!(
                launchers,
                grouped_down_forward(
                    e.pointer_mut(),
                    partials.as_mut().map_or(null_mut(), Tensor::pointer_mut),
                    a.pointer(),
                    down.pointer(),
                    weights,
                    maps.offsets.pointer(),
                    maps.row_token.pointer(),
                    s.rows,
                    s.tokens,
                    s.experts,
                    s.hidden,
                    s.ffn,
                    TILE_AUTO,
                    stream(),
                )
            )?;
        }
        let sums = match (&partials, weighting) {
            (Some(partials), Some(weighting)) => Some(ExpertSums::of_partials(
                partials,
                gates,
                weighting,
                &self.dispatch,
            )?),
            _ => None,
        };
        self.defaults = defaults(sums)?;
        let vectors = self.defaults.as_ref().filter(|d| d.in_forward);
        let mut y = x.unspecified_like();
        let vectors = vectors.map(|d| &d.vectors);
        self.combine(&mut y, Accumulate::Assign, &e, Some(gates), vectors, maps)?;
        Ok(Forward {
            outputs: vec![y],
            saved: [x, gates, gate_up, down]
                .into_iter()
                .cloned()
                .chain([h])
                .collect(),
        })
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
        let kernel = Combine {
            y: y.output()?,
            rows_in: rows.input()?,
            gates: gates.map(Tensor::input).transpose()?,
            slot_row: maps.slot_row.input()?,
            choices: maps.choices.as_ref().map(Tensor::input).transpose()?,
            vectors: vectors.map(Tensor::input).transpose()?,
            tokens: s.tokens as usize,
            rows: s.rows as usize,
            experts: s.experts as usize,
            hidden: s.hidden as usize,
            slots: maps.slots,
            accumulate: accumulate == Accumulate::Add,
        };
        kernel.launch(&stream)
    }
}

impl Layer {
    /// The rows of `[T, D]` tokens, sorted by expert. A product that gathers them itself takes 2.6 times as long on an
    /// H200 as one that loads sorted rows by TMA, and one such copy is 1% of it.
    fn sorted(&self, tokens: &Tensor, maps: &DeviceMaps) -> Result<Tensor> {
        let mut rows = self.new_rows(tokens, self.sizes.hidden);
        embedding::kernels::forward(&mut rows, tokens, &maps.row_token)?;
        Ok(rows)
    }

    /// `dw_e (+)= Σ_r dout_r x_rᵀ`.
    fn weight_gradient(
        &self,
        launchers: &Launchers,
        dw: &mut Tensor,
        accumulate: Accumulate,
        [dout, x]: [&Tensor; 2],
        maps: &DeviceMaps,
    ) -> Result<()> {
        let (dout, x, offsets) = (dout.pointer(), x.pointer(), Some(&maps.offsets));
        let rows = self.sizes.rows;
        // SAFETY: both are sorted by expert, and the maps are theirs.
        unsafe { product::weight_gradient_of(launchers, dw, accumulate, dout, x, rows, offsets) }
    }

    /// dw `[T, E]`: the dots of the rows on A, those of the default vectors off it.
    fn gate_gradient(
        &self,
        launchers: &Launchers,
        gates: &Tensor,
        dots: &Tensor,
        dy: &Tensor,
        maps: &DeviceMaps,
    ) -> Result<Tensor> {
        let mut dgates = gates.unspecified_like();
        let (s, vectors) = (self.sizes, self.defaults.as_ref().map(|d| &d.vectors));
        // SAFETY: the tensors have the shapes that gate_gradient.cu's header names.
        unsafe {
            launch!(
                launchers,
                gate_gradient(
                    dgates.pointer_mut(),
                    dots.pointer(),
                    dy.pointer(),
                    vectors.map_or(null(), Tensor::pointer),
                    maps.slot_row.pointer(),
                    maps.choices.as_ref().map_or(null(), Tensor::pointer),
                    s.tokens,
                    s.rows,
                    s.experts,
                    s.hidden,
                    maps.slots as i32,
                    dots.shape().width() as i32,
                    stream(),
                )
            )?;
        }
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

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
        let [x, gates, gate_up, down, h] = saved else {
            unreachable!("the experts keep five tensors")
        };
        let dy = only(douts);
        let (device, launchers) = (x.device(), x.device().launchers()?);
        let maps = self.dispatch.maps(device)?;
        let (offsets, row_token) = (maps.offsets.pointer(), maps.row_token.pointer());
        let s = self.sizes;
        let mut columns = 0i32;
        // SAFETY: it writes one number.
        unsafe {
            query!(
                launchers,
                grouped_swiglu_dot_columns(
                    &mut columns,
                    s.rows,
                    s.experts,
                    s.hidden,
                    s.ffn,
                    TILE_AUTO,
                )
            )?;
        }
        let dy_rows = self.sorted(dy, maps)?;
        let mut dh = self.new_rows(x, 2 * s.ffn);
        let mut weighted_a = self.new_rows(x, s.ffn);
        let shape = [s.rows as usize, columns as usize];
        let mut dots = Tensor::unspecified(device, DType::F32, shape);
        // SAFETY: the tensors have the shapes that grouped_swiglu.cu's header names.
        unsafe {
            launch!(
                launchers,
                grouped_swiglu_backward(
                    dh.pointer_mut(),
                    weighted_a.pointer_mut(),
                    dots.pointer_mut(),
                    dy_rows.pointer(),
                    down.pointer(),
                    h.pointer(),
                    gates.pointer(),
                    offsets,
                    row_token,
                    null(),
                    s.rows,
                    s.rows,
                    s.experts,
                    s.hidden,
                    s.ffn,
                    columns,
                    TILE_AUTO,
                    stream(),
                )
            )?;
        }
        if grads.wanted(1) {
            grads.give(1, self.gate_gradient(launchers, gates, &dots, dy, maps)?)?;
        } else {
            grads.none(1);
        }
        grads.write(3, down, |dw, accumulate| {
            self.weight_gradient(launchers, dw, accumulate, [&dy_rows, &weighted_a], maps)
        })?;
        grads.write(2, gate_up, |dw, accumulate| {
            let x = self.sorted(x, maps)?;
            self.weight_gradient(launchers, dw, accumulate, [&dh, &x], maps)
        })?;
        grads.write(0, x, |dx, accumulate| {
            let mut rows = self.new_rows(x, s.hidden);
            // SAFETY: the tensors have the shapes that grouped_gemm.cu's header names.
            unsafe {
                launch!(
                    launchers,
                    grouped_gemm_input_gradient(
                        rows.pointer_mut(),
                        dh.pointer(),
                        gate_up.pointer(),
                        offsets,
                        null(),
                        s.rows,
                        s.rows,
                        s.experts,
                        2 * s.ffn,
                        s.hidden,
                        TILE_AUTO,
                        stream(),
                    )
                )?;
            }
            self.combine(dx, accumulate, &rows, None, None, maps)
        })
    }
}
