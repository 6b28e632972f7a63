//! SparseMixer's choice and gates of all stages on a device with kernels (`kernels/router_sample.cu`,
//! `kernels/gates.cu`): each stage does what [`sampled_gate`](super::sampled_gate) describes; the formulas are there.
//! With the same draws, the choices are the same as on the CPU.
//!
//! Gates `w = Σ_r h_r p^r_{a_r}`, backward `dz_j = c Σ_r dw_{a_r} p^r_{a_r} (1[j=a_r] − p^r_j)`.

use crate::device::Device;
use crate::error::Result;
use crate::kernels::bindings::routegrad_draws;
use crate::kernels::router_sample::RouterSample;
use crate::kernels::{Stream, gates};
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;

/// How experts are sampled.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Number of experts that are sampled one after another: K, 1 or 2.
    pub stages: usize,
    /// Index of the MoE layer, from 0: part of the key of the draws.
    pub layer: usize,
    /// ε of the mask: experts further than 2 ε from the largest logit, relative, are left out.
    pub epsilon: f64,
    /// A sample that is not the likeliest expert is trusted, h = 1, if u exceeds this threshold.
    pub threshold: f64,
    /// The h of a sample that is not trusted.
    pub untrusted: f64,
}

/// The experts of every stage, and the constants of their gates. No gradient flows to them.
#[derive(Clone, Debug)]
pub struct SampledExperts {
    /// a `[R, T]`, i32.
    pub experts: Tensor,
    /// h `[R, T]`.
    pub factors: Tensor,
    /// `[R, T, E]`, i32: 1 where a stage keeps the expert, else 0.
    pub kept: Tensor,
    /// `[T, R]`, i32: the experts of a token, ascending.
    pub choices: Tensor,
}

/// Samples experts for the logits `z [T, E]`; without draws it chooses the likeliest.
///
/// # Errors
/// Returns an error when the logits are not f32, or there are more stages than the kernel supports or more stages
/// than experts.
pub fn sample(
    z: &Tensor,
    sampling: Sampling,
    draws: Option<routegrad_draws>,
) -> Result<SampledExperts> {
    z.expect_dtype("sampled_experts", "logits", DType::F32)?;
    let (tokens, experts, stages) = (z.shape()[0], z.shape()[1], sampling.stages);
    let new = |dtype, shape: &[usize]| Tensor::unspecified(z.device(), dtype, shape);
    let mut sampled = SampledExperts {
        experts: new(DType::I32, &[stages, tokens]),
        factors: new(DType::F32, &[stages, tokens]),
        kept: new(DType::I32, &[stages, tokens, experts]),
        choices: new(DType::I32, &[tokens, stages]),
    };
    let draws = draws.map(|d| {
        let words: [i32; 6] = bytemuck::cast([d.seed, d.step, d.first_token]);
        Tensor::from_slice([6], &words).on(z.device())
    });
    let kernel = RouterSample {
        experts_chosen: sampled.experts.output()?,
        factors: sampled.factors.output()?,
        kept: sampled.kept.output()?,
        choices: sampled.choices.output()?,
        logits: z.input()?,
        draws: draws.as_ref().map(Tensor::input).transpose()?,
        tokens,
        experts,
        stages,
        layer: sampling.layer,
        epsilon: sampling.epsilon,
        threshold: sampling.threshold,
        untrusted: sampling.untrusted as f32,
    };
    kernel.launch(&Stream::of(z.device())?)?;
    Ok(sampled)
}

/// Returns the gates `[T, E]` of the sampled experts from the logits `z [T, E]`; `estimator` is the factor c of their
/// gradient.
///
/// # Errors
/// Returns an error when the choice does not fit the logits.
pub fn sampled_gates(
    tape: &Tape,
    z: &Var,
    sampled: &SampledExperts,
    estimator: f64,
) -> Result<Var> {
    let shape = z.tensor().shape();
    let stages = sampled.experts.shape()[0];
    let kept = [stages, shape[0], shape[1]];
    sampled
        .kept
        .expect_shape("sampled_gates", "kept experts", kept)?;
    let sampled = sampled.clone();
    tape.apply_one(SampledGates { sampled, estimator }, &[z])
}

struct SampledGates {
    sampled: SampledExperts,
    estimator: f64,
}

impl Op for SampledGates {
    fn name(&self) -> &'static str {
        "sampled_gates"
    }

    fn runs_on(&self, device: Device) -> bool {
        device != Device::Cpu
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (z, s) = (inputs[0], &self.sampled);
        let mut w = z.unspecified_like();
        let kernel = gates::SampledGates {
            w: w.output()?,
            factors: s.factors.input()?,
            logits: z.input()?,
            experts_chosen: s.experts.input()?,
            kept: s.kept.input()?,
            tokens: z.shape()[0],
            experts: z.shape()[1],
            stages: s.experts.shape()[0],
        };
        kernel.launch(&Stream::of(z.device())?)?;
        Ok(Forward::one(w, vec![z.clone()]))
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (z, s, dw) = (&saved[0], &self.sampled, only(douts));
        let mut dz = z.unspecified_like();
        let kernel = gates::SampledGatesBackward {
            dz: dz.output()?,
            dw: dw.input()?,
            logits: z.input()?,
            experts_chosen: s.experts.input()?,
            kept: s.kept.input()?,
            tokens: z.shape()[0],
            experts: z.shape()[1],
            stages: s.experts.shape()[0],
            estimator: self.estimator as f32,
        };
        kernel.launch(&Stream::of(z.device())?)?;
        grads.give(0, dz)
    }
}
