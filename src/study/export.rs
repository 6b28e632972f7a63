//! Exports a model for Hugging Face's transformers: a folder that `from_pretrained` reads.
//!
//! The folder holds `config.json`, `model.safetensors` (several files with an index if the model is large) and the
//! tokenizer. If an architecture of transformers computes the same function, the model is exported as that architecture.
//! Otherwise the export includes the Python code in `src/study/export/hf/`, which computes the model as in evaluation. The
//! folder is written under a temporary name, synced and renamed, so that a reader never finds an incomplete folder.

mod architecture;
pub(crate) mod tokenizer;
mod weights;

pub use architecture::Architecture;

use crate::data::tokenizer::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::report::progress::Phases;
use crate::report::size;
use crate::routers::{self, Router};
use crate::study::exchange::Saved;
use crate::tensor::dtype::DType;
use crate::train::checkpoint::{Shards, TrainerState, UNFINISHED, sync, write_arrays, write_json};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Python code for models that no architecture of transformers computes: the model and its configuration.
const PROGRAM: [(&str, &str); 2] = [
    ("modeling_routegrad.py", MODELING),
    ("configuration_routegrad.py", CONFIGURATION),
];
const MODELING: &str = include_str!("export/hf/modeling_routegrad.py");
const CONFIGURATION: &str = include_str!("export/hf/configuration_routegrad.py");

/// File with the default generation settings of transformers.
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// The result of an export.
#[derive(Clone, Debug)]
pub struct Report {
    /// The architecture that transformers uses for it.
    pub architecture: Architecture,
    /// Properties of the model that no architecture of transformers has; empty if there is a matching one.
    pub foreign: Vec<String>,
    /// Number of tensors that were written.
    pub tensors: usize,
    /// The tokenizer of the export.
    pub tokenizer: Exported,
}

/// The tokenizer of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exported {
    /// The run's tokenizer.
    File,
    /// A tokenizer whose token n is byte n.
    Bytes,
    /// No tokenizer: each byte is a token, but the vocabulary does not have 256 tokens.
    None,
}

/// Writes a saved model to the folder `out`, which must be new or empty. Weights are rounded to `dtype`, which is f32 or
/// bf16; each file holds up to `shard_bytes` bytes of them (see [`SHARD_BYTES`](crate::train::checkpoint::SHARD_BYTES)).
///
/// # Errors
/// When the model cannot be read, or the folder cannot be written; the incomplete folder is then removed.
pub fn run(found: &Saved, out: &Path, dtype: DType, shard_bytes: u64) -> Result<Report> {
    let temporary = place(out)?;
    let phases = Phases::new(2);
    phases.begin(1, "reading the model");
    let (model, TrainerState { config, .. }) = found.load(|c| c.train.device = Device::Cpu)?;
    let router = routers::build(&config.router)?;
    let (name, equivalent) = (&config.router.name, router.equivalent_topk());
    let (architecture, foreign) = architecture::choose(&config.model, name, equivalent.as_ref());
    let arrays = weights::arrays(&model, &config, &*router, architecture, dtype);
    let shards = Shards::new("model", &arrays, shard_bytes);
    let mut texts: Vec<(&str, String)> = vec![];
    let renormalize = equivalent.is_some_and(|topk| topk.renormalize);
    let json = architecture::config_json(architecture, &config, renormalize, dtype)?;
    let mut values = vec![("config.json", json)];
    if architecture == Architecture::Routegrad {
        texts.extend(program(name, &*router)?);
        values.push((GENERATION_CONFIG_FILE, json!({ "use_cache": false })));
    }
    let text = found.tokenizer(&config.data)?;
    let ends = [("bos_token_id", text.bos()), ("eos_token_id", text.eos())];
    add_ends(&mut values, ends);
    let own = text.files();
    let bytes = own.is_empty() && config.model.vocab_size == tokenizer::VOCABULARY;
    if bytes {
        let longest = config.model.sequence_length;
        values.push((TOKENIZER_FILE, tokenizer::tokenizer()));
        values.push((TOKENIZER_CONFIG_FILE, tokenizer::config(longest)));
    }
    let tokenizer = match own.is_empty() {
        false => Exported::File,
        true if bytes => Exported::Bytes,
        true => Exported::None,
    };

    let bytes: usize = arrays.iter().map(|a| a.size()).sum();
    phases.begin(2, &format!("writing {}", size(bytes as u64)));
    let texts = texts.iter().map(|(name, text)| (*name, text.as_bytes()));
    let own = own.iter().map(|(name, text)| (*name, text.as_slice()));
    let texts: Vec<_> = texts.chain(own).collect();
    let written = write(&temporary, out, &values, &texts, &shards);
    if written.is_err() {
        // Frees the space; only the first error is reported.
        let _ = fs::remove_dir_all(&temporary);
    }
    written?;
    sync(parent(out))?;
    Ok(Report {
        architecture,
        foreign,
        tensors: arrays.len(),
        tokenizer,
    })
}

/// Writes all files to `temporary`, then renames it to `out`.
fn write(
    temporary: &Path,
    out: &Path,
    values: &[(&str, Value)],
    texts: &[(&str, &[u8])],
    shards: &Shards,
) -> Result<()> {
    fs::create_dir(temporary).map_err(|e| Error::io("create", temporary, e))?;
    let mut paths = Vec::new();
    for (name, value) in values {
        paths.push(temporary.join(name));
        write_json(&temporary.join(name), value)?;
    }
    for (name, text) in texts {
        let path = temporary.join(name);
        fs::write(&path, text).map_err(|e| Error::io("write", &path, e))?;
        paths.push(path);
    }
    for (name, arrays) in &shards.files {
        let path = temporary.join(name);
        // Readers of several frameworks check this metadata for the framework that wrote the tensors.
        write_arrays(&path, arrays, &[("format", "pt")])?;
        paths.push(path);
    }
    if let Some((name, index)) = &shards.index {
        paths.push(temporary.join(name));
        write_json(&temporary.join(name), index)?;
    }
    paths.iter().try_for_each(|path| sync(path))?;
    sync(temporary)?;
    fs::rename(temporary, out).map_err(|e| Error::io("rename", temporary, e))
}

/// Sets the tokens that begin and end a text in the configuration; without the end token, generation in transformers does
/// not stop.
fn add_ends(values: &mut Vec<(&'static str, Value)>, ends: [(&str, Option<i32>); 2]) {
    if ends.iter().all(|(_, token)| token.is_none()) {
        return;
    }
    let mut names = values.iter().map(|(name, _)| *name);
    if names.all(|name| name != GENERATION_CONFIG_FILE) {
        values.push((GENERATION_CONFIG_FILE, json!({})));
    }
    for (_, value) in values.iter_mut() {
        for (key, token) in ends {
            if let Some(token) = token {
                value[key] = token.into();
            }
        }
    }
}

/// Returns the Python code of an export, which includes the router called `name`.
fn program(name: &str, router: &dyn Router) -> Result<[(&'static str, String); 2]> {
    let mut program = PROGRAM.map(|(file, text)| (file, text.to_string()));
    if let Some(code) = router.export_code() {
        let entry = format!("ROUTERS[\"{name}\"] = {}", name.replace('-', "_"));
        program[0].1 += &format!("\n\n{}\n\n\n{entry}\n", code.trim());
    } else if !MODELING.contains(&format!("    \"{name}\": ")) {
        return Err(Error::invalid(
            "export",
            "a router that the exported program knows",
            format!("router {name}"),
            "implement Router::equivalent_topk or Router::export_code for it",
        ));
    }
    Ok(program)
}

/// Returns the temporary path beside `out`, at which nothing exists.
fn place(out: &Path) -> Result<PathBuf> {
    let refuse = |got: &str| {
        let help = "choose another --out, or remove the content of the folder";
        Err(Error::file(out, "a new or an empty folder", got, help))
    };
    let Some(name) = out.file_name() else {
        return refuse("a path without a folder name");
    };
    if out.exists() {
        if !out.is_dir() {
            return refuse("a file");
        }
        let mut entries = fs::read_dir(out).map_err(|e| Error::io("list", out, e))?;
        if entries.next().is_some() {
            return refuse("a folder that is not empty");
        }
    }
    let parent = parent(out);
    fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    let temporary = parent.join(format!("{UNFINISHED}{}", name.to_string_lossy()));
    if temporary.exists() {
        // An interrupted export may have left this folder.
        fs::remove_dir_all(&temporary).map_err(|e| Error::io("remove", &temporary, e))?;
    }
    Ok(temporary)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routers::ROUTERS;

    #[test]
    fn the_program_knows_every_router() {
        for router in ROUTERS {
            let entry = format!("    \"{}\": ", router.name);
            assert!(MODELING.contains(&entry), "{}", router.name);
        }
    }

    #[test]
    fn the_folder_of_an_interrupted_export_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model");
        let left = folder.path().join(".unfinished-model");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("model.safetensors"), "half").unwrap();
        assert_eq!(place(&out).unwrap(), left);
        assert!(!left.exists());
    }
}
