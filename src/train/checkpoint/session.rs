//! Conversion of a model and the state of its training to the arrays of a checkpoint, and back.
//!
//! Weights have Hugging Face's names (the parts of a [`Parameter`](crate::model::Parameter)), a router's state has
//! its layer's prefix, as in `model.layers.1.mlp.default_vectors`, and the names of the optimizer's moments contain
//! the name of their parameter.

use super::arrays::Content;
use super::{Array, Arrays, Checkpoint, Snapshot, newest};
use crate::config::{Config, DataConfig, ModelFile};
use crate::data::Tokenizer;
use crate::data::tokenizer::{BYTES, TOKENIZER_FILE};
use crate::dist::{Collective, SingleRank};
use crate::error::{Error, Result};
use crate::model::{Model, Parameter};
use crate::report::in_plain_words;
use crate::routers;
use crate::tensor::Tensor;
use crate::train::folder::{CHECKPOINTS, CONFIG_FILE};
use crate::train::optimizer::Moments;
use crate::train::step::StepExecutor;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// `trainer.json`: the position of the run, and its configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainerState {
    /// Number of steps done, including skipped steps. The position in the data is this number times the global batch.
    pub step: u64,
    /// Number of updates made by the optimizer.
    pub optimizer_steps: u64,
    /// Number of consecutive skipped steps, up to this step.
    pub skipped_in_a_row: u64,
    /// Digest of the text.
    pub data: String,
    /// The resolved configuration that the run had.
    pub config: Config,
}

impl TrainerState {
    /// Returns the state of a run that has not begun, with text of the digest `data`.
    pub fn at_start(config: Config, data: String) -> Self {
        TrainerState {
            step: 0,
            optimizer_steps: 0,
            skipped_in_a_row: 0,
            data,
            config,
        }
    }
}

/// Returns the snapshot of a run on one rank.
pub fn snapshot<'a>(
    model: &'a Model,
    executor: &'a StepExecutor,
    state: &TrainerState,
) -> Result<Snapshot<'a>> {
    let moments = model.parameters.iter().zip(executor.optimizer.moments());
    let moments = moments.flat_map(|(parameter, m)| {
        let [first, second] = moment_names(&parameter.name);
        [(first, &m.first), (second, &m.second)].map(|(n, t)| Array::borrowed(n, t))
    });
    let weights = model.parameters.iter().flat_map(weights_of);
    snapshot_with(model, weights.collect(), moments.collect(), state)
}

/// Returns the snapshot of a run on rank 0, and `None` on the other ranks, which send their shares of the moments to
/// rank 0. Every rank must call it.
///
/// # Errors
/// Returns an error when a rank has left.
pub fn snapshot_of_ranks<'a>(
    model: &'a Model,
    executor: &'a StepExecutor,
    state: &TrainerState,
) -> Result<Option<Snapshot<'a>>> {
    let (dist, shards) = (model.dist(), executor.optimizer.shards());
    if shards.is_whole() {
        let own = dist.rank() == 0;
        return own.then(|| snapshot(model, executor, state)).transpose();
    }
    let (mut moments, mut collected) = (Vec::new(), Vec::new());
    for (i, parameter) in model.parameters.iter().enumerate() {
        let lower = parameter.value.lower_share();
        let lower = lower.map(|own| shards.collect(dist, i, own)).transpose()?;
        match lower {
            None => collected.extend(weights_of(parameter)),
            Some(None) => {}
            Some(Some(lower)) => {
                for mut array in weights_of(parameter) {
                    if let Content::Weight(weight, numbers) = &array.content {
                        array.content = Content::Bytes(weight.bytes_with(&lower, numbers.clone())?);
                    }
                    collected.push(array);
                }
            }
        }
    }
    let own = model.parameters.iter().zip(executor.optimizer.moments());
    for (i, (parameter, m)) in own.enumerate() {
        let names = moment_names(&parameter.name).into_iter();
        for (name, own) in names.zip([&m.first, &m.second]) {
            if let Some(whole) = shards.collect(dist, i, own)? {
                let whole = whole.reshape(parameter.value.shape())?;
                moments.push(Array::copied(name, &whole));
            }
        }
    }
    match dist.rank() {
        0 => snapshot_with(model, collected, moments, state).map(Some),
        _ => Ok(None),
    }
}

/// Returns the parts of a parameter.
fn weights_of(parameter: &Parameter) -> Vec<Array<'_>> {
    let mut from = 0;
    let parts = parameter.parts.iter().map(|part| {
        let to = from + part.shape.elements();
        let numbers = from..to;
        from = to;
        Array {
            name: part.name.clone(),
            shape: part.shape,
            dtype: parameter.value.dtype(),
            content: Content::Weight(&parameter.value, numbers),
        }
    });
    parts.collect()
}

fn snapshot_with<'a>(
    model: &'a Model,
    mut weights: Vec<Array<'a>>,
    moments: Vec<Array<'a>>,
    state: &TrainerState,
) -> Result<Snapshot<'a>> {
    let config = &state.config;
    let layers = config.model.moe_layers();
    for (layer, state) in layers.iter().zip(model.layer_states().iter()) {
        for (name, tensor) in state.tensors() {
            weights.push(Array::copied(router_state(*layer, name), tensor));
        }
    }
    let file = ModelFile {
        model: config.model.clone(),
        router: config.router.clone(),
    };
    Ok(Snapshot {
        step: state.step,
        config: file.to_json()?,
        model: weights,
        trainer: moments,
        state: serde_json::to_value(state).map_err(|e| {
            let (expected, help) = ("values that JSON can hold", "check the configuration");
            Error::invalid("trainer.json", expected, e.to_string(), help)
        })?,
    })
}

/// Returns the name of a router's state tensor in a checkpoint.
pub(crate) fn router_state(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.mlp.{name}")
}

fn moment_names(parameter: &str) -> [String; 2] {
    ["first", "second"].map(|moment| format!("{parameter}.{moment}_moment"))
}

/// Returns the checkpoint at `path`, or the newest complete checkpoint of the run at `path`, and an error for each
/// newer, damaged checkpoint.
///
/// # Errors
/// Returns an error when there is no complete checkpoint.
pub fn find(path: &Path) -> Result<(Checkpoint, Vec<Error>)> {
    let folder = path.join(CHECKPOINTS);
    if !folder.is_dir() && !path.join(CONFIG_FILE).is_file() {
        return Ok((Checkpoint::open(path)?, Vec::new()));
    }
    match newest(&folder)? {
        (Some(checkpoint), damaged) => Ok((checkpoint, damaged)),
        (None, mut damaged) => Err(damaged.pop().unwrap_or_else(|| {
            let help = format!(
                "wait for the first one, every train.checkpoint_interval steps, or resume without --no-checkpoint: \
                 routegrad train --resume --out {}",
                path.display()
            );
            let (expected, got) = ("a run with a checkpoint", "a run without a checkpoint");
            Error::file(path, expected, got, help)
        })),
    }
}

/// Loads the tokenizer of a checkpoint's run with the data configuration `config`. Its `tokenizer.json` is next to
/// the checkpoint's files, in the run's folder, or next to the source of the tokens.
///
/// # Errors
/// Returns an error when it is in none of these places, or is not the run's tokenizer.
pub fn load_tokenizer(checkpoint: &Checkpoint, config: &DataConfig) -> Result<Tokenizer> {
    if config.tokenizer == BYTES {
        return Ok(Tokenizer::bytes());
    }
    let run = checkpoint.path().ancestors().nth(2);
    let own = [Some(checkpoint.path()), run].into_iter().flatten();
    let mut folders = own.chain(config.sources().map(Path::new));
    let other = |folder: &Path, got: String| {
        let expected = format!("the tokenizer of fingerprint {}", config.tokenizer);
        let help = "put the tokenizer.json that the run was trained with there";
        Error::file(folder.join(TOKENIZER_FILE), expected, got, help)
    };
    let holds = |folder: &&Path| folder.join(TOKENIZER_FILE).exists();
    let Some(folder) = folders.find(holds) else {
        let got = "no tokenizer.json there, or next to the checkpoint or the tokens".into();
        return Err(other(run.unwrap_or(checkpoint.path()), got));
    };
    let found = Tokenizer::of_folder(folder)?;
    match found.fingerprint() {
        same if same == config.tokenizer => Ok(found),
        another => Err(other(folder, format!("one of fingerprint {another}"))),
    }
}

/// Loads the model of a checkpoint, and the state of its run.
///
/// # Errors
/// Returns an error when a file is damaged, the tensors are of another model, or a weight is not finite.
pub fn load_model(checkpoint: &Checkpoint) -> Result<(Model, TrainerState)> {
    load_model_with(checkpoint, |_| ())
}

/// Loads the model of a checkpoint with changes to its configuration that the checkpoint permits: the device, or the
/// router's settings for evaluation.
///
/// # Errors
/// The same errors as [`load_model`].
pub fn load_model_with(
    checkpoint: &Checkpoint,
    change: impl FnOnce(&mut Config),
) -> Result<(Model, TrainerState)> {
    load_model_on(checkpoint, change, Arc::new(SingleRank))
}

/// Loads the model of a checkpoint as one of several ranks.
///
/// # Errors
/// The same errors as [`load_model`].
pub fn load_model_on(
    checkpoint: &Checkpoint,
    change: impl FnOnce(&mut Config),
    dist: Arc<dyn Collective>,
) -> Result<(Model, TrainerState)> {
    let path = checkpoint.path();
    let foreign = |got: String| {
        let help = "use one that `train` wrote";
        Error::file(path, "a checkpoint of this program", got, help)
    };
    let mut state: TrainerState = serde_json::from_value(checkpoint.state()?)
        .map_err(|e| foreign(in_plain_words(&e.to_string())))?;
    state.config.validate()?;
    let file = ModelFile::from_json(&checkpoint.config()?)?;
    if file.model != state.config.model || file.router != state.config.router {
        return Err(foreign("config.json and trainer.json of two models".into()));
    }
    find_sources(&mut state.config.data, path);
    change(&mut state.config);
    let router = routers::build(&state.config.router)?;
    let mut model = Model::with_router(&state.config, router, dist)?;
    restore_model(&mut model, &state.config, checkpoint.model()?)?;
    Ok((model, state))
}

/// Replaces relative data sources that do not exist in the current folder by the paths at which they are found
/// relative to a folder above `checkpoint`: the run may have been started in one of those folders.
fn find_sources(data: &mut DataConfig, checkpoint: &Path) {
    let Ok(checkpoint) = std::path::absolute(checkpoint) else {
        return;
    };
    let mixed = data.mix.iter_mut().map(|w| &mut w.source);
    for source in mixed.chain([&mut data.source]) {
        if source == "embedded" || Path::new(source).exists() {
            continue;
        }
        let mut places = checkpoint.ancestors().map(|folder| folder.join(&*source));
        if let Some(found) = places.find(|path| path.exists()) {
            *source = found.display().to_string();
        }
    }
}

fn restore_model(model: &mut Model, config: &Config, mut arrays: Arrays<'_>) -> Result<()> {
    let dtype = model.dtype();
    for parameter in &mut model.parameters {
        let mut from = 0;
        for part in &parameter.parts {
            let tensor = arrays.take(&part.name, dtype, part.shape)?;
            finite(&part.name, &tensor)?;
            let bytes = tensor.bytes();
            let to = from + bytes.len();
            parameter
                .value
                .change(|value| value.bytes_mut()[from..to].copy_from_slice(bytes));
            from = to;
        }
    }
    let layers = config.model.moe_layers();
    for (layer, state) in layers.iter().zip(model.layer_states_mut().iter_mut()) {
        let names: Vec<_> = state
            .tensors()
            .map(|(name, t)| (name, t.dtype(), t.shape()))
            .collect();
        for (name, dtype, shape) in names {
            let full = router_state(*layer, name);
            let tensor = arrays.take(&full, dtype, shape)?;
            finite(&full, &tensor)?;
            state.restore(name, tensor)?;
        }
    }
    arrays.finish()
}

fn finite(name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.to_f64()?.iter().all(|x| x.is_finite()) {
        return Ok(());
    }
    Err(Error::NonFinite {
        what: format!("tensor `{name}` of the checkpoint"),
        help: "use an earlier checkpoint".into(),
    })
}

/// Restores the optimizer of a checkpoint in `executor`.
///
/// # Errors
/// The same errors as [`load_model`].
pub fn load_trainer(
    checkpoint: &Checkpoint,
    state: &TrainerState,
    model: &Model,
    executor: &mut StepExecutor,
) -> Result<()> {
    let mut arrays = checkpoint.trainer()?;
    let shards = executor.optimizer.shards();
    let own = executor.optimizer.moments().iter();
    let moments = model.parameters.iter().zip(own).enumerate();
    let moments = moments.map(|(i, (p, own))| {
        let [first, second] = moment_names(&p.name);
        let (dtype, shape) = (own.first.dtype(), p.value.shape());
        let mut take = |name: &str| shards.cut(i, arrays.take(name, dtype, shape)?);
        Ok(Moments {
            first: take(&first)?,
            second: take(&second)?,
        })
    });
    let moments = moments.collect::<Result<_>>()?;
    arrays.finish()?;
    executor.optimizer.restore(state.optimizer_steps, moments)
}
