//! The model as a function of its weights: what runs, without the weights themselves.

use super::block::{Block, Stream};
use super::moe::BalanceLosses;
use super::parameters::{Layout, NormSlots};
use super::rows::Rows;
use super::{Losses, rounded};
use crate::config::{BalanceConfig, Config, ModelConfig, Norm, Recompute, Reduction};
use crate::device::Device;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::ops::add_norm::add_norm;
use crate::ops::balance::weighted_sum;
use crate::ops::cross_entropy::cross_entropy;
use crate::ops::embedding::embedding;
use crate::ops::heads::Heads;
use crate::ops::layernorm::layernorm;
use crate::ops::rmsnorm::rmsnorm;
use crate::ops::rope::RopeTables;
use crate::routers::{Balance, DeviceTally, LayerState, Pass, Router};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use std::cell::RefCell;
use std::rc::Rc;

/// Configuration, places of the parameters, router and its state.
pub struct Graph {
    pub config: ModelConfig,
    pub balance: BalanceConfig,
    recompute: Recompute,
    blocks: Vec<Rc<Block>>,
    embedding: usize,
    final_norm: NormSlots,
    /// The output head's parameter.
    pub head: usize,
    pub router: Box<dyn Router>,
    /// Where the parameters of the router's own are, for each MoE layer.
    pub router_parameters: Vec<Vec<usize>>,
    /// Of the router's draws.
    pub seed: u64,
    /// Of each MoE layer.
    pub states: RefCell<Vec<LayerState>>,
    pub rope: RopeTables,
    pub dtype: DType,
    pub device: Device,
    /// What the MoE layers count, on a device with kernels.
    pub tally: Option<Rc<DeviceTally>>,
    pub dist: Box<dyn Collective>,
}

impl Graph {
    /// The graph of a configuration, and the parameters in `layout`.
    pub fn new(
        layout: &mut Layout,
        config: &Config,
        router: Box<dyn Router>,
        dist: Box<dyn Collective>,
    ) -> Result<Self> {
        let model = &config.model;
        let (dtype, seed) = (config.train.dtype.dtype(), config.train.seed);
        let embedding = layout.embedding("model.embed_tokens.weight", model.vocab_size);
        let blocks = (0..model.layers)
            .map(|l| Rc::new(Block::new(layout, model, l)))
            .collect();
        let final_norm = layout.norm("model.norm");
        let head = if model.tied_embeddings {
            embedding
        } else {
            layout.matrix("lm_head.weight", &[model.vocab_size, model.hidden])
        };
        // Behind all others, so that every router begins with the same weights.
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
        let device = config.train.device;
        let layers = model.moe_layers().len();
        let tally = (device != Device::Cpu && layers > 0)
            .then(|| DeviceTally::new(device, layers, model.num_experts));
        let states = (0..layers).map(|layer| {
            let mut tensors = router.initial_state(model, layer, seed);
            for t in &mut tensors {
                t.start = rounded(&t.start, dtype)?.on(device);
            }
            let tally = tally.as_ref().map(|t| t.layer(layer));
            Ok(LayerState::with_tally(tensors, tally.unwrap_or_default()))
        });
        Ok(Graph {
            states: RefCell::new(states.collect::<Result<_>>()?),
            config: model.clone(),
            balance: config.balance.clone(),
            recompute: config.train.recompute.clone(),
            blocks,
            embedding,
            final_norm,
            head,
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

    /// The final hidden rows `[T, D]` of tokens `[T]`, i32, and the balance losses of every MoE layer.
    pub fn hidden(
        self: &Rc<Self>,
        tape: &Tape,
        weights: &Rc<[Var]>,
        ids: &Tensor,
        rows: &Rows,
        pass: Pass,
    ) -> Result<(Var, Vec<BalanceLosses>)> {
        rows.check(ids.elements(), self.config.sequence_length)?;
        let mut stream = Stream::new(embedding(tape, &weights[self.embedding], ids)?);
        let mut balance = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let (graph, weights, own) = (self.clone(), weights.clone(), block.clone());
            let rows = rows.clone();
            let run = move |tape: &Tape, stream: &Stream| {
                own.forward(&graph, tape, &weights, stream, &rows, pass)
            };
            let losses;
            (stream, losses) = if self.recompute.covers(layer) {
                // One tensor is kept of it, so what is pending is added first.
                let x = stream.joined(tape)?;
                let outputs = tape.recompute(&[&x], move |tape, v| {
                    let (stream, losses) = run(tape, &Stream::new(v[0].clone()))?;
                    let losses = losses
                        .into_iter()
                        .flat_map(|l| [l.auxiliary, l.z])
                        .flatten();
                    Ok(std::iter::once(stream.joined(tape)?)
                        .chain(losses)
                        .collect())
                })?;
                let (x, losses) = self.unpack(block, outputs);
                (Stream::new(x), losses)
            } else {
                run(tape, &stream)?
            };
            balance.extend(losses);
        }
        let (_, normed) = self.norm(tape, &stream, weights, &self.final_norm)?;
        Ok((normed, balance))
    }

    /// MoE layer `layer`, from 0, alone.
    pub fn moe_layer(
        &self,
        layer: usize,
        tape: &Tape,
        weights: &[Var],
        x: &Var,
        pass: Pass,
    ) -> Result<(Var, BalanceLosses)> {
        let mut layers = self.blocks.iter().filter_map(|b| b.moe());
        let Some(moe) = layers.nth(layer) else {
            return Err(Error::invalid(
                "moe_layer",
                format!("a MoE layer below {}", self.states.borrow().len()),
                layer.to_string(),
                "layers count from 0, dense ones left out",
            ));
        };
        moe.forward(self, tape, weights, x, pass)
    }

    /// The cross-entropy of `targets` and the balance losses, weighted and summed.
    pub fn losses(
        &self,
        tape: &Tape,
        weights: &[Var],
        hidden: &Var,
        targets: &Tensor,
        balance: &[BalanceLosses],
    ) -> Result<Losses> {
        let tokens = targets.elements() as f64;
        let cross = cross_entropy(tape, hidden, &weights[self.head], targets, tokens)?;
        let layers = match self.balance.aux_reduction {
            Reduction::Mean => balance.len().max(1) as f64,
            Reduction::Sum => 1.0,
        };
        let aux_scale = match self.router.balance() {
            Balance::Own => 1.0,
            _ => self.balance.aux_coefficient / layers,
        };
        let z_scale = self.balance.z_coefficient / layers;
        let auxiliary = balance.iter().filter_map(|l| l.auxiliary.as_ref());
        let z = balance.iter().filter_map(|l| l.z.as_ref());
        let auxiliary = scaled_sum(tape, auxiliary, aux_scale)?;
        let z = scaled_sum(tape, z, z_scale)?;
        let terms = [Some(&cross), auxiliary.as_ref(), z.as_ref()];
        let terms: Vec<_> = terms.into_iter().flatten().map(|t| (t, 1.0)).collect();
        Ok(Losses {
            total: match &terms[..] {
                [_] => cross.clone(),
                terms => weighted_sum(tape, terms)?,
            },
            cross_entropy: cross,
            auxiliary,
            z,
        })
    }

    /// A recomputed block's outputs: its rows, then whichever balance losses it has.
    fn unpack(&self, block: &Block, outputs: Vec<Var>) -> (Var, Option<BalanceLosses>) {
        let mut outputs = outputs.into_iter();
        let Some(y) = outputs.next() else {
            unreachable!("a block gives its rows")
        };
        let losses = block.moe().map(|_| BalanceLosses {
            auxiliary: if self.has_auxiliary_loss() {
                outputs.next()
            } else {
                None
            },
            z: if self.has_z_loss() {
                outputs.next()
            } else {
                None
            },
        });
        (y, losses)
    }

    /// Whether MoE layers give an auxiliary loss.
    pub fn has_auxiliary_loss(&self) -> bool {
        match self.router.balance() {
            Balance::Auxiliary => self.balance.aux_coefficient != 0.0,
            Balance::Own => true,
            Balance::None => false,
        }
    }

    /// Whether MoE layers give a z-loss.
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

    /// The residual stream's rows, whatever was pending added, and their norm.
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

/// `scale · Σ` of the losses, if there are any.
fn scaled_sum<'v>(
    tape: &Tape,
    losses: impl Iterator<Item = &'v Var>,
    scale: f64,
) -> Result<Option<Var>> {
    let terms: Vec<_> = losses.map(|loss| (loss, scale)).collect();
    if terms.is_empty() {
        return Ok(None);
    }
    weighted_sum(tape, &terms).map(Some)
}
