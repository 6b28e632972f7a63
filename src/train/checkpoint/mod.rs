//! Checkpoints that survive a crash at any moment.
//!
//! `checkpoints/step-N/` holds `config.json` and `model.safetensors` (the model, in Hugging Face's names),
//! `trainer.safetensors` and `trainer.json` (optimizer, router state, position of the run) and `manifest.json` (size
//! and BLAKE3 digest of each file). Arrays of more than 5 GB in total are in several files with an index. A
//! checkpoint is written under a temporary name; each file is synced, the manifest last. Then the folder is renamed
//! and its parent is synced. A reader therefore finds either a complete checkpoint or none, and the digests detect
//! errors of the disk.

mod arrays; // what is written
mod background; // saving while training continues
mod read; // how it is read again
mod session; // a model and its training as arrays
mod shards; // which file has which array

pub use arrays::{Array, Content};
pub(crate) use arrays::{write as write_arrays, write_file as write_array_file};
pub use background::{Place, Saver};
pub use read::Arrays;
pub(crate) use session::router_state;
pub use session::{
    TrainerState, find, load_model, load_model_on, load_model_with, load_tokenizer, load_trainer,
    snapshot, snapshot_of_ranks,
};
pub use shards::SHARD_BYTES;
pub(crate) use shards::Shards;

use crate::error::{Error, Result};
pub(crate) use crate::report::files::{UNFINISHED, sync, write_json};
use crate::report::files::{fault, json};
use crate::report::in_plain_words;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
/// Prefixes of the names of the files that hold the model and the trainer.
const MODEL: &str = "model";
const TRAINER: &str = "trainer";
const STATE: &str = "trainer.json";
pub(crate) const MANIFEST: &str = "manifest.json";

/// The content of a checkpoint.
pub struct Snapshot<'a> {
    /// Number of optimizer steps done.
    pub step: u64,
    /// `config.json`: what the model is.
    pub config: Value,
    /// Weights and buffers of the model.
    pub model: Vec<Array<'a>>,
    /// Optimizer moments and the other arrays needed to resume training.
    pub trainer: Vec<Array<'a>>,
    /// `trainer.json`: the data needed to resume training that are not arrays.
    pub state: Value,
}

impl Snapshot<'_> {
    /// Returns the size of the arrays in bytes.
    pub fn bytes(&self) -> u64 {
        let arrays = self.model.iter().chain(&self.trainer);
        arrays.map(|a| a.size() as u64).sum()
    }

    /// Returns a copy that borrows nothing, so the model may change.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn owned(&self) -> Result<Snapshot<'static>> {
        let owned = |arrays: &[Array]| -> Result<_> { arrays.iter().map(Array::owned).collect() };
        Ok(Snapshot {
            step: self.step,
            config: self.config.clone(),
            model: owned(&self.model)?,
            trainer: owned(&self.trainer)?,
            state: self.state.clone(),
        })
    }
}

/// Size and digest of every file of a checkpoint.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    step: u64,
    files: BTreeMap<String, Entry>,
    /// Digest of the fields above; older checkpoints have none.
    #[serde(default)]
    blake3: Option<String>,
}

impl Manifest {
    fn new(step: u64, files: BTreeMap<String, Entry>) -> Self {
        let blake3 = Some(Self::digest(step, &files));
        Manifest {
            step,
            files,
            blake3,
        }
    }

    fn digest(step: u64, files: &BTreeMap<String, Entry>) -> String {
        let content = serde_json::json!([step, files]).to_string();
        blake3::hash(content.as_bytes()).to_hex().to_string()
    }

    /// Reads the file at `path`, and checks that it is byte-for-byte as it was written.
    fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let found: Manifest = serde_json::from_slice(&bytes)
            .map_err(|e| damaged(path, in_plain_words(&e.to_string())))?;
        let Some(digest) = &found.blake3 else {
            return Ok(found);
        };
        let same = *digest == Self::digest(found.step, &found.files);
        match same && json(path, &found)?.as_bytes() == bytes {
            true => Ok(found),
            false => Err(damaged(path, "another digest".into())),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    bytes: u64,
    blake3: String,
}

impl Entry {
    fn new(bytes: u64, hash: blake3::Hash) -> Self {
        let blake3 = hash.to_string();
        Entry { bytes, blake3 }
    }
}

/// Writes `snapshot` to `folder/step-N`, up to `shard_bytes` of arrays to a file (see [`SHARD_BYTES`]), and then
/// removes all but the `keep` newest checkpoints up to this step. A complete checkpoint of the same step is not
/// replaced, since a run is deterministic. Returns the path of the checkpoint.
///
/// # Errors
/// Returns an error when the files cannot be written, for example because the disk is full or the folder is
/// read-only. Earlier checkpoints do not change.
pub fn save(folder: &Path, snapshot: &Snapshot, keep: usize, shard_bytes: u64) -> Result<PathBuf> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    fault::point();
    remove_unfinished(folder)?;
    let name = format!("step-{}", snapshot.step);
    let target = folder.join(&name);
    if target.exists() {
        if Checkpoint::open(&target).and_then(|c| c.verify()).is_ok() {
            return Ok(target);
        }
        retire(&target)?;
    }
    let temporary = folder.join(format!("{UNFINISHED}{name}"));
    let written = write(&temporary, snapshot, shard_bytes);
    if written.is_err() {
        // This frees the disk space; the first error is reported.
        let _ = fs::remove_dir_all(&temporary);
    }
    written?;
    fs::rename(&temporary, &target).map_err(|e| Error::io("rename", &temporary, e))?;
    fault::point();
    sync(folder)?;
    for step in steps(folder)?
        .into_iter()
        .filter(|s| *s < snapshot.step)
        .rev()
        .skip(keep.max(1) - 1)
    {
        retire(&folder.join(format!("step-{step}")))?;
    }
    Ok(target)
}

/// Writes and syncs all files of a checkpoint, the manifest last.
fn write(temporary: &Path, snapshot: &Snapshot, shard_bytes: u64) -> Result<()> {
    fs::create_dir(temporary).map_err(|e| Error::io("create", temporary, e))?;
    fault::point();
    let put = |name: &str, content: &dyn Fn(&Path) -> Result<()>| -> Result<PathBuf> {
        let path = temporary.join(name);
        fault::disk().map_err(|e| Error::io("write", &path, e))?;
        content(&path)?;
        fault::point();
        sync(&path)?;
        Ok(path)
    };
    let mut files = BTreeMap::new();
    let mut add = |name: &str, content: &dyn Fn(&Path) -> Result<()>| -> Result<()> {
        let path = put(name, content)?;
        files.insert(name.to_string(), digest(&path)?);
        Ok(())
    };
    add(CONFIG, &|path| write_json(path, &snapshot.config))?;
    for (stem, arrays) in [(MODEL, &snapshot.model), (TRAINER, &snapshot.trainer)] {
        let shards = Shards::new(stem, arrays, shard_bytes);
        for (name, arrays) in &shards.files {
            add(name, &|path| arrays::write(path, arrays, &[]))?;
        }
        if let Some((name, index)) = &shards.index {
            add(name, &|path| write_json(path, index))?;
        }
    }
    add(STATE, &|path| write_json(path, &snapshot.state))?;
    let manifest = Manifest::new(snapshot.step, files);
    put(MANIFEST, &|path| write_json(path, &manifest))?;
    sync(temporary)
}

fn digest(path: &Path) -> Result<Entry> {
    let read = || {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        let mut hash = blake3::Hasher::new();
        hash.update_reader(file)?;
        Ok(Entry::new(bytes, hash.finalize()))
    };
    read().map_err(|e| Error::io("read", path, e))
}

/// Renames a checkpoint before it removes it, so that a crash leaves no incomplete checkpoint.
fn retire(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let away = path.with_file_name(format!("{UNFINISHED}removed-{name}"));
    fs::rename(path, &away).map_err(|e| Error::io("rename", path, e))?;
    fault::point();
    fs::remove_dir_all(&away).map_err(|e| Error::io("remove", &away, e))
}

/// Removes the files that earlier, interrupted saves left.
fn remove_unfinished(folder: &Path) -> Result<()> {
    for name in names(folder)?.iter().filter(|n| n.starts_with(UNFINISHED)) {
        let path = folder.join(name);
        fs::remove_dir_all(&path).map_err(|e| Error::io("remove", &path, e))?;
    }
    Ok(())
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let list = || -> std::io::Result<Vec<String>> {
        fs::read_dir(folder)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    };
    list().map_err(|e| Error::io("list", folder, e))
}

/// Returns the steps of the checkpoints in `folder`, complete or not, in increasing order.
fn steps(folder: &Path) -> Result<Vec<u64>> {
    let mut steps: Vec<u64> = names(folder)?
        .iter()
        .filter_map(|n| n.strip_prefix("step-")?.parse().ok())
        .collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Returns the newest complete checkpoint in `folder`, if any, and an error for each newer one.
pub fn newest(folder: &Path) -> Result<(Option<Checkpoint>, Vec<Error>)> {
    let mut damaged = Vec::new();
    if !folder.exists() {
        return Ok((None, damaged));
    }
    for step in steps(folder)?.into_iter().rev() {
        let opened = Checkpoint::open(&folder.join(format!("step-{step}")));
        match opened.and_then(|c| c.verify().map(|()| c)) {
            Ok(checkpoint) => return Ok((Some(checkpoint), damaged)),
            Err(e) => damaged.push(e),
        }
    }
    Ok((None, damaged))
}

/// A checkpoint on disk. Every file that is read is compared with its digest.
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Reads the manifest of the checkpoint at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(MANIFEST);
        if !file.exists() {
            return Err(Error::file(
                path,
                "a run, or one of its checkpoints, or a model folder",
                match (path.is_dir(), path.join("config.json").exists()) {
                    (true, true) => format!("a folder without {MANIFEST}"),
                    (true, false) => format!("a folder without {MANIFEST} and config.json"),
                    (false, _) => "no such folder".into(),
                },
                "choose the folder of a run that `train` wrote, a folder step-N in it, or the folder of a model's config.json",
            ));
        }
        Ok(Checkpoint {
            path: path.to_path_buf(),
            manifest: Manifest::read(&file)?,
        })
    }

    /// Compares every file with its digest.
    pub fn verify(&self) -> Result<()> {
        let arrays = [MODEL, TRAINER].map(|stem| match shards::index(stem) {
            index if self.has(&index) => index,
            _ => shards::single(stem),
        });
        let needed = [CONFIG, STATE].into_iter();
        let needed = needed.chain(arrays.iter().map(String::as_str));
        let listed = self.manifest.files.keys().map(String::as_str);
        for name in needed.chain(listed).collect::<BTreeSet<_>>() {
            self.verify_file(name)?;
        }
        Ok(())
    }

    /// Compares the file `name` with its digest.
    ///
    /// # Errors
    /// Returns an error when the file is missing, damaged, or not part of the checkpoint.
    pub fn verify_file(&self, name: &str) -> Result<()> {
        self.compare(name, digest(&self.path.join(name))?)
    }

    /// Returns whether the checkpoint was saved with a file of this name.
    fn has(&self, name: &str) -> bool {
        self.manifest.files.contains_key(name)
    }

    fn compare(&self, name: &str, found: Entry) -> Result<()> {
        let path = self.path.join(name);
        let Some(entry) = self.manifest.files.get(name) else {
            return Err(damaged(&path, format!("no digest of it in {MANIFEST}")));
        };
        if found.bytes != entry.bytes {
            let got = format!("{} bytes instead of {}", found.bytes, entry.bytes);
            return Err(damaged(&path, got));
        }
        if found.blake3 != entry.blake3 {
            return Err(damaged(&path, "another digest".into()));
        }
        Ok(())
    }

    /// Returns the path of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of optimizer steps done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Reads `config.json`.
    pub fn config(&self) -> Result<Value> {
        self.json(CONFIG)
    }

    /// Reads `trainer.json`.
    pub fn state(&self) -> Result<Value> {
        self.json(STATE)
    }

    /// Returns the arrays of the model.
    ///
    /// # Errors
    /// Returns an error when a file is missing or damaged.
    pub fn model(&self) -> Result<Arrays<'_>> {
        Arrays::open(self, MODEL)
    }

    /// Returns the arrays of the trainer.
    ///
    /// # Errors
    /// The same errors as [`model`](Self::model).
    pub fn trainer(&self) -> Result<Arrays<'_>> {
        Arrays::open(self, TRAINER)
    }

    fn json(&self, name: &str) -> Result<Value> {
        serde_json::from_slice(&self.bytes(name)?)
            .map_err(|e| damaged(&self.path.join(name), e.to_string()))
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path.join(name);
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let (size, hash) = (bytes.len() as u64, blake3::hash(&bytes));
        self.compare(name, Entry::new(size, hash))?;
        Ok(bytes)
    }
}

fn damaged(path: &Path, got: String) -> Error {
    Error::file(
        path,
        "the file that was saved",
        got,
        "the checkpoint is damaged: use another one",
    )
}

#[cfg(test)]
mod tests;
