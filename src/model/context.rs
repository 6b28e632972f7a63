//! The data that every layer of a model reads: configuration, router and its state, RoPE tables, device, ranks.

use super::parameters::{Layout, NormSlots};
use super::rounded::rounded;
use super::stream::Stream;
use crate::config::{BalanceConfig, Config, ModelConfig, Norm};
use crate::device::Device;
use crate::dist::{Collective, DeviceRanks};
use crate::error::Result;
use crate::ops::add_norm::add_norm;
use crate::ops::heads::Heads;
use crate::ops::layernorm::layernorm;
use crate::ops::rmsnorm::rmsnorm;
use crate::ops::rope::RopeTables;
use crate::routers::{Balance, DeviceTally, LayerState, Router};
use crate::tape::{Tape, Var};
use crate::tensor::dtype::DType;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

/// The data that every layer of a model reads.
pub struct Context {
    pub config: ModelConfig,
    pub balance: BalanceConfig,
    pub router: Box<dyn Router>,
    /// For each MoE layer, the indices of the router's own parameters.
    pub router_parameters: Vec<Vec<usize>>,
    /// Seed of the router's random draws.
    pub seed: u64,
    /// The router state of each MoE layer.
    pub states: RefCell<Vec<LayerState>>,
    pub rope: RopeTables,
    pub dtype: DType,
    pub device: Device,
    /// The counters of the MoE layers, on a device with kernels.
    pub tally: Option<Rc<DeviceTally>>,
    pub dist: Arc<dyn Collective>,
}

/// Returns the ranks for communication in device memory, if `device` has kernels and there are several ranks.
fn ranks_of(dist: &Arc<dyn Collective>, device: Device) -> Option<DeviceRanks> {
    // A single rank that uses a communication library makes the same calls as several ranks.
    let connected = dist.size() > 1 || dist.device_library().is_some();
    (device != Device::Cpu && connected).then(|| DeviceRanks::new(dist.clone(), device))
}

impl Context {
    /// Builds the context of a configuration, and adds the router's own parameters to `layout`.
    ///
    /// # Errors
    /// Returns an error when the state cannot be held in the model's dtype.
    pub fn new(
        layout: &mut Layout,
        config: &Config,
        router: Box<dyn Router>,
        dist: Arc<dyn Collective>,
    ) -> Result<Self> {
        let model = &config.model;
        let (dtype, seed, device) = (
            config.train.dtype.dtype(),
            config.train.seed,
            config.train.device,
        );
        let router_parameters = model
            .moe_layers()
            .iter()
            .map(|layer| {
                let own = router.parameters(model).into_iter().map(|p| {
                    let name = format!("model.layers.{layer}.mlp.{}", p.name);
                    layout.vectors(&name, &[(name.clone(), p.length)], p.start)
                });
                own.collect()
            })
            .collect();
        let layers = model.moe_layers().len();
        let tally = (device != Device::Cpu && layers > 0)
            .then(|| DeviceTally::new(device, layers, model.num_experts, ranks_of(&dist, device)));
        let states = (0..layers).map(|layer| {
            let mut tensors = router.initial_state(model, layer, seed);
            for t in &mut tensors {
                t.start = rounded(&t.start, dtype)?.on(device);
            }
            let tally = tally.as_ref().map(|t| t.layer(layer));
            Ok(LayerState::with_tally(tensors, tally.unwrap_or_default()))
        });
        Ok(Context {
            states: RefCell::new(states.collect::<Result<_>>()?),
            config: model.clone(),
            balance: config.balance.clone(),
            router,
            router_parameters,
            seed,
            rope: RopeTables::new(
                dtype,
                model.sequence_length,
                model.head_dim,
                model.rope_theta,
            )?,
            dtype,
            device,
            tally,
            dist,
        })
    }

    /// Returns the ranks for communication in device memory, if the device has kernels and there are several ranks.
    pub fn device_ranks(&self) -> Option<DeviceRanks> {
        ranks_of(&self.dist, self.device)
    }

    /// Whether MoE layers compute an auxiliary loss.
    pub fn has_auxiliary_loss(&self) -> bool {
        match self.router.balance() {
            Balance::Auxiliary => self.balance.aux_coefficient != 0.0,
            Balance::Own => true,
            Balance::None => false,
        }
    }

    /// Whether MoE layers compute a z-loss.
    pub fn has_z_loss(&self) -> bool {
        self.router.balance() == Balance::Auxiliary && self.balance.z_coefficient != 0.0
    }

    pub fn heads(&self) -> Heads {
        let c = &self.config;
        Heads {
            query: c.heads,
            key_value: c.kv_heads,
            dim: c.head_dim,
        }
    }

    /// Adds the pending term to the rows of the residual stream, and returns the rows and their norm.
    pub fn norm(
        &self,
        tape: &Tape,
        stream: &Stream,
        weights: &[Var],
        slots: &NormSlots,
    ) -> Result<(Var, Var)> {
        let (weight, eps) = (&weights[slots.weight], self.config.norm_eps);
        let bias = match self.config.norm {
            Norm::LayerNorm => slots.bias.map(|slot| &weights[slot]),
            _ => None,
        };
        let x = &stream.x;
        let normed = match (&stream.pending, bias) {
            (Some(y), bias) => return add_norm(tape, x, y, weight, bias, eps),
            (None, Some(bias)) => layernorm(tape, x, weight, bias, eps)?,
            (None, None) => rmsnorm(tape, x, weight, eps)?,
        };
        Ok((x.clone(), normed))
    }
}
