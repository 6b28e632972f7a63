//! Named arrays in safetensors files.

use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::Weight;
use crate::shape::Shape;
use crate::tensor::Tensor;
use safetensors::tensor::{Dtype, SafeTensors, View};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A named array on its way to a file: f32, f64 or i32, row-major.
pub struct Array<'a> {
    pub name: String,
    pub shape: Shape,
    pub dtype: DType,
    pub content: Content<'a>,
}

/// Where an array's bytes come from, when it is written: at any time those of one array alone are in the host's memory
/// beside what was there before.
pub enum Content<'a> {
    Bytes(Vec<u8>),
    Tensor(&'a Tensor),
    /// Consecutive numbers of a parameter.
    Weight(&'a Weight, Range<usize>),
}

impl<'a> Array<'a> {
    /// An array that borrows a tensor.
    pub fn borrowed(name: impl Into<String>, tensor: &'a Tensor) -> Self {
        Array {
            name: name.into(),
            shape: tensor.shape(),
            dtype: tensor.dtype(),
            content: Content::Tensor(tensor),
        }
    }

    /// An array that holds a copy of a tensor.
    pub fn copied(name: impl Into<String>, tensor: &Tensor) -> Self {
        Array {
            name: name.into(),
            shape: tensor.shape(),
            dtype: tensor.dtype(),
            content: Content::Bytes(tensor.bytes().to_vec()),
        }
    }
}

impl View for &Array<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F64 => Dtype::F64,
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
            DType::I16 => Dtype::I16,
            DType::I32 => Dtype::I32,
        }
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let copied = match &self.content {
            Content::Bytes(bytes) => return Cow::Borrowed(bytes),
            Content::Tensor(tensor) if tensor.device() == Device::Cpu => {
                return Cow::Borrowed(tensor.bytes());
            }
            Content::Tensor(tensor) => tensor.copied_bytes(0..self.data_len()),
            Content::Weight(weight, numbers) => weight.bytes(numbers.clone()),
        };
        // As everywhere, a device that failed ends the process.
        Cow::Owned(copied.unwrap_or_else(|e| panic!("{e}")))
    }
    fn data_len(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }
}

/// Writes `arrays` and at most one pair of metadata to a new file, beside a `config.json`; the bytes
/// depend on nothing else.
pub(crate) fn write(path: &Path, arrays: &[Array], metadata: &[(&str, &str)]) -> Result<()> {
    let named = arrays.iter().map(|a| (a.name.as_str(), a));
    let owned = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
    let metadata = (!metadata.is_empty()).then(|| metadata.iter().map(owned).collect());
    safetensors::serialize_to_file(named, metadata, path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(e) => Error::io("write", path, e),
        e => Error::file(
            path,
            "arrays that fit the format",
            e.to_string(),
            "report this as a bug",
        ),
    })?;
    // The library makes the file private to its owner; give it the mode that files get here.
    let folder = path.parent().unwrap_or(Path::new("."));
    let probe = folder.join(super::CONFIG);
    fs::metadata(&probe)
        .and_then(|m| fs::set_permissions(path, m.permissions()))
        .map_err(|e| Error::io("set the mode of", path, e))
}

/// The arrays of a file, to be taken out by name.
pub(super) fn parse(path: &Path, bytes: Vec<u8>) -> Result<Arrays> {
    let mut arrays = BTreeMap::new();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| {
        Error::file(
            path,
            "a safetensors file",
            e.to_string(),
            "use another checkpoint",
        )
    })?;
    // The data begin after eight bytes of header length and the header.
    let start = 8 + header;
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        let stored = Stored {
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: start + from..start + to,
        };
        arrays.insert(name, stored);
    }
    Ok(Arrays {
        path: path.to_path_buf(),
        bytes,
        arrays,
    })
}

struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// The arrays of one file. Each is taken once; [`finish`](Arrays::finish) names those left over.
pub struct Arrays {
    path: PathBuf,
    bytes: Vec<u8>,
    arrays: BTreeMap<String, Stored>,
}

impl Arrays {
    /// Takes out the array `name`, which must have this element type and shape.
    pub fn take(&mut self, name: &str, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let expected = format!("tensor `{name}` of {dtype} {shape}");
        let Some(stored) = self.arrays.remove(name) else {
            return Err(self.foreign(expected, "none of that name".into()));
        };
        let found = match stored.dtype {
            Dtype::F64 => Some(DType::F64),
            Dtype::F32 => Some(DType::F32),
            Dtype::BF16 => Some(DType::Bf16),
            Dtype::I16 => Some(DType::I16),
            Dtype::I32 => Some(DType::I32),
            _ => None,
        };
        if found != Some(dtype) || stored.shape != *shape {
            let found = found.map_or(format!("{:?}", stored.dtype), |d| d.to_string());
            return Err(self.foreign(expected, format!("{found} {:?}", stored.shape)));
        }
        let mut tensor = Tensor::unspecified(Device::Cpu, dtype, shape);
        tensor
            .bytes_mut()
            .copy_from_slice(&self.bytes[stored.range]);
        Ok(tensor)
    }

    /// Refuses arrays that nothing took.
    pub fn finish(self) -> Result<()> {
        match self.arrays.keys().next() {
            None => Ok(()),
            Some(name) => {
                let expected = "only the tensors of this model".into();
                Err(self.foreign(expected, format!("tensor `{name}`")))
            }
        }
    }

    fn foreign(&self, expected: String, got: String) -> Error {
        Error::file(
            &self.path,
            expected,
            got,
            "the checkpoint is of another model or program: use one that fits",
        )
    }
}
