//! Compares router gradients with two references: for each K with the gradient of the dense model, which has its own
//! forward pass; and with the gradient that uses the outputs of all experts, at the incoming gradient of the method
//! itself.

use super::probe::Watched;
use super::shares::shared_out_known;
use super::substitutes::LayerWeights;
use crate::config::Config;
use crate::data::Corpus;
use crate::dist::{Collective, SingleRank};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::{Batch, Sequences};
use crate::ops::experts::{Experts, experts};
use crate::routers::default::{DefaultMoe, VECTORS};
use crate::routers::dense::Dense;
use crate::routers::densemixer::DenseMixer;
use crate::routers::topk::TopK;
use crate::routers::{self, LayerPass, LayerState, Pass, Phase, Router, StateTensor};
use crate::tape::{Gradients, Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::tensor::shape::Shape;
use crate::with_real;

/// The methods that are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Method {
    TopK,
    Default,
}

impl Method {
    pub const BOTH: [Method; 2] = [Method::TopK, Method::Default];

    pub fn name(self) -> &'static str {
        match self {
            Method::TopK => "topk",
            Method::Default => "default",
        }
    }

    /// Returns the router of the method. `default` has the settings of the checkpoint if the checkpoint was trained
    /// with it. Experts are weighted by p.
    pub fn router(self, config: &Config) -> Result<Box<dyn Router>> {
        match self {
            Method::TopK => Ok(Box::new(TopK::default())),
            Method::Default if own_method(config)? == Method::Default => {
                let mut own = config.router.clone();
                own.settings.remove("renormalize");
                routers::build(&own)
            }
            Method::Default => Ok(Box::new(DefaultMoe::default())),
        }
    }
}

/// Returns the method that has the forward pass of the model: `default` if the model keeps default vectors, else
/// `topk`.
pub fn own_method(config: &Config) -> Result<Method> {
    let own = routers::build(&config.router)?;
    let state = own.initial_state(&config.model, 0, 0);
    Ok(match state.iter().any(|t| t.name == VECTORS) {
        true => Method::Default,
        false => Method::TopK,
    })
}

/// Sequences for the gradients, a micro-batch at a time.
pub struct MicroBatches {
    pub all: Batch,
    pub micro_batch: usize,
}

impl MicroBatches {
    /// Returns the micro-batches.
    pub fn parts(&self) -> impl Iterator<Item = Sequences<'_>> {
        self.all.chunks(self.micro_batch)
    }
}

/// Returns the cosine similarity; none if a vector is zero or a number is not finite.
pub fn cosine(a: &[f64], b: &[f64]) -> Option<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    Some(dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())).filter(|c| c.is_finite())
}

/// Computes default vectors for a model that has none: those of `default` after `passes` micro-batches of training
/// text, with unchanged weights, β = 0.9 and zeros at the start. The output of each layer is that of `topk`, so that
/// every layer gets the same inputs as in training.
pub fn fill_vectors(
    config: &Config,
    source: &Model,
    corpus: &Corpus,
    passes: usize,
) -> Result<Vec<Tensor>> {
    let router = DefaultMoe {
        pass_forward: false,
        ..Default::default()
    };
    let watched = Watched::new(config, Box::new(router), source)?;
    let n = config.train.micro_batch as u64;
    for pass in 0..passes as u64 {
        let batch = corpus.sequences(pass * n..(pass + 1) * n);
        watched.see(batch.all(), Phase::Train)?;
        let mut states = watched.model.layer_states_mut();
        states.iter_mut().for_each(LayerState::commit);
    }
    vectors_of(&watched.model)
}

/// Returns the default vectors of every MoE layer, each `[E, D]`; empty if the model has none.
pub fn vectors_of(model: &Model) -> Result<Vec<Tensor>> {
    let states = model.layer_states();
    let found = states.iter().filter_map(|state| {
        let mut tensors = state.tensors();
        tensors.find(|(name, _)| *name == VECTORS)
    });
    Ok(found.map(|(_, tensor)| tensor.clone()).collect())
}

/// Returns a model with the weights of the checkpoint, the given router and default vectors, and `top_k` experts per
/// token.
pub fn estimator(
    config: &Config,
    source: &Model,
    vectors: &[Tensor],
    router: Box<dyn Router>,
    top_k: usize,
) -> Result<Watched> {
    let mut config = config.clone();
    config.model.top_k = top_k;
    let watched = Watched::new(&config, router, source)?;
    let mut states = watched.model.layer_states_mut();
    let own = source.layer_states();
    for ((state, own), vectors) in states.iter_mut().zip(own.iter()).zip(vectors) {
        for (name, tensor) in own.tensors() {
            state.restore(name, tensor.clone())?;
        }
        state.restore(VECTORS, vectors.clone())?;
    }
    drop(states);
    Ok(watched)
}

/// Computes gradients of the mean cross-entropy over the batch, with frozen state and without recomputation. Calls
/// `after` with the gradients of each micro-batch before they are reset.
pub fn backward(
    watched: &Watched,
    batch: &MicroBatches,
    mut after: impl FnMut(&Gradients) -> Result<()>,
) -> Result<()> {
    let model = &watched.model;
    let mut store = Gradients::new(watched.slots());
    for sequences in batch.parts() {
        let (tape, weights) = (Tape::new(), model.weights());
        let pass = Pass::single(Phase::Frozen);
        let losses = model.loss(&tape, &weights, sequences, pass)?;
        let share = sequences.count as f64 / batch.all.sequences as f64;
        store.reset();
        tape.backward(&losses.total, share, &mut store)?;
        after(&store)?;
    }
    Ok(())
}

/// Returns the index of the parameter `suffix` of an MoE layer.
fn slot(model: &Model, layer: usize, suffix: &str) -> Result<usize> {
    let name = format!("model.layers.{layer}.mlp.{suffix}");
    let found = model.parameters.iter().position(|p| p.name == name);
    found.ok_or_else(|| {
        Error::invalid(
            "analyze",
            format!("a parameter {name}"),
            "none",
            "use a checkpoint of this program",
        )
    })
}

/// Returns the weights of every MoE layer.
pub fn layer_weights(model: &Model) -> Result<Vec<LayerWeights<'_>>> {
    let weights = |layer: usize| -> Result<LayerWeights<'_>> {
        let value = |slot: usize| model.parameters[slot].value.working();
        let of = |suffix| slot(model, layer, suffix).map(value);
        Ok(LayerWeights {
            gate: of("gate.weight")?,
            gate_up: of("experts.gate_up_proj")?,
            down: of("experts.down_proj")?,
        })
    };
    let layers = model.config().moe_layers().into_iter();
    layers.map(weights).collect()
}

/// Returns the router gradient `[E, D]`, flattened, of every MoE layer under one estimator.
pub fn router_gradients(
    config: &Config,
    source: &Model,
    vectors: &[Tensor],
    router: Box<dyn Router>,
    top_k: usize,
    batch: &MicroBatches,
) -> Result<Vec<Vec<f64>>> {
    let watched = estimator(config, source, vectors, router, top_k)?;
    let layers = config.model.moe_layers().into_iter();
    let slots = layers.map(|layer| slot(&watched.model, layer, "gate.weight"));
    let slots: Vec<usize> = slots.collect::<Result<_>>()?;
    let size = config.model.num_experts * config.model.hidden;
    let mut sums = vec![vec![0.0; size]; slots.len()];
    backward(&watched, batch, |store| {
        watched.take();
        for (sum, slot) in sums.iter_mut().zip(&slots) {
            if let Some(gradient) = store.get(*slot) {
                let gradient = gradient.to_f64()?;
                sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
            }
        }
        Ok(())
    })?;
    Ok(sums)
}

/// Returns the cosine similarities to the router gradient of the dense model, which has its own forward pass:
/// `[method][K − 1][MoE layer]`. K goes from 1 to E − 1, in all layers together.
pub fn dense_similarity(
    dist: &dyn Collective,
    config: &Config,
    source: &Model,
    vectors: &[Tensor],
    batch: &MicroBatches,
) -> Result<[Vec<Vec<Option<f64>>>; 2]> {
    let experts = config.model.num_experts;
    let of =
        |router: Box<dyn Router>, k| router_gradients(config, source, vectors, router, k, batch);
    let dense = of(Box::new(Dense {}), experts)?;
    let pairs = Method::BOTH.map(|method| (1..experts).map(move |k| (method, k)));
    let pairs: Vec<(Method, usize)> = pairs.into_iter().flatten().collect();
    let mut topk = shared_out_known(dist, pairs.len(), |i| {
        let (method, k) = pairs[i];
        let gradients = of(method.router(config)?, k)?;
        let beside = gradients.iter().zip(&dense);
        Ok(beside.map(|(g, d)| cosine(g, d)).collect())
    })?;
    let default = topk.split_off(pairs.len() / 2);
    Ok([topk, default])
}

/// The data of one layer that the gradient of its router depends on.
pub struct LayerAt<'a> {
    /// Router logits `[T, E]`.
    pub z: &'a Tensor,
    /// Input of the layer `[T, D]`.
    pub x: &'a Tensor,
    /// ∂loss/∂y `[T, D]`.
    pub g: &'a Tensor,
    pub weights: LayerWeights<'a>,
    /// State of the layer's router, by name.
    pub state: &'a [(&'static str, Tensor)],
}

impl LayerAt<'_> {
    /// Returns dz `[T, E]` of a router with `top_k` experts per token. It runs the operations of training with the
    /// logits as the router's input and the identity matrix as the router's weight.
    pub fn logit_gradient(
        &self,
        config: &Config,
        router: &dyn Router,
        top_k: usize,
    ) -> Result<Vec<f64>> {
        let experts_n = config.model.num_experts;
        let declared = router.initial_state(&config.model, 0, 0).into_iter();
        let mut state = LayerState::new(
            declared
                .map(|StateTensor { name, start }| {
                    let known = self.state.iter().find(|(known, _)| *known == name);
                    let start = known.map_or(start, |(_, tensor)| tensor.clone());
                    StateTensor { name, start }
                })
                .collect(),
        );
        let pass = Pass::single(Phase::Frozen);
        let mut layer = LayerPass::new(pass, &SingleRank, 0, top_k, 0, &mut state, false);
        let entry = |i: usize| f64::from(u8::from(i % (experts_n + 1) == 0));
        let identity: Vec<f64> = (0..experts_n * experts_n).map(entry).collect();
        let identity = rounded(self.z.dtype(), [experts_n, experts_n], &identity)?;
        let (tape, mut store) = (Tape::new(), Gradients::new(1));
        let z = Var::leaf(self.z.clone(), 0);
        let routing = router.route(&tape, &z, &Var::constant(identity), &mut layer)?;
        let LayerWeights { gate_up, down, .. } = self.weights;
        let [x, gate_up, down] = [self.x, gate_up, down].map(|t| Var::constant(t.clone()));
        let input = Experts {
            x: &x,
            gates: &routing.gates,
            gate_up: &gate_up,
            down: &down,
            sum_weights: None,
        };
        let y = experts(&tape, input, &routing.dispatch, None, |sums| {
            router.defaults(sums, &mut layer)
        })?;
        tape.backward_from(&[(&y, self.g.clone())], &mut store)?;
        match store.get(0) {
            Some(dz) => dz.to_f64(),
            None => Ok(vec![0.0; self.z.elements()]),
        }
    }
}

/// Returns ‖dz_densemixer − dz_method‖ / ‖dz_densemixer‖ of every MoE layer, both at the method's own incoming
/// gradient: `[method][MoE layer]`.
pub fn gradient_error(
    dist: &dyn Collective,
    config: &Config,
    source: &Model,
    vectors: &[Tensor],
    batch: &MicroBatches,
) -> Result<Vec<Vec<Option<f64>>>> {
    let top_k = config.model.top_k;
    let error_of = |method: Method| -> Result<Vec<Option<f64>>> {
        let watched = estimator(config, source, vectors, method.router(config)?, top_k)?;
        let (model, weights) = (&watched.model, layer_weights(&watched.model)?);
        // Squared norms of the difference and of the reference.
        let mut sums = vec![[0.0f64; 2]; vectors.len()];
        backward(&watched, batch, |store| {
            for (l, seen) in watched.take().iter().enumerate() {
                let Some(g) = store.get(watched.slot(l)) else {
                    continue;
                };
                let z = weights[l].logits(&seen.x)?;
                let states = model.layer_states();
                let state = states[l].tensors().map(|(name, t)| (name, t.clone()));
                let state: Vec<_> = state.collect();
                let layer = LayerAt {
                    z: &z,
                    x: &seen.x,
                    g,
                    weights: weights[l],
                    state: &state,
                };
                let full = layer.logit_gradient(config, &DenseMixer::default(), top_k)?;
                let own = layer.logit_gradient(config, &*method.router(config)?, top_k)?;
                for (full, own) in full.iter().zip(own) {
                    sums[l][0] += (full - own) * (full - own);
                    sums[l][1] += full * full;
                }
            }
            Ok(())
        })?;
        let relative = |[e, n]: &[f64; 2]| Some((e / n).sqrt()).filter(|r| r.is_finite());
        Ok(sums.iter().map(relative).collect())
    };
    shared_out_known(dist, Method::BOTH.len(), |i| error_of(Method::BOTH[i]))
}

/// Returns a tensor with these elements, rounded to `dtype`.
pub fn rounded(dtype: DType, shape: impl Into<Shape>, values: &[f64]) -> Result<Tensor> {
    with_real!(dtype, "analyze", |T| {
        let values: Vec<T> = values.iter().map(|x| T::of(*x)).collect();
        Ok(Tensor::from_slice(shape, &values))
    })
}
