//! The transformer as a function of its weights: the layers, without the weights themselves.

use super::block::Block;
use super::context::Context;
use super::moe::BalanceLosses;
use super::parameters::{Layout, NormSlots};
use super::rows::Rows;
use super::stream::Stream;
use crate::config::{Config, Recompute};
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::ops::embedding::embedding;
use crate::routers::{Pass, Router};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use std::rc::Rc;
use std::sync::Arc;

/// The layers in their order, and the context that they all read.
pub struct Transformer {
    pub context: Context,
    recompute: Recompute,
    blocks: Vec<Rc<Block>>,
    embedding: usize,
    final_norm: NormSlots,
    /// The index of the output head's parameter.
    pub head: usize,
}

impl Transformer {
    /// Builds the transformer of a configuration, and adds its parameters to `layout`.
    pub fn new(
        layout: &mut Layout,
        config: &Config,
        router: Box<dyn Router>,
        dist: Arc<dyn Collective>,
    ) -> Result<Self> {
        let model = &config.model;
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
        Ok(Transformer {
            // The router's own parameters come after all others, so that the other weights are initially the same for
            // every router.
            context: Context::new(layout, config, router, dist)?,
            recompute: config.train.recompute.clone(),
            blocks,
            embedding,
            final_norm,
            head,
        })
    }

    /// Returns the final hidden rows `[T, D]` of tokens `[T]` (i32), and the balance losses of every MoE layer.
    pub fn hidden(
        self: &Rc<Self>,
        tape: &Tape,
        weights: &Rc<[Var]>,
        ids: &Tensor,
        rows: &Rows,
        pass: Pass,
    ) -> Result<(Var, Vec<BalanceLosses>)> {
        rows.check(ids.elements(), self.context.config.sequence_length)?;
        let mut stream = Stream::new(embedding(tape, &weights[self.embedding], ids)?);
        let mut balance = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let (model, weights, own) = (self.clone(), weights.clone(), block.clone());
            let rows = rows.clone();
            let run = move |tape: &Tape, stream: &Stream| {
                own.forward(&model.context, tape, &weights, stream, &rows, pass)
            };
            let losses;
            (stream, losses) = if self.recompute.covers(layer) {
                // Only one tensor of the stream is kept, so the pending term is added first.
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
        let (_, normed) = self
            .context
            .norm(tape, &stream, weights, &self.final_norm)?;
        Ok((normed, balance))
    }

    /// Runs only MoE layer `layer`, counted from 0.
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
                format!("a MoE layer below {}", self.context.states.borrow().len()),
                layer.to_string(),
                "MoE layers are numbered from 0; dense layers are not counted",
            ));
        };
        moe.forward(&self.context, tape, weights, x, pass)
    }

    /// Divides the outputs of a recomputed block into its rows and its balance losses.
    fn unpack(&self, block: &Block, outputs: Vec<Var>) -> (Var, Option<BalanceLosses>) {
        let mut outputs = outputs.into_iter();
        let Some(y) = outputs.next() else {
            unreachable!("a block gives its rows")
        };
        let losses = block.moe().map(|_| BalanceLosses {
            auxiliary: if self.context.has_auxiliary_loss() {
                outputs.next()
            } else {
                None
            },
            z: if self.context.has_z_loss() {
                outputs.next()
            } else {
                None
            },
        });
        (y, losses)
    }
}
