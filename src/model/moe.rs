//! The mixture-of-experts layer: router, dispatch, experts, combine. The layer does not depend on the routing method.

use super::context::Context;
use super::feed_forward::SwigluSlots;
use super::parameters::Layout;
use crate::config::{ModelConfig, Scope};
use crate::error::Result;
use crate::ops::add::add;
use crate::ops::experts::{Experts, experts};
use crate::ops::gated_rows::gated_rows;
use crate::routers::{LayerPass, Pass, Routing};
use crate::tape::{Tape, Var};

/// The indices of a MoE layer's parameters.
pub struct MoeLayer {
    /// Index of the MoE layer, from 0.
    index: usize,
    /// `[E, D]`.
    router: usize,
    /// `[E, 2F, D]`: gate above up.
    gate_up: usize,
    /// `[E, D, F]`.
    down: usize,
    shared: Option<SharedExpert>,
}

/// An expert that runs for every token, with a sigmoid gate on its output.
struct SharedExpert {
    network: SwigluSlots,
    /// `[1, D]`.
    gate: usize,
}

/// A layer's balance losses, scalars without the configuration's coefficients; none if they do not apply.
pub struct BalanceLosses {
    pub auxiliary: Option<Var>,
    pub z: Option<Var>,
}

impl MoeLayer {
    pub fn new(layout: &mut Layout, config: &ModelConfig, prefix: &str, index: usize) -> Self {
        let (e, d, f) = (config.num_experts, config.hidden, config.expert_ffn_width);
        let router = layout.router(&format!("{prefix}.gate.weight"), &[e, d]);
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

    /// Returns the layer's output `[T, D]` for `x [T, D]`, and its balance losses.
    pub fn forward(
        &self,
        model: &Context,
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

        let routing = model
            .router
            .route(tape, x, &weights[self.router], &mut layer)?;
        if layer.updates_state() {
            self.run_samples(model, weights, x, &routing, &mut layer)?;
        }
        let input = Experts {
            x,
            gates: &routing.gates,
            gate_up: &weights[self.gate_up],
            down: &weights[self.down],
            sum_weights: routing.sum_weights.as_ref().map(Var::tensor),
        };
        let weighting = model.router.weighting().filter(|_| layer.updates_state());
        let y = experts(tape, input, &routing.dispatch, weighting, |sums| {
            model.router.defaults(sums, &mut layer)
        })?;
        let own: Vec<Var> = model.router_parameters[self.index]
            .iter()
            .map(|&slot| weights[slot].clone())
            .collect();
        let mut y = model.router.output(tape, y, &own)?;
        if let Some(shared) = &self.shared {
            let own = shared.network.forward(tape, weights, x)?;
            y = add(tape, &y, &gated_rows(tape, x, &weights[shared.gate], &own)?)?;
        }

        let losses = balance_losses(model, tape, routing, &mut layer)?;
        Ok((y, losses))
    }

    /// Runs experts on the tokens that the router draws for its state, without a gradient.
    fn run_samples(
        &self,
        model: &Context,
        weights: &[Var],
        x: &Var,
        routing: &Routing,
        layer: &mut LayerPass<'_>,
    ) -> Result<()> {
        let Some(drawn) = model.router.samples(routing, layer)? else {
            return Ok(());
        };
        let weight = |slot: usize| weights[slot].tensor();
        let sums = drawn.sums(x.tensor(), weight(self.gate_up), weight(self.down))?;
        model.router.learn_from_samples(sums, &drawn, layer)
    }
}

/// Counts the tokens of each expert, and returns the layer's balance losses.
fn balance_losses(
    model: &Context,
    tape: &Tape,
    routing: Routing,
    layer: &mut LayerPass<'_>,
) -> Result<BalanceLosses> {
    let balanced = model.has_auxiliary_loss() && routing.penalty.is_none();
    let over_step = balanced && model.balance.aux_scope == Scope::Global;
    let fractions = layer.count(routing.chosen(), routing.scores.entropy()?, over_step)?;
    Ok(BalanceLosses {
        auxiliary: if !model.has_auxiliary_loss() {
            None
        } else if routing.penalty.is_some() {
            routing.penalty
        } else {
            Some(routing.scores.auxiliary_loss(tape, &fractions)?)
        },
        z: if model.has_z_loss() {
            Some(routing.scores.z_loss(tape)?)
        } else {
            None
        },
    })
}
