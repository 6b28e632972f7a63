//! Reads a model from its folder and maps the folder's names of tensors to parameters.

use super::keys;
use super::tensors::Tensors;
use crate::config::{Config, Layers, ModelFile, count};
use crate::device::Device;
use crate::dist::{Collective, SingleRank};
use crate::error::{Error, Result};
use crate::model::{Model, Part};
use crate::routers;
use crate::tensor::Tensor;
use crate::train::checkpoint::{self, Checkpoint};
use crate::with_real;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names of the output head and the embedding, which share one tensor if they are tied.
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// An open model's folder.
pub struct Source {
    folder: PathBuf,
    /// Shapes and router, from `config.json`.
    pub file: ModelFile,
    tensors: Tensors,
    /// Whether the files contain shared experts of width 0.
    own: bool,
}

/// A part of a parameter that has a name of its own in the folder.
pub struct Piece {
    pub name: String,
    pub shape: Vec<usize>,
    /// Index of the parameter.
    pub parameter: usize,
    /// Position of the first element in the parameter.
    pub offset: usize,
}

impl Piece {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Source {
    /// Returns whether `path` is a model's folder and not a checkpoint.
    pub fn is(path: &Path) -> bool {
        path.join("config.json").is_file() && !path.join(checkpoint::MANIFEST).exists()
    }

    /// Opens a model's folder, or the newest checkpoint of a run.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the program cannot compute the model.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = if Self::is(path) {
            path.to_path_buf()
        } else if path.join(checkpoint::MANIFEST).is_file() {
            Checkpoint::open(path)?.verify()?;
            path.to_path_buf()
        } else {
            checkpoint::find(path)?.0.path().to_path_buf()
        };
        let config = folder.join("config.json");
        let text = fs::read_to_string(&config).map_err(|e| Error::io("read", &config, e))?;
        let value: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| Error::file(&config, "JSON", e.to_string(), "copy the model again"))?;
        let mut file = keys::read(&value)?;
        routers::resolve(&mut file.router)?;
        let tensors = Tensors::open(&folder)?;
        // As in transformers: if the files have a separate head, it is used, whatever config.json says.
        if tensors.has(HEAD) && !tensors.same(HEAD, EMBEDDING) {
            file.model.tied_embeddings = false;
        }
        Ok(Source {
            tensors,
            own: value["model_type"] == "routegrad",
            folder,
            file,
        })
    }

    /// Returns the folder of the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the configuration of this model with the training settings of a preset.
    ///
    /// # Errors
    /// When the router does not support the model.
    pub fn config(&self, layers: &Layers) -> Result<Config> {
        let mut config = Config::load(layers, &routers::resolve)?;
        config.model = self.file.model.clone();
        config.router = self.file.router.clone();
        Ok(config)
    }

    /// Returns the model, and the names of its parameters in the folder.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or belongs to no parameter.
    pub fn model(&self, config: &Config) -> Result<(Model, Vec<Piece>)> {
        self.model_on(config, Arc::new(SingleRank))
    }

    /// Builds the model as one rank of several.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub fn model_on(
        &self,
        config: &Config,
        dist: Arc<dyn Collective>,
    ) -> Result<(Model, Vec<Piece>)> {
        // A damaged config.json may contain any size, for which there may not be enough memory. If only a few tensors are
        // missing, a check below names them.
        let (expected, found) = (
            count::total_parameters(&config.model),
            self.tensors.elements(),
        );
        if expected / 2 > found {
            return Err(Error::file(
                &self.folder,
                format!("the {expected} parameters of config.json"),
                format!("tensors of {found} numbers"),
                "the files do not belong to config.json, or one is missing",
            ));
        }
        let router = routers::build(&config.router)?;
        let mut model = Model::with_router(config, router, dist)?;
        let mut pieces = Vec::new();
        for (index, parameter) in model.parameters.iter().enumerate() {
            let mut offset = 0;
            for part in &parameter.parts {
                pieces.extend(self.pieces(part, index, offset));
                offset += part.shape.elements();
            }
        }
        let mut left: BTreeSet<&str> = self.tensors.names().collect();
        for piece in &pieces {
            let value = &mut model.parameters[piece.parameter].value;
            let (name, range) = (&piece.name, piece.offset..piece.offset + piece.elements());
            with_real!(value.dtype(), "model", |T| {
                value.change(|value| {
                    let to = &mut value.slice_mut::<T>()[range];
                    self.tensors.read(name, &piece.shape, to)
                })
            })?;
            left.remove(name.as_str());
        }
        let layers = config.model.moe_layers();
        // Only the state that both routers have is read. Other state starts as in a new model.
        let another = config.router.name != self.file.router.name;
        let own = routers::build(&self.file.router)?;
        for (layer, state) in layers.iter().zip(model.layer_states_mut().iter_mut()) {
            let given = own.initial_state(&config.model, *layer, 0);
            for name in given.iter().map(|state| state.name) {
                left.remove(checkpoint::router_state(*layer, name).as_str());
            }
            let names: Vec<_> = state.tensors().map(|(n, t)| (n, t.shape())).collect();
            let both = |name: &str| !another && given.iter().any(|state| state.name == name);
            for (name, shape) in names.into_iter().filter(|(name, _)| both(name)) {
                let full = checkpoint::router_state(*layer, name);
                // An export has only the state that evaluation reads.
                if !self.tensors.has(&full) && !own.evaluation_reads(name) {
                    continue;
                }
                let mut tensor = Tensor::unspecified(Device::Cpu, model.dtype(), shape);
                with_real!(tensor.dtype(), "model", |T| {
                    self.tensors.read(&full, &shape, tensor.slice_mut::<T>())
                })?;
                state.restore(name, tensor)?;
            }
        }
        match left.into_iter().find(|name| !self.is_idle(name)) {
            None => Ok((model, pieces)),
            Some(name) => Err(Error::file(
                &self.folder,
                "only the tensors of this model",
                format!("tensor `{name}`"),
                "the files do not belong to config.json, or docs/exchange.md does not list this kind of model",
            )),
        }
    }

    /// Returns whether a tensor has no effect: a shared expert of width 0, a RoPE table, or a tied head.
    fn is_idle(&self, name: &str) -> bool {
        let m = &self.file.model;
        let unshared = m.shared_expert_width == 0 && name.contains(".mlp.shared_expert");
        let tied = m.tied_embeddings && name == HEAD;
        !self.own && (unshared || tied || name.ends_with("rotary_emb.inv_freq"))
    }

    /// Returns the names and positions of a part's elements in the folder: under its own name, in mixtral's older block,
    /// or one tensor per expert.
    fn pieces(&self, part: &Part, parameter: usize, offset: usize) -> Vec<Piece> {
        let one = |name: String, shape: &[usize], offset| Piece {
            name,
            shape: shape.to_vec(),
            parameter,
            offset,
        };
        let block = part.name.replace(".mlp.", ".block_sparse_moe.");
        let fused = [&part.name, &block]
            .into_iter()
            .find(|n| self.tensors.has(n));
        let experts = part.name.split_once(".experts.");
        let (Some((_, kind)), None) = (experts, fused) else {
            let name = fused.unwrap_or(&part.name).clone();
            return vec![one(name, &part.shape, offset)];
        };
        // `[E, 2F, D]` or `[E, D, F]`.
        let (count, rows, columns) = (part.shape[0], part.shape[1], part.shape[2]);
        let (prefix, names): (&str, &[&str]) = match self.tensors.has(&format!(
            "{}.0.w1.weight",
            block.trim_end_matches(&format!(".{kind}"))
        )) {
            true if kind == "down_proj" => (&block, &["w2"]),
            true => (&block, &["w1", "w3"]),
            false if kind == "down_proj" => (&part.name, &["down_proj"]),
            false => (&part.name, &["gate_proj", "up_proj"]),
        };
        let prefix = prefix.trim_end_matches(kind);
        let shape = [rows / names.len(), columns];
        let each = |expert: usize| {
            names.iter().enumerate().map(move |(i, name)| {
                let place = (expert * names.len() + i) * shape[0] * shape[1];
                let name = format!("{prefix}{expert}.{name}.weight");
                one(name, &shape, offset + place)
            })
        };
        (0..count).flat_map(each).collect()
    }
}
