//! Reading of the arrays of a checkpoint, by name, from one file or several.
//!
//! Only one file at a time is in memory. If arrays are taken in the order in which they were written, each file is
//! read once.

use super::arrays::{KINDS, in_file};
use super::shards::{Index, index, single};
use super::{Checkpoint, damaged};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;
use safetensors::tensor::{Metadata, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The arrays of the model or of the trainer. Each array is taken once; [`finish`](Arrays::finish) reports arrays
/// that were not taken.
pub struct Arrays<'a> {
    checkpoint: &'a Checkpoint,
    /// The file that errors name if an array is missing: the only file, or the index.
    path: PathBuf,
    /// The file of each array that has not been taken yet.
    left: BTreeMap<String, String>,
    /// The file in memory.
    open: Option<Shard>,
}

struct Shard {
    name: String,
    bytes: Vec<u8>,
    header: Metadata,
    /// The byte at which the arrays begin.
    start: usize,
}

impl<'a> Arrays<'a> {
    /// Opens the arrays in files whose names begin with `stem`.
    pub(super) fn open(checkpoint: &'a Checkpoint, stem: &str) -> Result<Self> {
        let (only, index) = (single(stem), index(stem));
        if !checkpoint.has(&index) {
            let shard = Shard::read(checkpoint, &only)?;
            let left = shard.header.offset_keys().into_iter();
            return Ok(Arrays {
                checkpoint,
                path: checkpoint.path().join(&only),
                left: left.map(|name| (name, only.clone())).collect(),
                open: Some(shard),
            });
        }
        let path = checkpoint.path().join(&index);
        let read: Index = serde_json::from_slice(&checkpoint.bytes(&index)?)
            .map_err(|e| damaged(&path, e.to_string()))?;
        Ok(Arrays {
            checkpoint,
            path,
            left: read.weight_map,
            open: None,
        })
    }

    /// Takes the array `name`, which must have this element type and shape.
    ///
    /// # Errors
    /// Returns an error when there is no such array, it has another element type or shape, or its file is missing or
    /// damaged.
    pub fn take(&mut self, name: &str, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let expected = format!("tensor `{name}` of {dtype} {shape}");
        let Some(file) = self.left.remove(name) else {
            return Err(foreign(&self.path, expected, "none of that name".into()));
        };
        let shard = match self.open.take().filter(|shard| shard.name == file) {
            Some(shard) => shard,
            None => Shard::read(self.checkpoint, &file)?,
        };
        let tensor = shard.tensor(name, dtype, shape);
        let path = || self.checkpoint.path().join(&file);
        let tensor = tensor.map_err(|got| foreign(&path(), expected, got));
        self.open = Some(shard);
        tensor
    }

    /// Checks that all arrays were taken.
    ///
    /// # Errors
    /// Returns an error when an array was not taken.
    pub fn finish(self) -> Result<()> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(name) => {
                let expected = "only the tensors of this model".into();
                Err(foreign(&self.path, expected, format!("tensor `{name}`")))
            }
        }
    }
}

impl Shard {
    /// Reads a file, and checks that it is byte-for-byte as it was written.
    fn read(checkpoint: &Checkpoint, name: &str) -> Result<Self> {
        let bytes = checkpoint.bytes(name)?;
        let (length, header) = SafeTensors::read_metadata(&bytes).map_err(|e| {
            Error::file(
                checkpoint.path().join(name),
                "a safetensors file",
                e.to_string(),
                "use another checkpoint",
            )
        })?;
        Ok(Shard {
            name: name.into(),
            bytes,
            header,
            // After eight bytes with the length of the header, and the header.
            start: 8 + length,
        })
    }

    /// Returns the array if it has this element type and shape, or a text that describes what was found instead.
    fn tensor(&self, name: &str, dtype: DType, shape: Shape) -> Result<Tensor, String> {
        let Some(stored) = self.header.info(name) else {
            return Err("none of that name".into());
        };
        let found = KINDS
            .into_iter()
            .find(|kind| in_file(*kind) == stored.dtype);
        if found != Some(dtype) || stored.shape != *shape {
            let found = found.map_or(format!("{:?}", stored.dtype), |d| d.to_string());
            return Err(format!("{found} {:?}", stored.shape));
        }
        let mut tensor = Tensor::unspecified(Device::Cpu, dtype, shape);
        let (from, to) = stored.data_offsets;
        let bytes = &self.bytes[self.start + from..self.start + to];
        tensor.bytes_mut().copy_from_slice(bytes);
        Ok(tensor)
    }
}

fn foreign(path: &Path, expected: String, got: String) -> Error {
    Error::file(
        path,
        expected,
        got,
        "the checkpoint belongs to another model or program: use a matching one",
    )
}
