//! A model for Hugging Face's transformers: a folder that `from_pretrained` reads.
//!
//! `config.json`, `model.safetensors` (several files with an index where it is large) and the tokenizer. A model that an
//! architecture of transformers computes is written as that one; any other brings the program in
//! `src/study/export/hf/`, which computes it as at evaluation. Written under another name, synced and
//! renamed: a reader finds the folder whole or not at all.

mod architecture;
pub(crate) mod tokenizer;
mod weights;

pub use architecture::Architecture;

use crate::data::tokenizer::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
use crate::error::{Error, Result};
use crate::report::progress::Phases;
use crate::report::size;
use crate::routers::{self, Router};
use crate::study::eval;
use crate::study::exchange::Saved;
use crate::tensor::dtype::DType;
use crate::train::checkpoint::{Shards, TrainerState, UNFINISHED, sync, write_arrays, write_json};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// The program of models that transformers has no architecture for: what computes the model, and
/// its configuration.
const PROGRAM: [(&str, &str); 2] = [
    (
        "modeling_routegrad.py",
        include_str!("export/hf/modeling_routegrad.py"),
    ),
    (
        "configuration_routegrad.py",
        include_str!("export/hf/configuration_routegrad.py"),
    ),
];

/// How transformers generates, by default.
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// What an export has become.
#[derive(Clone, Debug)]
pub struct Report {
    /// What transformers loads it as.
    pub architecture: Architecture,
    /// What no architecture of transformers has; empty where one was found.
    pub foreign: Vec<String>,
    /// Tensors that were written.
    pub tensors: usize,
    /// What a reader of the export gets of the tokenizer.
    pub tokenizer: Exported,
}

/// Which tokenizer an export has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exported {
    /// That of the run.
    File,
    /// One whose token n is byte n.
    Bytes,
    /// None: bytes, but another vocabulary.
    None,
}

/// Writes a saved model to the folder `out`, which must be new or empty, its weights
/// rounded to `dtype`, f32 or bf16, up to `shard_bytes` of them to a file (see [`SHARD_BYTES`](crate::train::checkpoint::SHARD_BYTES)).
///
/// # Errors
/// When the model cannot be read, or the folder not be written; nothing is left of it then.
pub fn run(found: &Saved, out: &Path, dtype: DType, shard_bytes: u64) -> Result<Report> {
    let temporary = place(out)?;
    let phases = Phases::new(2);
    phases.begin(1, "reading the model");
    let (model, TrainerState { config, .. }) = eval::load(found, true, None)?;
    let router = routers::build(&config.router)?;
    let (name, equivalent) = (&config.router.name, router.equivalent_topk());
    let (architecture, foreign) = architecture::choose(&config.model, name, equivalent.as_ref());
    let arrays = weights::arrays(&model, &config, &*router, architecture, dtype);
    let shards = Shards::new("model", &arrays, shard_bytes);
    let mut texts: Vec<(&str, String)> = vec![];
    let mut values = vec![(
        "config.json",
        architecture::config_json(
            architecture,
            &config,
            equivalent.is_some_and(|topk| topk.renormalize),
            dtype,
        )?,
    )];
    if architecture == Architecture::Routegrad {
        texts.extend(program(name, &*router)?);
        values.push((GENERATION_CONFIG_FILE, json!({ "use_cache": false })));
    }
    let text = found.tokenizer(&config.data)?;
    add_ends(
        &mut values,
        [("bos_token_id", text.bos()), ("eos_token_id", text.eos())],
    );
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
        // Gives the space back; the first error is the one to report.
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

/// Writes all files to `temporary`, which then becomes `out`.
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
        // Readers of several frameworks ask whose tensors these are.
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

/// Tells transformers which tokens begin and end a text: without the end its generation never stops.
fn add_ends(values: &mut Vec<(&'static str, Value)>, ends: [(&str, Option<i32>); 2]) {
    if ends.iter().all(|(_, token)| token.is_none()) {
        return;
    }
    if values
        .iter()
        .all(|(name, _)| *name != GENERATION_CONFIG_FILE)
    {
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

/// The program of an export, which knows the router called `name`.
fn program(name: &str, router: &dyn Router) -> Result<[(&'static str, String); 2]> {
    let mut program = PROGRAM.map(|(file, text)| (file, text.to_string()));
    if let Some(code) = router.export_code() {
        let entry = format!("ROUTERS[\"{name}\"] = {}", name.replace('-', "_"));
        program[0].1 += &format!("\n\n{}\n\n\n{entry}\n", code.trim());
    } else if !PROGRAM[0].1.contains(&format!("    \"{name}\": ")) {
        return Err(Error::invalid(
            "export",
            "a router that the exported program knows",
            format!("router {name}"),
            "give it Router::equivalent_topk or Router::export_code",
        ));
    }
    Ok(program)
}

/// Where to write what will become `out`: beside it, and nothing is there.
fn place(out: &Path) -> Result<PathBuf> {
    let refuse = |got: &str| {
        let help = "choose another --out, or remove what is there";
        Err(Error::file(out, "a new or an empty folder", got, help))
    };
    let Some(name) = out.file_name() else {
        return refuse("no name of a folder");
    };
    if out.exists() {
        if !out.is_dir() {
            return refuse("a file");
        }
        let mut entries = fs::read_dir(out).map_err(|e| Error::io("list", out, e))?;
        if entries.next().is_some() {
            return refuse("a folder with something in it");
        }
    }
    let parent = parent(out);
    fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    let temporary = parent.join(format!("{UNFINISHED}{}", name.to_string_lossy()));
    if temporary.exists() {
        // Left by an export that was interrupted.
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
        let (_, modeling) = PROGRAM[0];
        for router in ROUTERS {
            let entry = format!("    \"{}\": ", router.name);
            assert!(modeling.contains(&entry), "{}", router.name);
        }
    }

    #[test]
    fn what_an_interrupted_export_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model");
        let left = folder.path().join(".unfinished-model");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("model.safetensors"), "half").unwrap();
        assert_eq!(place(&out).unwrap(), left);
        assert!(!left.exists());
    }
}
