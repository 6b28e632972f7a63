//! Faults planted on purpose: a gradient check is worth something only if it fails when a term of a
//! gradient is missing. Backward formulas multiply such terms by [`term`], which is 1 unless a test,
//! or `gradcheck --plant`, asks for the fault.

use std::cell::Cell;
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
    /// Auxiliary loss: `f_j` of `p_j (f_j − Σ_i p_i f_i)`, before the softmax backward.
    AuxiliaryTerm,
    /// z-loss: `2 logsumexp(z) p_j`.
    ZTerm,
    /// DenseMixer: the gates of experts that were not chosen.
    UnchosenGate,
    /// SparseMixer: `1[j=a]` of `p_a (1[j=a] − p_j)`.
    SampledOwnTerm,
    /// The router's part of the layer's input gradient: `Wᵀ dz`.
    RouterInput,
    /// The router weight's gradient: `Σ_t dz xᵀ`.
    RouterWeight,
}

impl Fault {
    /// Every fault, with its name on the command line.
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
            .ok_or_else(|| format!("no such fault; there are {}", names.join(", ")))
    }
}

thread_local! {
    static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// The factor of a gradient's term: 0 while `fault` is planted on this thread, else 1. To be read
/// before a parallel loop, not inside it.
pub fn term(fault: Fault) -> f64 {
    if PLANTED.get() == Some(fault) {
        0.0
    } else {
        1.0
    }
}

/// Plants a fault on this thread until dropped.
pub struct FaultGuard(());

impl FaultGuard {
    pub fn plant(fault: Fault) -> Self {
        PLANTED.set(Some(fault));
        FaultGuard(())
    }
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        PLANTED.set(None);
    }
}
