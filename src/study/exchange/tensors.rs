//! Reads and writes tensors in safetensors files.

use crate::error::{Error, Result};
use crate::tensor::dtype::Real;
use crate::train::checkpoint::{Array, write_array_file};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// The tensors of a model's folder.
pub struct Tensors {
    folder: PathBuf,
    files: Vec<Vec<u8>>,
    found: BTreeMap<String, Found>,
}

struct Found {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

impl Tensors {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// When a file is missing or damaged, or a file lacks a tensor that the index lists.
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        let listed = match index.is_file() {
            true => shards(&index)?,
            false => BTreeMap::new(),
        };
        let mut names: BTreeSet<&str> = listed.values().map(String::as_str).collect();
        if names.is_empty() {
            names.insert(SINGLE);
        }
        let mut tensors = Tensors::none(folder);
        for name in names {
            tensors.add(&folder.join(name))?;
        }
        match listed.keys().find(|name| !tensors.has(name)) {
            None => Ok(tensors),
            Some(name) => Err(Error::file(
                &index,
                format!("tensor `{name}` in {}", listed[name]),
                "no tensor with that name",
                "copy the model again",
            )),
        }
    }

    /// Opens one file.
    ///
    /// # Errors
    /// When it cannot be read, or is not a safetensors file.
    pub fn file(path: &Path) -> Result<Self> {
        let mut tensors = Tensors::none(path);
        tensors.add(path)?;
        Ok(tensors)
    }

    fn none(place: &Path) -> Self {
        Tensors {
            folder: place.into(),
            files: Vec::new(),
            found: BTreeMap::new(),
        }
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let views = SafeTensors::deserialize(&bytes).map_err(|e| {
            let expected = "a complete safetensors file";
            Error::file(path, expected, e.to_string(), "copy the file again")
        })?;
        for (name, view) in views.iter() {
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            let found = Found {
                file: self.files.len(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                range: start..start + view.data().len(),
            };
            self.found.insert(name.into(), found);
        }
        self.files.push(bytes);
        Ok(())
    }

    /// Returns whether there is a tensor with this name.
    pub fn has(&self, name: &str) -> bool {
        self.found.contains_key(name)
    }

    /// Returns whether both tensors exist and have equal elements.
    pub fn same(&self, a: &str, b: &str) -> bool {
        let Some((a, b)) = self.found.get(a).zip(self.found.get(b)) else {
            return false;
        };
        (a.dtype, &a.shape) == (b.dtype, &b.shape) && self.bytes(a) == self.bytes(b)
    }

    fn bytes(&self, found: &Found) -> &[u8] {
        &self.files[found.file][found.range.clone()]
    }

    /// Returns the number of elements of all tensors.
    pub fn elements(&self) -> u64 {
        let elements = |f: &Found| f.shape.iter().product::<usize>() as u64;
        self.found.values().map(elements).sum()
    }

    /// Returns the names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.found.keys().map(String::as_str)
    }

    /// Copies the elements of tensor `name`, converted to `T`, to `to`. The tensor must have this shape.
    ///
    /// # Errors
    /// When there is no such tensor, or it has another shape or an unsupported dtype.
    pub fn read<T: Real>(&self, name: &str, shape: &[usize], to: &mut [T]) -> Result<()> {
        let found = self.expect(name, shape)?;
        let bytes = self.bytes(found);
        fn each<T: Real, const N: usize>(to: &mut [T], bytes: &[u8], of: fn([u8; N]) -> f64) {
            for (to, number) in to.iter_mut().zip(numbers(bytes)) {
                *to = T::of(of(number));
            }
        }
        match found.dtype {
            Dtype::F64 => each(to, bytes, f64::from_le_bytes),
            Dtype::F32 => each(to, bytes, |b| f32::from_le_bytes(b).into()),
            Dtype::BF16 => each(to, bytes, |b| bf16::from_le_bytes(b).to_f64()),
            Dtype::F16 => each(to, bytes, |b| f16::from_le_bytes(b).to_f64()),
            other => {
                let expected = format!("tensor `{name}` of f64, f32, bf16 or f16");
                return Err(self.wrong(expected, format!("{other:?}")));
            }
        }
        Ok(())
    }

    /// Returns the elements and the shape of an int64 tensor.
    ///
    /// # Errors
    /// When there is no such tensor, or it has another dtype.
    pub fn integers(&self, name: &str) -> Result<(Vec<i64>, Vec<usize>)> {
        let expected = || format!("tensor `{name}` of int64");
        let Some(found) = self.found.get(name) else {
            return Err(self.wrong(expected(), "no tensor with that name".into()));
        };
        if found.dtype != Dtype::I64 {
            return Err(self.wrong(expected(), format!("{:?}", found.dtype)));
        }
        let numbers = numbers(self.bytes(found)).map(i64::from_le_bytes);
        Ok((numbers.collect(), found.shape.clone()))
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Result<&Found> {
        let expected = || format!("tensor `{name}` {shape:?}");
        match self.found.get(name) {
            Some(found) if found.shape == shape => Ok(found),
            Some(found) => Err(self.wrong(expected(), format!("{:?}", found.shape))),
            None => Err(self.wrong(expected(), "no tensor with that name".into())),
        }
    }

    fn wrong(&self, expected: String, got: String) -> Error {
        Error::file(
            &self.folder,
            expected,
            got,
            "the files do not belong to config.json, or docs/exchange.md does not list this kind of model",
        )
    }
}

/// Splits bytes into elements of N bytes.
fn numbers<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|chunk| {
        let mut number = [0; N];
        number.copy_from_slice(chunk);
        number
    })
}

/// Returns the file of each tensor.
fn shards(index: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(index).map_err(|e| Error::io("read", index, e))?;
    let bad = |got: String| {
        Error::file(
            index,
            "an index with a weight_map",
            got,
            "copy the model again",
        )
    };
    let value: Value = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| bad("none".into()))?;
    map.iter()
        .map(|(name, file)| {
            let file = file.as_str().filter(|f| !f.contains(['/', '\\']));
            let file = file.ok_or_else(|| bad(format!("no file name for {name}")))?;
            Ok((name.clone(), file.to_owned()))
        })
        .collect()
}

/// Writes arrays to a safetensors file. The file is replaced atomically: after an error it is unchanged.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, arrays: &[Array]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".unfinished");
    let temporary = PathBuf::from(temporary);
    write_array_file(&temporary, &arrays.iter().collect::<Vec<_>>(), &[])?;
    fs::rename(&temporary, path).map_err(|e| Error::io("rename", &temporary, e))
}
