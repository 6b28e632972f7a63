//! Compares one mixture-of-experts layer, or one training step, on two devices. The CPU replays the expert choices of the
//! device with kernels, so that both compute the same function.
//!
//! The output, the default vectors, and the gradients of every input and parameter are compared, each as ‖device − cpu‖ /
//! ‖cpu‖. On the device with kernels, activations are rounded to bf16 between operations, which causes differences of a
//! few parts in a thousand; a missing or wrong term causes far larger ones.

mod model;

pub use model::{MODEL_TOLERANCE, ModelCheck, model_checks};

use crate::config::{Config, Layers};
use crate::device::Device;
use crate::error::Result;
use crate::model::Model;
use crate::model::batch::{Batch, Sequences};
use crate::ops::dispatch::Selection;
use crate::routers::{self, Disagreement, Pass, Phase};
use crate::tape::check::normal_numbers;
use crate::tape::{Gradients, Tape, Var, take_op_counts};
use crate::tensor::Tensor;
use crate::train::step::{StepExecutor, StepReport};
use crate::verify::fault::Fault;
use std::collections::BTreeMap;

/// The largest relative difference that passes the check.
pub const TOLERANCE: f64 = 0.01;

/// The intended distribution of tokens over the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Approximately even.
    Balanced,
    /// Expert i, counted from 1, gets tokens approximately in proportion to 1 / i.
    Zipf,
    /// The first choice of all tokens is the same expert.
    OneHot,
    /// Odd experts get no tokens, as long as at least K experts remain.
    OddEmpty,
    /// All logits are far below zero, so that a router that selects by sign chooses no expert.
    Nobody,
}

/// The result of a comparison of two devices.
pub struct Comparison {
    /// Pairs of a name and ‖device − cpu‖ / ‖cpu‖, or the absolute norm if the CPU's values are all exactly zero.
    pub differences: Vec<(String, f64)>,
    /// Tokens per expert.
    pub counts: Vec<usize>,
    /// Number of tokens for which the CPU would have chosen other experts.
    pub flips: usize,
    /// For a layer: the largest difference of the logits of those tokens, as a share of ‖x‖ ‖w_a − w_b‖.
    pub largest_margin: Option<f64>,
}

impl Comparison {
    /// Returns the name and the value of the largest difference.
    pub fn worst(&self) -> (&str, f64) {
        let mut worst = ("", 0.0);
        for (what, difference) in &self.differences {
            if !(*difference <= worst.1) {
                worst = (what, *difference);
            }
        }
        worst
    }
}

/// Compares the first MoE layer of a model, forward and backward in training mode, with random input of `tokens` tokens
/// and random incoming gradients. If `fault` is given, it is planted on the CPU only.
///
/// # Errors
/// When the configuration is not supported.
pub fn compare_layer(
    config: &Config,
    tokens: usize,
    load: Load,
    fault: Option<Fault>,
) -> Result<Comparison> {
    let (on_device, on_cpu) = (
        prepared(config, Device::Sim, load)?,
        prepared(config, Device::Cpu, load)?,
    );
    let (x, g) = random_rows(tokens, config.model.hidden);
    on_device.layer_states_mut()[0].record();
    let device = run(&on_device, &x, &g)?;
    let choices = on_device.layer_states_mut()[0].take_record();
    on_cpu.layer_states_mut()[0].replay(&choices);
    let cpu = {
        let _guard = fault.map(Fault::inject);
        run(&on_cpu, &x, &g)?
    };
    let flips = on_cpu.layer_states_mut()[0].take_disagreements();
    let largest_margin = Some(margins(&on_cpu, &x, &flips)?);
    Ok(Comparison {
        differences: differences(&device, &cpu)?,
        counts: choices[0].counts(),
        flips: flips.len(),
        largest_margin,
    })
}

/// Compares one optimizer step of a model, from weights rounded to bf16: the gradient of every parameter and the state of
/// every layer after the step. If `fault` is given, it is planted on the CPU only.
///
/// # Errors
/// When the configuration is not supported.
pub fn compare_step(
    config: &Config,
    sequences: Sequences,
    fault: Option<Fault>,
) -> Result<Comparison> {
    let step = |device: Device, choices: &[Vec<Selection>]| -> Result<(Model, Vec<Named>)> {
        let mut config = config.clone();
        config.train.device = device;
        let mut model = Model::new(&config)?;
        model
            .parameters
            .iter_mut()
            .for_each(|p| p.value.round_to_bf16());
        for (layer, state) in model.layer_states_mut().iter_mut().enumerate() {
            state.record();
            if let Some(choices) = choices.get(layer) {
                state.replay(choices);
            }
        }
        let mut trainer = StepExecutor::new(&config.train, &model);
        let _report: StepReport = trainer.step(&mut model, &[sequences], 0.0)?;
        let mut found = named_gradients(&model, trainer.gradients());
        for (layer, state) in model.layer_states().iter().enumerate() {
            for (name, tensor) in state.tensors() {
                found.push((format!("{name} of MoE layer {layer}"), tensor.clone()));
            }
        }
        Ok((model, found))
    };
    let (on_device, device) = step(Device::Sim, &[])?;
    let mut states = on_device.layer_states_mut();
    let choices: Vec<_> = states.iter_mut().map(|s| s.take_record()).collect();
    let (on_cpu, cpu) = {
        let _guard = fault.map(Fault::inject);
        step(Device::Cpu, &choices)?
    };
    let mut states = on_cpu.layer_states_mut();
    let flips = states.iter_mut().map(|s| s.take_disagreements().len());
    Ok(Comparison {
        differences: differences(&device, &cpu)?,
        counts: choices[0][0].counts(),
        flips: flips.sum(),
        largest_margin: None,
    })
}

/// A directional derivative on the device with kernels.
pub struct Directional {
    /// The input that was moved along its gradient.
    pub input: String,
    /// The predicted change: ⟨gradient, movement⟩.
    pub predicted: f64,
    /// The measured change of the inner product of the output and the incoming gradient.
    pub found: f64,
}

impl Directional {
    /// Compares the change of `value` between two ends of a movement with the one that the gradient predicts.
    fn of(
        input: String,
        [up, down]: [Vec<f32>; 2],
        gradient: &[f64],
        mut value: impl FnMut(&[f32]) -> Result<f64>,
    ) -> Result<Self> {
        let movement = (up.iter().zip(&down)).map(|(u, d)| f64::from(*u) - f64::from(*d));
        Ok(Self {
            input,
            predicted: movement.zip(gradient).map(|(m, g)| m * g).sum(),
            found: value(&up)? - value(&down)?,
        })
    }

    /// Returns the error of the prediction, relative to the measured change.
    pub fn relative_error(&self) -> f64 {
        (self.predicted - self.found).abs() / self.found.abs()
    }
}

/// The largest relative error of a directional derivative that passes the check.
pub const DIRECTIONAL_TOLERANCE: f64 = 0.02;

/// Runs [`directional`] for a layer with 8 experts, 2 of them active, and this router: along every input, or only along
/// the experts' weights if the router's gradient is not a derivative.
///
/// # Errors
/// When the router does not exist, or the layer cannot run.
pub fn router_directions(router: &str) -> Result<Vec<Directional>> {
    let mut layers = Layers::preset("tiny");
    layers.set = ["model.layers=1", "model.dense_layers=[]", "model.top_k=2"]
        .map(String::from)
        .to_vec();
    layers.set.push(format!("router.name={router}"));
    let config = Config::load(&layers, &routers::resolve)?;
    let mut found = directional(&config, 61, Load::Balanced)?;
    let known = routers::all().into_iter().find(|info| info.name == router);
    if known.is_some_and(|info| !info.check.exact) {
        found.retain(|d| d.input.contains(".experts."));
    }
    Ok(found)
}

/// Returns the operations of one training step on the simulator, with the number of times that each ran.
///
/// # Errors
/// When the model cannot run.
pub fn operations(config: &Config) -> Result<BTreeMap<&'static str, usize>> {
    let mut config = config.clone();
    config.train.device = Device::Sim;
    config.validate()?;
    let mut model = Model::new(&config)?;
    let mut trainer = StepExecutor::new(&config.train, &model);
    let vocabulary = config.model.vocab_size;
    let tokens: Vec<i32> = (0..config.model.sequence_length + 1)
        .map(|i| (i * i % vocabulary) as i32)
        .collect();
    take_op_counts();
    trainer.step(&mut model, &[Sequences::new(&tokens, 1)], 0.0)?;
    Ok(take_op_counts())
}

/// Computes directional derivatives of the first MoE layer on the simulator with fixed choices and default vectors. Each
/// input is moved in both directions along its gradient by a sixteenth of its norm, so that the change is far larger than
/// the rounding of bf16.
///
/// # Errors
/// When the configuration is not supported.
pub fn directional(config: &Config, tokens: usize, load: Load) -> Result<Vec<Directional>> {
    const STEP: f64 = 1.0 / 16.0;
    let mut model = prepared(config, Device::Sim, load)?;
    let count = model.parameters.len();
    let (x, g) = random_rows(tokens, config.model.hidden);
    let x = bf16_rows(&x, tokens, Device::Sim);
    let g = bf16_rows(&g, tokens, Device::Sim);

    // A training pass chooses the experts and updates the default vectors; after that they are fixed.
    let pass = |model: &Model, x: &Tensor, phase, store: Option<&mut Gradients>| -> Result<f64> {
        let tape = Tape::new();
        let (weights, x) = (model.weights(), Var::leaf(x.clone(), count));
        let (y, _) = model.moe_layer(0, &tape, &weights, &x, Pass::single(phase))?;
        let value = y
            .tensor()
            .to_f64()?
            .iter()
            .zip(g.to_f64()?)
            .map(|(y, g)| y * g)
            .sum();
        if let Some(store) = store {
            tape.backward_from(&[(&y, g.clone())], store)?;
        }
        Ok(value)
    };
    pass(&model, &x, Phase::Train, None)?;
    let mut store = Gradients::new(count + 1);
    pass(&model, &x, Phase::Frozen, Some(&mut store))?;

    let mut found = Vec::new();
    for input in 0..=count {
        let Some(gradient) = store.get(input) else {
            continue;
        };
        let gradient = gradient.to_f64()?;
        let (name, exact, start) = match model.parameters.get(input) {
            Some(p) => (p.name.clone(), is_router(&p.name), p.value.to_f64()?),
            None => ("x".into(), false, x.to_f64()?),
        };
        let step = STEP * norm(&start) / norm(&gradient);
        let ends = ends_of_movement(&start, &gradient, step, exact);
        let value = |values: &[f32]| {
            if input < count {
                let of = |model: &Model| pass(model, &x, Phase::Frozen, None);
                return with_value(&mut model, input, values, of);
            }
            let x = Tensor::from_slice(x.shape(), values).narrowed();
            pass(&model, &x.on(Device::Sim), Phase::Frozen, None)
        };
        found.push(Directional::of(name, ends, &gradient, value)?);
    }
    Ok(found)
}

/// Moves numbers in both directions by `step` times their gradient. Unless `exact`, the results are rounded to bf16.
fn ends_of_movement(start: &[f64], gradient: &[f64], step: f64, exact: bool) -> [Vec<f32>; 2] {
    [step, -step].map(|step| {
        let moved = (start.iter().zip(gradient)).map(|(s, g)| (s + step * g) as f32);
        let moved: Vec<f32> = moved.collect();
        if exact { moved } else { rounded(&moved) }
    })
}

/// Returns a value of a model in which a parameter has other values.
fn with_value(
    model: &mut Model,
    parameter: usize,
    values: &[f32],
    of: impl Fn(&Model) -> Result<f64>,
) -> Result<f64> {
    let old = model.parameters[parameter].value.clone();
    let moved = Tensor::from_slice(old.shape(), values);
    model.parameters[parameter].value.set(&moved);
    let value = of(model);
    model.parameters[parameter].value = old;
    value
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Returns `sequences` random sequences for a model, divided into documents if the data has boundaries.
pub(crate) fn random_batch(config: &Config, sequences: usize) -> Batch {
    let (length, vocabulary) = (config.model.sequence_length, config.model.vocab_size);
    let numbers = normal_numbers(sequences * (length + 1), 78).into_iter();
    let tokens = numbers.map(|x| ((x.abs() * 1e6) as usize % vocabulary) as i32);
    let tokens: Vec<i32> = tokens.collect();
    // About every fourth position begins a document.
    let first_keys = |sequence: &[i32]| -> Vec<i32> {
        let mut begin = 0;
        let inputs = sequence[..length].iter().zip(0..);
        let rows = inputs.map(|(token, row)| {
            if token % 4 == 0 {
                begin = row;
            }
            begin
        });
        rows.collect()
    };
    let first_key = config.data.document_boundaries.then(|| {
        let sequences = tokens.chunks(length + 1);
        sequences.flat_map(first_keys).collect()
    });
    Batch {
        tokens,
        sequences,
        first_key,
    }
}

/// Returns random input and incoming gradients `[tokens, width]` of a layer. The first element of every input row is 1, so
/// the router's weight for it acts as a bias of the logits.
fn random_rows(tokens: usize, width: usize) -> (Vec<f64>, Vec<f64>) {
    let mut x = normal_numbers(tokens * width, 901);
    x.iter_mut().step_by(width).for_each(|x| *x = 1.0);
    (x, normal_numbers(tokens * width, 902))
}

/// Returns whether a parameter is a router's weight, which operations read in f32 on every device.
fn is_router(name: &str) -> bool {
    name.ends_with(".gate.weight")
}

/// Rounds f32 numbers to bf16.
fn rounded(values: &[f32]) -> Vec<f32> {
    let narrow = Tensor::from_slice([values.len()], values).narrowed();
    narrow.widened().slice::<f32>().to_vec()
}

/// Returns rows `[tokens, …]` of bf16 values: as bf16 on a device with kernels, otherwise as f32.
fn bf16_rows(values: &[f64], tokens: usize, device: Device) -> Tensor {
    let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
    let rows = Tensor::from_slice([tokens, values.len() / tokens], &values).narrowed();
    match device {
        Device::Cpu => rows.widened(),
        device => rows.on(device),
    }
}

type Named = (String, Tensor);

fn named_gradients(model: &Model, gradients: &Gradients) -> Vec<Named> {
    let named = model.parameters.iter().enumerate();
    let found = named
        .filter_map(|(i, p)| Some((format!("gradient of {}", p.name), gradients.get(i)?.clone())));
    found.collect()
}

/// Returns a model whose weights are bf16 values on both devices; the bias of its router follows `load`.
fn prepared(config: &Config, device: Device, load: Load) -> Result<Model> {
    let mut config = config.clone();
    config.train.device = device;
    let mut model = Model::new(&config)?;
    let (experts, width) = (config.model.num_experts, config.model.hidden);
    for (i, p) in model.parameters.iter_mut().enumerate() {
        let shape = p.value.shape();
        if shape.len() >= 2 {
            let spread = 1.0 / (shape.width() as f64).sqrt();
            let numbers = normal_numbers(shape.elements(), 500 + i as u64);
            let numbers: Vec<f32> = numbers.iter().map(|x| (spread * x) as f32).collect();
            p.value.set(&Tensor::from_slice(shape, &numbers));
        }
        if is_router(&p.name) {
            p.value.change(|value| {
                let rows = value.slice_mut::<f32>().chunks_mut(width).enumerate();
                for (expert, row) in rows.filter(|(e, _)| *e < experts) {
                    row[0] = match load {
                        Load::Balanced => row[0],
                        Load::Zipf => -1.5 * ((expert + 1) as f32).ln(),
                        Load::OneHot if expert == experts / 2 => 12.0,
                        Load::OddEmpty if expert % 2 == 1 => -12.0,
                        Load::OneHot | Load::OddEmpty => 0.0,
                        Load::Nobody => -12.0,
                    };
                }
            });
        }
        p.value.round_to_bf16();
    }
    Ok(model)
}

/// Returns the output, the default vectors and the gradients of the layer.
fn run(model: &Model, x: &[f64], g: &[f64]) -> Result<Vec<Named>> {
    let width = model.config().hidden;
    let (device, tokens) = (model.device(), x.len() / width);
    let rows = |values: &[f64]| bf16_rows(values, tokens, device);
    let count = model.parameters.len();
    let (tape, mut store) = (Tape::new(), Gradients::new(count + 1));
    let weights = model.weights();
    let x = Var::leaf(rows(x), count);
    let (y, losses) = model.moe_layer(0, &tape, &weights, &x, Pass::single(Phase::Train))?;
    let output = y.tensor().clone();
    // With these weights, the gradients of the balance losses are of similar size to the others.
    let scalar = |weight: f32| Tensor::from_slice([], &[weight * tokens as f32]).on(device);
    let mut outputs = vec![(&y, rows(g))];
    outputs.extend(
        losses
            .iter()
            .zip([0.7f32, 0.2])
            .map(|(loss, w)| (loss, scalar(w))),
    );
    tape.backward_from(&outputs, &mut store)?;
    let mut states = model.layer_states_mut();
    states[0].commit();
    let mut found = vec![("output".to_string(), output)];
    found.extend(states[0].tensors().map(|(n, t)| (n.to_string(), t.clone())));
    found.extend(named_gradients(model, &store));
    if let Some(gradient) = store.get(count) {
        found.push(("gradient of x".into(), gradient.clone()));
    }
    Ok(found)
}

fn differences(device: &[Named], cpu: &[Named]) -> Result<Vec<(String, f64)>> {
    let pairs = device.iter().map(|(name, a)| {
        let Some((_, b)) = cpu.iter().find(|(other, _)| other == name) else {
            return Ok((name.clone(), f64::INFINITY));
        };
        let (a, b) = (a.to_f64()?, b.to_f64()?);
        let apart: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
        let size = match norm(&b) {
            0.0 => 1.0,
            size => size,
        };
        Ok((name.clone(), norm(&apart) / size))
    });
    pairs.collect()
}

/// Returns the largest |z_a − z_b| / (‖x‖ ‖w_a − w_b‖) over pairs of an expert that only the device chose and one that
/// only the CPU would have chosen.
fn margins(model: &Model, x: &[f64], flips: &[Disagreement]) -> Result<f64> {
    let width = model.config().hidden;
    let Some(router) = model.parameters.iter().find(|p| is_router(&p.name)) else {
        return Ok(0.0);
    };
    let w = router.value.to_f64()?;
    let row = |e: i32| &w[e as usize * width..(e as usize + 1) * width];
    let mut largest: f64 = 0.0;
    for flip in flips {
        let x = &x[flip.token * width..(flip.token + 1) * width];
        for &a in flip.replayed.iter().filter(|e| !flip.own.contains(e)) {
            for &b in flip.own.iter().filter(|e| !flip.replayed.contains(e)) {
                let difference: Vec<f64> = row(a).iter().zip(row(b)).map(|(a, b)| a - b).collect();
                let z: f64 = difference.iter().zip(x).map(|(w, x)| w * x).sum();
                largest = largest.max(z.abs() / (norm(x) * norm(&difference)));
            }
        }
    }
    Ok(largest)
}
