//! The model: a decoder-only transformer, pre-norm, whose feed-forward layers are mixtures of experts.
//!
//! `x += attn(norm₁(x)); x += ffn(norm₂(x))`, a final norm, an output head; causal attention with
//! RoPE, SwiGLU, the first layer's feed-forward dense (Default MoE, 2504.12463, section 4.1 and A.2).

pub mod batch;
mod block;
mod context;
mod feed_forward;
mod inputs;
mod losses;
mod moe;
mod parameters;
mod rounded;
mod rows;
mod score;
mod stream;
mod transformer;
mod weight;

pub use inputs::Inputs;
pub use losses::Losses;
pub use parameters::{Parameter, Part};
pub use score::Scored;
pub use weight::{Places, Weight};

use crate::config::{Config, ModelConfig};
use crate::device::Device;
use crate::dist::{Collective, DeviceRanks, SingleRank};
use crate::error::{Error, Result};
use crate::model::batch::Sequences;
use crate::ops::cached_attention::KeyValueCache;
use crate::ops::cross_entropy::{cross_entropy, token_losses};
use crate::ops::linear::linear;
use crate::routers::{self, DeviceTally, LayerState, Pass, Router};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::with_real;
use losses::losses;
use parameters::Layout;
use rounded::rounded;
use rows::Rows;
use std::cell::{Ref, RefMut};
use std::rc::Rc;
use std::sync::Arc;
use transformer::Transformer;

/// A model: its parameters and its layers.
pub struct Model {
    /// The parameters, in the order of their slots in the gradient store.
    pub parameters: Vec<Parameter>,
    transformer: Rc<Transformer>,
}

/// The parameters as variables of a tape: leaves in the order of the parameters.
pub type Weights = Rc<[Var]>;

impl Model {
    /// Initialises a model on one rank. Its weights are drawn from the configuration's seed.
    ///
    /// # Errors
    /// Returns an error when the router cannot be built or cannot train this model.
    pub fn new(config: &Config) -> Result<Self> {
        Self::with_router(
            config,
            routers::build(&config.router)?,
            Arc::new(SingleRank),
        )
    }

    /// Initialises a model, as one of several ranks, with the given router instead of the configuration's router.
    ///
    /// # Errors
    /// Returns an error when the router refuses the model.
    pub fn with_router(
        config: &Config,
        router: Box<dyn Router>,
        dist: Arc<dyn Collective>,
    ) -> Result<Self> {
        router.validate(&config.model)?;
        router.validate_device(&config.model, config.train.device)?;
        config.train.device.prepare()?;
        let mut layout = Layout::new(
            &config.model,
            config.train.dtype.dtype(),
            config.train.device,
            config.train.seed,
        );
        let transformer = Transformer::new(&mut layout, config, router, dist)?;
        Ok(Model {
            parameters: layout.into_parameters(),
            transformer: Rc::new(transformer),
        })
    }

    /// Copies weights (matched by name) and router state (matched by layer) from another model, as far as that model
    /// has them, and converts them to this model's precision.
    ///
    /// # Errors
    /// Returns an error when a shape differs.
    pub fn take_over(&mut self, other: &Model) -> Result<()> {
        let dtype = self.dtype();
        let own = |tensor: Tensor| match tensor.dtype() == dtype {
            true => Ok(tensor),
            false => rounded(
                &Tensor::from_slice(tensor.shape(), &tensor.to_f64()?),
                dtype,
            ),
        };
        for parameter in &mut self.parameters {
            let theirs = other.parameters.iter().find(|p| p.name == parameter.name);
            if let Some(theirs) = theirs {
                let value = own(theirs.value.whole())?;
                value.expect_shape("model", &parameter.name, parameter.value.shape())?;
                parameter.value.set(&value);
            }
        }
        let mut states = self.layer_states_mut();
        for (state, theirs) in states.iter_mut().zip(other.layer_states().iter()) {
            for (name, tensor) in theirs.tensors() {
                state.restore(name, own(tensor.clone())?)?;
            }
        }
        Ok(())
    }

    /// Returns the model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.transformer.context.config
    }

    /// Returns the device that the model runs on.
    pub fn device(&self) -> Device {
        self.transformer.context.device
    }

    /// Returns the dtype of weights and router state, and on the CPU of activations.
    pub fn dtype(&self) -> DType {
        self.transformer.context.dtype
    }

    /// Returns the parameters as variables. Drop them before you update the parameters in place: writing to shared
    /// memory copies it first.
    pub fn weights(&self) -> Weights {
        self.parameters
            .iter()
            .enumerate()
            .map(|(i, p)| Var::parameter(p.value.working().clone(), i))
            .collect()
    }

    /// Returns the state of the MoE layers, in the order of the layers.
    pub fn layer_states(&self) -> Ref<'_, Vec<LayerState>> {
        self.transformer.context.states.borrow()
    }

    /// Returns the state of the MoE layers for modification.
    pub fn layer_states_mut(&self) -> RefMut<'_, Vec<LayerState>> {
        self.transformer.context.states.borrow_mut()
    }

    /// Returns the counters and flags of all MoE layers, if they are in device memory.
    pub(crate) fn device_tally(&self) -> Option<Rc<DeviceTally>> {
        self.transformer.context.tally.clone()
    }

    /// Returns the router.
    pub fn router(&self) -> &dyn Router {
        &*self.transformer.context.router
    }

    /// Returns the communication between the ranks of the run.
    pub fn dist(&self) -> &dyn Collective {
        &*self.transformer.context.dist
    }

    /// Returns the ranks for communication in device memory, if the device has kernels and there are several ranks.
    pub(crate) fn device_ranks(&self) -> Option<DeviceRanks> {
        self.transformer.context.device_ranks()
    }

    /// Returns the parameters for modification, and the communication between ranks.
    pub(crate) fn parameters_and_dist(&mut self) -> (&mut [Parameter], &dyn Collective) {
        (&mut self.parameters, &*self.transformer.context.dist)
    }

    /// Lets the router update its pending state. Call this at the end of an accepted step, before the states are
    /// committed. [`StepExecutor::step`](crate::train::step::StepExecutor::step) does both.
    ///
    /// # Errors
    /// The errors of the router.
    pub fn end_step(&self) -> Result<()> {
        let context = &self.transformer.context;
        let mut states = context.states.borrow_mut();
        let router = &context.router;
        router.end_step(&context.config, &mut states, &*context.dist)
    }

    /// Checks that these are weights of this model.
    fn check_weights(&self, weights: &Weights) -> Result<()> {
        let own = self.parameters.iter().map(|p| p.value.shape());
        if weights.iter().map(|w| w.tensor().shape()).eq(own) {
            return Ok(());
        }
        Err(Error::invalid(
            "the weights",
            format!(
                "the {} weights of this model, with its shapes",
                self.parameters.len()
            ),
            format!("{} weights, or other shapes", weights.len()),
            "use what Model::weights of the same model returns",
        ))
    }

    /// Returns the losses of sequences: the first S tokens of each sequence predict its last S tokens.
    ///
    /// # Errors
    /// Returns an error when the sequences do not fit, or a token is beyond the vocabulary.
    pub fn loss(
        &self,
        tape: &Tape,
        weights: &Weights,
        sequences: Sequences,
        pass: Pass,
    ) -> Result<Losses> {
        self.loss_of(tape, weights, &Inputs::new(sequences, self.device())?, pass)
    }

    /// Returns the losses of sequences that are already in the model's inputs.
    ///
    /// # Errors
    /// The same errors as [`loss`](Self::loss).
    pub fn loss_of(
        &self,
        tape: &Tape,
        weights: &Weights,
        inputs: &Inputs,
        pass: Pass,
    ) -> Result<Losses> {
        self.check_weights(weights)?;
        let Inputs {
            ids, targets, rows, ..
        } = inputs;
        let (hidden, balance) = self.transformer.hidden(tape, weights, ids, rows, pass)?;
        losses(
            &self.transformer.context,
            tape,
            &hidden,
            &weights[self.transformer.head],
            targets,
            &balance,
        )
    }

    /// Returns the logits `[sequences · S, V]` of sequences as in [`loss`](Self::loss), and the mean cross-entropy
    /// without balance losses.
    ///
    /// # Errors
    /// The same errors as [`loss`](Self::loss).
    pub fn logits_and_loss(
        &self,
        tape: &Tape,
        weights: &Weights,
        sequences: Sequences,
        pass: Pass,
    ) -> Result<(Tensor, Var)> {
        self.check_weights(weights)?;
        let Inputs {
            ids, targets, rows, ..
        } = Inputs::new(sequences, self.device())?;
        let (hidden, _) = self.transformer.hidden(tape, weights, &ids, &rows, pass)?;
        let head = &weights[self.transformer.head];
        let constant = |v: &Var| Var::constant(v.tensor().clone());
        let logits = linear(tape, &constant(&hidden), &constant(head), None)?;
        let count = targets.elements() as f64;
        let loss = cross_entropy(tape, &hidden, head, &targets, count)?;
        Ok((logits.tensor().clone(), loss))
    }

    /// Runs only MoE layer `layer` (from 0). Returns its output `[T, D]` for `x [T, D]`, and its balance losses
    /// without their coefficients.
    ///
    /// # Errors
    /// Returns an error when there is no such layer or `x` does not fit.
    pub fn moe_layer(
        &self,
        layer: usize,
        tape: &Tape,
        weights: &Weights,
        x: &Var,
        pass: Pass,
    ) -> Result<(Var, Vec<Var>)> {
        self.check_weights(weights)?;
        let (y, losses) = self.transformer.moe_layer(layer, tape, weights, x, pass)?;
        Ok((
            y,
            [losses.auxiliary, losses.z].into_iter().flatten().collect(),
        ))
    }

    /// Returns the loss of every next token, `[sequences · S]`, in nats, in an evaluation pass.
    ///
    /// # Errors
    /// The same errors as [`loss`](Self::loss).
    pub fn token_losses(&self, sequences: Sequences) -> Result<Vec<f64>> {
        self.token_losses_in(sequences, Pass::EVALUATE)
    }

    /// Returns the loss of every next token, `[sequences · S]`, in nats, in the given pass.
    ///
    /// # Errors
    /// The same errors as [`loss`](Self::loss).
    pub fn token_losses_in(&self, sequences: Sequences, pass: Pass) -> Result<Vec<f64>> {
        let Inputs {
            ids, targets, rows, ..
        } = Inputs::new(sequences, self.device())?;
        let (weights, tape) = (self.weights(), Tape::without_gradients());
        let (hidden, _) = self
            .transformer
            .hidden(&tape, &weights, &ids, &rows, pass)?;
        let head = weights[self.transformer.head].tensor();
        token_losses(hidden.tensor(), head, &targets)?.to_f64()
    }

    /// Returns the logits `[sequences · V]` of the token that follows each of `sequences` equally long sequences, in
    /// an evaluation pass.
    ///
    /// # Errors
    /// Returns an error when a token is beyond the vocabulary, or the sequences are longer than the model's.
    pub fn next_token_logits(&self, tokens: &[i32], sequences: usize) -> Result<Vec<f64>> {
        self.last_logits(tokens, sequences, &Rows::Equal(sequences))
    }

    /// Returns the logits `[V]` of the token that follows the sequence in `cache` and then `tokens`, in an evaluation
    /// pass. The keys and values of `tokens` are added to the cache. Only on the CPU.
    ///
    /// # Errors
    /// Returns an error when a token is beyond the vocabulary, or the sequence becomes longer than the model allows.
    /// The cache must not be used after an error.
    pub fn next_token_logits_after(
        &self,
        cache: &Rc<KeyValueCache>,
        tokens: &[i32],
    ) -> Result<Vec<f64>> {
        let logits = self.last_logits(tokens, 1, &Rows::Cached(cache.clone()))?;
        cache.advance(tokens.len());
        Ok(logits)
    }

    /// Returns the logits of the last row of each of `sequences` sequences.
    fn last_logits(&self, tokens: &[i32], sequences: usize, rows: &Rows) -> Result<Vec<f64>> {
        let (weights, tape) = (self.weights(), Tape::without_gradients());
        let ids = Tensor::from_slice([tokens.len()], tokens);
        let (hidden, _) = self
            .transformer
            .hidden(&tape, &weights, &ids, rows, Pass::EVALUATE)?;
        let (length, width) = (tokens.len() / sequences, self.config().hidden);
        let mut last = Tensor::unspecified(Device::Cpu, self.dtype(), [sequences, width]);
        with_real!(self.dtype(), "logits", |T| {
            let hidden = hidden.tensor().widened();
            let hidden = hidden.slice::<T>();
            for (s, row) in last.slice_mut::<T>().chunks_mut(width).enumerate() {
                let at = ((s + 1) * length - 1) * width;
                row.copy_from_slice(&hidden[at..at + width]);
            }
            Ok(())
        })?;
        let head = Var::constant(
            weights[self.transformer.head]
                .tensor()
                .widened()
                .on(Device::Cpu),
        );
        let logits = linear(&tape, &Var::constant(last), &head, None)?;
        logits.tensor().to_f64()
    }
}
