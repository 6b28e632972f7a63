//! Planted faults: a gradient check is only useful if it fails when a term of a gradient is missing.

use crate::error::Result;
use crate::ops::combine::Combine;
use crate::ops::sampled_gate::SampledGate;
use crate::ops::straight_through::StraightThrough;
use crate::tape::{AlteredGradients, BackwardCall, alter_gradients};
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;
use crate::with_real;
use std::fmt;
use std::str::FromStr;

/// A term of a gradient that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Router softmax backward: `dp_j` of `p_j (dp_j − Σ_i p_i dp_i)`.
    SoftmaxOwnTerm,
    /// Router softmax backward: `− Σ_i p_i dp_i`.
    SoftmaxMeanTerm,
    /// Gate gradient of an active expert: `⟨g, e_i⟩`.
    ActiveDot,
    /// Gate gradient of an inactive expert: `⟨g, ê_i⟩`, the dense part of Default MoE.
    DefaultDot,
    /// Gradient of an expert's output: `p_i g`.
    ExpertOutput,
    /// Auxiliary loss: its gradient with respect to the probabilities.
    AuxiliaryTerm,
    /// z-loss: its gradient with respect to the logits.
    ZTerm,
    /// DenseMixer: the gates of experts that were not chosen.
    UnchosenGate,
    /// SparseMixer: `1[j=a]` of the sampled expert's logit.
    SampledOwnTerm,
    /// The router's part of the layer's input gradient: `Wᵀ dz`.
    RouterInput,
    /// The router weight's gradient: `Σ_t dz xᵀ`.
    RouterWeight,
}

impl Fault {
    /// All faults with their names on the command line.
    pub const ALL: [(Fault, &'static str); 11] = [
        (Fault::SoftmaxOwnTerm, "softmax-own-term"),
        (Fault::SoftmaxMeanTerm, "softmax-mean-term"),
        (Fault::ActiveDot, "active-dot"),
        (Fault::DefaultDot, "default-dot"),
        (Fault::ExpertOutput, "expert-output"),
        (Fault::AuxiliaryTerm, "auxiliary-term"),
        (Fault::ZTerm, "z-term"),
        (Fault::UnchosenGate, "unchosen-gate"),
        (Fault::SampledOwnTerm, "sampled-own-term"),
        (Fault::RouterInput, "router-input"),
        (Fault::RouterWeight, "router-weight"),
    ];

    /// Removes the term from the gradients that operations on the CPU compute on this thread, until the returned guard is
    /// dropped.
    pub fn inject(self) -> AlteredGradients {
        alter_gradients(move |call, gradients| self.alter(call, gradients))
    }

    fn alter(self, call: &BackwardCall, gradients: &mut [Option<Tensor>]) {
        match (self, call.op.name()) {
            (Fault::RouterInput, "router logits") => gradients[0] = None,
            (Fault::RouterWeight, "router logits") => gradients[1] = None,
            (Fault::AuxiliaryTerm, "auxiliary_loss") | (Fault::ZTerm, "z_loss") => {
                zero(&mut gradients[0], |_, _| true);
            }
            (Fault::ExpertOutput, "combine") => zero(&mut gradients[1], |_, _| true),
            (Fault::ActiveDot | Fault::DefaultDot, "combine") => {
                let Some(op) = of_type::<Combine>(call) else {
                    return;
                };
                let (selection, chosen) = (op.dispatch.selection(), self == Fault::ActiveDot);
                let is_chosen = |t, e| selection.experts(t).contains(&e);
                zero(&mut gradients[0], |t, e| is_chosen(t, e) == chosen);
            }
            (Fault::UnchosenGate, "straight_through") => {
                let Some(op) = of_type::<StraightThrough>(call) else {
                    return;
                };
                let selection = op.chosen.selection();
                zero(&mut gradients[0], |t, e| !selection.experts(t).contains(&e));
            }
            (Fault::SampledOwnTerm, "sampled_gate") => {
                let Some(op) = of_type::<SampledGate>(call) else {
                    return;
                };
                leave_out_own_term(op, call, &mut gradients[0]);
            }
            (Fault::SoftmaxOwnTerm | Fault::SoftmaxMeanTerm, "router softmax") => {
                self.alter_softmax(call, &mut gradients[0]);
            }
            _ => {}
        }
    }

    /// Computes `dz_j = p_j dp_j − p_j Σ_i p_i dp_i` without one of its terms.
    fn alter_softmax(self, call: &BackwardCall, gradient: &mut Option<Tensor>) {
        let ([p, ..], [Some(dp), ..], Some(dz)) = (call.saved, call.douts, gradient) else {
            return;
        };
        let own = self == Fault::SoftmaxOwnTerm;
        ignore_other_types(with_real!(dz.dtype(), "fault", |T| {
            let products = p.slice::<T>().iter().zip(dp.slice::<T>());
            for (dz, (&p, &dp)) in dz.slice_mut::<T>().iter_mut().zip(products) {
                *dz = if own { *dz - p * dp } else { p * dp };
            }
            Ok(())
        }));
    }
}

/// Computes `dz_j = c dw_a p_a (1[j=a] − p_j)` without its term 1[j=a].
fn leave_out_own_term(op: &SampledGate, call: &BackwardCall, gradient: &mut Option<Tensor>) {
    let ([p, ..], [Some(dw), ..], Some(dz)) = (call.saved, call.douts, gradient) else {
        return;
    };
    let experts = dz.shape().width();
    let sampled = op.choice.expert.slice::<i32>().iter().enumerate();
    let places: Vec<usize> = sampled.map(|(t, a)| t * experts + *a as usize).collect();
    ignore_other_types(with_real!(dz.dtype(), "fault", |T| {
        let (p, dw, c) = (p.slice::<T>(), dw.slice::<T>(), T::of(op.estimator));
        let dz = dz.slice_mut::<T>();
        places.iter().for_each(|&i| dz[i] -= c * dw[i] * p[i]);
        Ok(())
    }));
}

/// Gradients with a dtype other than f32 and f64, which a device with kernels can have, are not changed.
fn ignore_other_types(_: Result<()>) {}

fn of_type<'a, T: 'static>(call: &BackwardCall<'a>) -> Option<&'a T> {
    call.op.as_any()?.downcast_ref()
}

/// Sets the gradients `[T, E]` to zero for the (token, expert) pairs for which `left_out` is true.
fn zero(gradient: &mut Option<Tensor>, left_out: impl Fn(usize, i32) -> bool) {
    let Some(gradient) = gradient else { return };
    let experts = gradient.shape().width();
    let pairs = (0..gradient.elements()).filter(|i| left_out(i / experts, (i % experts) as i32));
    let pairs: Vec<usize> = pairs.collect();
    ignore_other_types(with_real!(gradient.dtype(), "fault", |T| {
        let gradient = gradient.slice_mut::<T>();
        pairs.iter().for_each(|&i| gradient[i] = T::of(0.0));
        Ok(())
    }));
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Fault::ALL
            .iter()
            .find(|(fault, _)| fault == self)
            .map_or("", |(_, n)| n);
        f.write_str(name)
    }
}

impl FromStr for Fault {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let names: Vec<&str> = Fault::ALL.iter().map(|(_, n)| *n).collect();
        Fault::ALL
            .iter()
            .find(|(_, name)| *name == s)
            .map(|(fault, _)| *fault)
            .ok_or_else(|| format!("unknown fault; the faults are {}", names.join(", ")))
    }
}
