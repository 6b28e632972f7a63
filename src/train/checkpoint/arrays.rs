//! Named arrays on their way to safetensors files.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::Weight;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use crate::tensor::shape::Shape;
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::fs;
use std::ops::Range;
use std::path::Path;

/// A named array on its way to a file: f32, f64 or i32, row-major.
pub struct Array<'a> {
    /// Its key in the file.
    pub name: String,
    /// Its extents.
    pub shape: Shape,
    /// Type of its elements in the file.
    pub dtype: DType,
    /// Where its bytes come from.
    pub content: Content<'a>,
}

/// Where an array's bytes come from, when it is written: at any time those of one array alone are in the host's memory
/// beside what was there before.
pub enum Content<'a> {
    /// They are there already, little-endian.
    Bytes(Vec<u8>),
    /// Read from where the tensor lies.
    Tensor(&'a Tensor),
    /// Consecutive numbers of a parameter.
    Weight(&'a Weight, Range<usize>),
    /// Made when they are asked for.
    Made(Box<dyn Fn() -> Result<Vec<u8>> + Send + 'a>),
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

    /// The same, with its bytes in memory of its own.
    ///
    /// # Errors
    /// When the device failed.
    pub fn owned(&self) -> Result<Array<'static>> {
        Ok(Array {
            name: self.name.clone(),
            shape: self.shape,
            dtype: self.dtype,
            content: Content::Bytes(self.bytes()?.into_owned()),
        })
    }

    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }

    /// Its bytes: borrowed where the host has them as the file will.
    fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        match &self.content {
            Content::Bytes(bytes) => Ok(Cow::Borrowed(bytes)),
            Content::Tensor(tensor) if tensor.device() == Device::Cpu => {
                Ok(Cow::Borrowed(tensor.bytes()))
            }
            Content::Tensor(tensor) => tensor.copied_bytes(0..self.size()).map(Cow::Owned),
            Content::Weight(weight, numbers) => weight.bytes(numbers.clone()),
            Content::Made(make) => make().map(Cow::Owned),
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
        // As everywhere, a device that failed ends the process.
        self.bytes().unwrap_or_else(|e| panic!("{e}"))
    }
    fn data_len(&self) -> usize {
        self.size()
    }
}

/// Writes `arrays` and at most one pair of metadata to a new file, beside a `config.json`; the bytes
/// depend on nothing else.
pub(crate) fn write(path: &Path, arrays: &[&Array], metadata: &[(&str, &str)]) -> Result<()> {
    let named = arrays.iter().map(|a| (a.name.as_str(), *a));
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
