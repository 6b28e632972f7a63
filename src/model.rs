//! The model: a decoder-only transformer, pre-norm, whose feed-forward layers are mixtures of experts.
//!
//! `x += attn(norm₁(x)); x += ffn(norm₂(x))`, a final norm, an output head; causal attention with
//! RoPE, SwiGLU, the first layer's feed-forward dense (Default MoE, 2504.12463, section 4.1 and A.2).

mod block;
mod moe;
mod parameters;

pub use parameters::{Parameter, Part};

use crate::config::{Config, ModelConfig, Norm, Reduction, RouterConfig};
use crate::device::Device;
use crate::dtype::{DType, Real};
use crate::error::{Error, Result};
use crate::ops::balance::weighted_sum;
use crate::ops::cross_entropy::{cross_entropy, token_losses};
use crate::ops::embedding::embedding;
use crate::ops::linear::linear;
use crate::ops::rope::RopeTables;
use crate::routers::{self, LayerState, Pass, Router};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::with_real;
use block::Block;
use parameters::Layout;
use std::cell::{Ref, RefCell, RefMut};

/// A model: configuration, parameters, and the router with its state.
pub struct Model {
    config: ModelConfig,
    balance: crate::config::BalanceConfig,
    recompute: crate::config::Recompute,
    /// In the order of their gradients' slots.
    pub parameters: Vec<Parameter>,
    blocks: Vec<Block>,
    embedding: usize,
    final_norm: parameters::NormSlots,
    head: usize,
    router: Box<dyn Router>,
    states: RefCell<Vec<LayerState>>,
    rope: RopeTables,
    dtype: DType,
}

/// The losses of one micro-batch: the total on the tape, its parts as numbers.
pub struct Losses {
    /// Cross-entropy plus weighted auxiliary and z-loss, a scalar.
    pub total: Var,
    /// Mean cross-entropy of the next token, in nats.
    pub cross_entropy: f64,
    /// The auxiliary loss, coefficient and reduction over layers included.
    pub auxiliary: f64,
    /// The z-loss, coefficient and reduction over layers included.
    pub z: f64,
}

impl Model {
    /// A freshly initialised model, its weights drawn from the configuration's seed.
    ///
    /// # Errors
    /// When the router cannot be built or cannot train this model.
    pub fn new(config: &Config) -> Result<Self> {
        Self::with_router(config, routers::build(&config.router)?)
    }

    /// A model with a router of one's own instead of the configuration's.
    ///
    /// # Errors
    /// When the router refuses the model.
    pub fn with_router(config: &Config, router: Box<dyn Router>) -> Result<Self> {
        let model = &config.model;
        router.validate(model)?;
        let (dtype, seed) = (config.train.dtype.dtype(), config.train.seed);
        let mut layout = Layout::new(model, dtype, seed);
        let embedding = layout.embedding("model.embed_tokens.weight", model.vocab_size);
        let blocks: Vec<Block> =
            (0..model.layers).map(|l| Block::new(&mut layout, model, l)).collect();
        let final_norm = layout.norm("model.norm");
        let head = if model.tied_embeddings {
            embedding
        } else {
            layout.matrix("lm_head.weight", &[model.vocab_size, model.hidden])
        };
        let states = (0..model.moe_layers().len())
            .map(|layer| {
                let mut tensors = router.initial_state(model, layer, seed);
                for t in &mut tensors {
                    t.start = rounded(&t.start, dtype)?;
                }
                Ok(LayerState::new(tensors))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Model {
            config: model.clone(),
            balance: config.balance.clone(),
            recompute: config.train.recompute.clone(),
            parameters: layout.into_parameters(),
            blocks,
            embedding,
            final_norm,
            head,
            router,
            states: RefCell::new(states),
            rope: RopeTables::new(dtype, model.sequence_length, model.head_dim, model.rope_theta)?,
            dtype,
        })
    }

    /// The model's shapes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype of weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The parameters as variables, leaves in their order. Drop them before updating the parameters
    /// in place: shared memory is copied when written.
    pub fn variables(&self) -> Vec<Var> {
        self.parameters.iter().enumerate().map(|(i, p)| Var::leaf(p.value.clone(), i)).collect()
    }

    /// The state of the MoE layers, first MoE layer first.
    pub fn layer_states(&self) -> Ref<'_, Vec<LayerState>> {
        self.states.borrow()
    }

    /// The state of the MoE layers, to change.
    pub fn layer_states_mut(&self) -> RefMut<'_, Vec<LayerState>> {
        self.states.borrow_mut()
    }

    /// Losses of `tokens`, `[sequences, S + 1]` in row order: each row's first S predict its last S.
    ///
    /// # Errors
    /// When the tokens do not fit, or one is beyond the vocabulary.
    pub fn loss<'a>(
        &'a self,
        tape: &Tape<'a>,
        weights: &'a [Var],
        tokens: &[i32],
        sequences: usize,
        pass: Pass<'a>,
    ) -> Result<Losses> {
        let (inputs, targets) = split(tokens, sequences)?;
        let (hidden, balance) = self.hidden(tape, weights, &inputs, sequences, pass)?;
        let cross = cross_entropy(tape, &hidden, &weights[self.head], &targets)?;
        let layers = match self.balance.aux_reduction {
            Reduction::Mean => balance.len().max(1) as f64,
            Reduction::Sum => 1.0,
        };
        let (aux_scale, z_scale) =
            (self.balance.aux_coefficient / layers, self.balance.z_coefficient / layers);
        let mut terms = vec![(&cross, 1.0)];
        let (mut auxiliary, mut z) = (0.0, 0.0);
        for layer in &balance {
            if let Some(loss) = &layer.auxiliary {
                auxiliary += aux_scale * loss.tensor().item()?;
                terms.push((loss, aux_scale));
            }
            if let Some(loss) = &layer.z {
                z += z_scale * loss.tensor().item()?;
                terms.push((loss, z_scale));
            }
        }
        let total = weighted_sum(tape, &terms)?;
        Ok(Losses { total, cross_entropy: cross.tensor().item()?, auxiliary, z })
    }

    /// The loss of every next token, `[sequences · S]`, in nats, at evaluation.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn token_losses(&self, tokens: &[i32], sequences: usize, pass: Pass<'_>) -> Result<Vec<f64>> {
        let (inputs, targets) = split(tokens, sequences)?;
        let weights = self.variables();
        let (hidden, _) =
            self.hidden(&Tape::without_gradients(), &weights, &inputs, sequences, pass)?;
        token_losses(hidden.tensor(), weights[self.head].tensor(), &targets)?.to_f64()
    }

    /// Logits `[sequences, V]` of the token that follows each of `sequences` equally long sequences.
    ///
    /// # Errors
    /// When a token is beyond the vocabulary, or the sequences are longer than the model's.
    pub fn next_token_logits(
        &self,
        tokens: &[i32],
        sequences: usize,
        pass: Pass<'_>,
    ) -> Result<Vec<f64>> {
        let weights = self.variables();
        let tape = Tape::without_gradients();
        let (hidden, _) = self.hidden(&tape, &weights, tokens, sequences, pass)?;
        let length = tokens.len() / sequences;
        let width = self.config.hidden;
        let mut last = Tensor::unspecified(Device::Cpu, self.dtype, [sequences, width]);
        with_real!(self.dtype, "logits", |T| {
            let hidden = hidden.tensor().slice::<T>();
            for (s, row) in last.slice_mut::<T>().chunks_mut(width).enumerate() {
                let at = ((s + 1) * length - 1) * width;
                row.copy_from_slice(&hidden[at..at + width]);
            }
            Ok(())
        })?;
        let logits = linear(&tape, &Var::constant(last), &weights[self.head], None)?;
        logits.tensor().to_f64()
    }

    /// The final hidden rows `[sequences · S, D]` and the balance losses of every MoE layer.
    fn hidden<'a>(
        &'a self,
        tape: &Tape<'a>,
        weights: &'a [Var],
        inputs: &[i32],
        sequences: usize,
        pass: Pass<'a>,
    ) -> Result<(Var, Vec<moe::BalanceLosses>)> {
        let length = inputs.len() / sequences.max(1);
        if length == 0 || length > self.config.sequence_length || length * sequences != inputs.len() {
            return Err(Error::invalid(
                "model",
                format!(
                    "sequences of equal length, from 1 to model.sequence_length = {}",
                    self.config.sequence_length
                ),
                format!("{} tokens for {sequences} sequences", inputs.len()),
                "cut or pad the tokens, or raise model.sequence_length",
            ));
        }
        let ids = Tensor::from_slice([inputs.len()], inputs);
        let mut x = embedding(tape, &weights[self.embedding], &ids)?;
        let mut balance = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let run = move |tape: &Tape<'a>, x: &Var| {
                block.forward(self, tape, weights, x, sequences, pass)
            };
            let (y, losses) = if self.recompute.covers(layer) {
                let outputs = tape.recompute(&[&x], move |tape, v| {
                    let (y, losses) = run(tape, &v[0])?;
                    Ok([Some(y)].into_iter().chain(losses.into_iter().flat_map(|l| [l.auxiliary, l.z])).flatten().collect())
                })?;
                self.unpack(block, outputs)
            } else {
                run(tape, &x)?
            };
            x = y;
            balance.extend(losses);
        }
        Ok((self.norm(tape, &x, weights, &self.final_norm)?, balance))
    }

    /// A recomputed block's outputs: its rows, then whichever balance losses it has.
    fn unpack(&self, block: &Block, outputs: Vec<Var>) -> (Var, Option<moe::BalanceLosses>) {
        let mut outputs = outputs.into_iter();
        let Some(y) = outputs.next() else { unreachable!("a block gives its rows") };
        let wanted = self.balance_wanted();
        let losses = block.is_moe().then(|| moe::BalanceLosses {
            auxiliary: wanted.0.then(|| outputs.next()).flatten(),
            z: wanted.1.then(|| outputs.next()).flatten(),
        });
        (y, losses)
    }

    /// Whether MoE layers give an auxiliary loss and a z-loss.
    fn balance_wanted(&self) -> (bool, bool) {
        let b = &self.balance;
        (self.router.balances() && b.aux_coefficient != 0.0, self.router.balances() && b.z_coefficient != 0.0)
    }

    fn norm(&self, tape: &Tape<'_>, x: &Var, weights: &[Var], slots: &parameters::NormSlots) -> Result<Var> {
        let (weight, eps) = (&weights[slots.weight], self.config.norm_eps);
        match (self.config.norm, slots.bias) {
            (Norm::LayerNorm, Some(bias)) => {
                crate::ops::layernorm::layernorm(tape, x, weight, &weights[bias], eps)
            }
            _ => crate::ops::rmsnorm::rmsnorm(tape, x, weight, eps),
        }
    }
}

/// Checks a router's name and settings and fills in its defaults: the hook of [`Config::load`].
///
/// # Errors
/// When there is no such router or setting.
pub fn check_router(config: &mut RouterConfig) -> Result<()> {
    routers::resolve(config)
}

/// Inputs and targets of `[sequences, S + 1]` tokens.
fn split(tokens: &[i32], sequences: usize) -> Result<(Vec<i32>, Tensor)> {
    let length = tokens.len() / sequences.max(1);
    if sequences == 0 || length < 2 || length * sequences != tokens.len() {
        return Err(Error::invalid(
            "model",
            "at least one sequence of at least two tokens, all of one length",
            format!("{} tokens for {sequences} sequences", tokens.len()),
            "pass [sequences, S + 1] tokens",
        ));
    }
    let rows = || tokens.chunks(length);
    let inputs = rows().flat_map(|r| &r[..length - 1]).copied().collect();
    let targets: Vec<i32> = rows().flat_map(|r| &r[1..]).copied().collect();
    Ok((inputs, Tensor::from_slice([targets.len()], &targets)))
}

/// An f64 tensor in another real dtype.
fn rounded(t: &Tensor, dtype: DType) -> Result<Tensor> {
    let mut out = Tensor::unspecified(t.device(), dtype, t.shape());
    with_real!(dtype, "model", |T| {
        for (o, &x) in out.slice_mut::<T>().iter_mut().zip(t.slice::<f64>()) {
            *o = T::of(x);
        }
        Ok(out)
    })
}

#[cfg(test)]
mod tests;
