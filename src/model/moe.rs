//! The mixture-of-experts layer: router, dispatch, experts, combine. Which method routes, it does
//! not know.

use super::block::SwigluSlots;
use super::graph::Graph;
use super::parameters::Layout;
use crate::config::{ModelConfig, Scope};
use crate::cpu;
use crate::dtype::Real;
use crate::error::Result;
use crate::ops::add::add;
use crate::ops::balance::{auxiliary_loss, z_loss};
use crate::ops::combine::combine;
use crate::ops::grouped_linear::{Rows, grouped_linear};
use crate::ops::linear::linear;
use crate::ops::router::logits;
use crate::ops::sigmoid_gate::sigmoid_gate;
use crate::ops::swiglu::swiglu;
use crate::routers::{LayerPass, Pass};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::with_real;

/// Where a MoE layer's parameters are.
pub struct MoeLayer {
    /// MoE layers from 0.
    index: usize,
    /// `[E, D]`.
    router: usize,
    /// `[E, 2F, D]`: gate above up.
    gate_up: usize,
    /// `[E, D, F]`.
    down: usize,
    shared: Option<SharedExpert>,
}

/// An expert for every token, behind a sigmoid gate.
struct SharedExpert {
    network: SwigluSlots,
    /// `[1, D]`.
    gate: usize,
}

/// A layer's balance losses, scalars without the configuration's coefficients; none where they do
/// not apply.
pub struct BalanceLosses {
    pub auxiliary: Option<Var>,
    pub z: Option<Var>,
}

impl MoeLayer {
    pub fn new(layout: &mut Layout, config: &ModelConfig, prefix: &str, index: usize) -> Self {
        let (e, d, f) = (config.num_experts, config.hidden, config.expert_ffn_width);
        let router = layout.matrix(&format!("{prefix}.gate.weight"), &[e, d]);
        let gate_up = layout.matrix(&format!("{prefix}.experts.gate_up_proj"), &[e, 2 * f, d]);
        let down = layout.residual(&format!("{prefix}.experts.down_proj"), &[e, d, f]);
        let shared = (config.shared_expert_width > 0).then(|| SharedExpert {
            network: SwigluSlots::new(
                layout,
                &format!("{prefix}.shared_expert"),
                d,
                config.shared_expert_width,
            ),
            gate: layout.matrix(&format!("{prefix}.shared_expert_gate.weight"), &[1, d]),
        });
        MoeLayer {
            index,
            router,
            gate_up,
            down,
            shared,
        }
    }

    /// The layer's output `[T, D]` for `x [T, D]`, and its balance losses.
    pub fn forward(
        &self,
        model: &Graph,
        tape: &Tape,
        weights: &[Var],
        x: &Var,
        pass: Pass,
    ) -> Result<(Var, BalanceLosses)> {
        let mut states = model.states.borrow_mut();
        let state = &mut states[self.index];
        let k = model.config.top_k;
        let mut layer = LayerPass::new(
            pass,
            &*model.dist,
            self.index,
            k,
            model.seed,
            state,
            tape.is_replaying(),
        );

        let z = logits(tape, x, &weights[self.router])?;
        let routing = model.router.route(tape, &z, &mut layer)?;
        let h = grouped_linear(
            tape,
            x,
            Rows::Tokens,
            &weights[self.gate_up],
            &routing.dispatch,
        )?;
        let a = swiglu(tape, &h)?;
        let e = grouped_linear(
            tape,
            &a,
            Rows::Dispatched,
            &weights[self.down],
            &routing.dispatch,
        )?;
        let defaults = model.router.defaults(e.tensor(), &routing, &mut layer)?;
        let y = combine(tape, &routing.gates, &e, defaults, &routing.dispatch)?;
        let own: Vec<Var> = model.router_parameters[self.index]
            .iter()
            .map(|&slot| weights[slot].clone())
            .collect();
        let mut y = model.router.output(tape, y, &own)?;
        if let Some(shared) = &self.shared {
            let own = shared.network.forward(tape, weights, x)?;
            let score = linear(tape, x, &weights[shared.gate], None)?;
            y = add(tape, &y, &sigmoid_gate(tape, &score, &own)?)?;
        }

        layer.count(routing.chosen(), entropy(routing.probabilities.tensor())?);
        let losses = BalanceLosses {
            auxiliary: if !model.has_auxiliary_loss() {
                None
            } else if routing.penalty.is_some() {
                routing.penalty
            } else {
                let over_step = model.balance.aux_scope == Scope::Global;
                let fractions = layer.fractions(routing.chosen(), over_step);
                Some(auxiliary_loss(tape, &routing.probabilities, &fractions)?)
            },
            z: if model.has_z_loss() {
                Some(z_loss(tape, &z)?)
            } else {
                None
            },
        };
        Ok((y, losses))
    }
}

/// `−Σ_t Σ_i p_ti ln p_ti`, in nats.
fn entropy(p: &Tensor) -> Result<f64> {
    let width = p.shape().width();
    with_real!(p.dtype(), "entropy", |T| {
        let p = p.slice::<T>();
        let partials = cpu::blocks(p.len() / width, 256, |_, rows| {
            let block = &p[rows.start * width..rows.end * width];
            block
                .iter()
                .filter(|p| **p > 0.0)
                .map(|&p| -(p * p.ln()).f64())
                .sum::<f64>()
        });
        Ok(partials.into_iter().sum())
    })
}
