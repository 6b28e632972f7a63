//! Named arrays to be written to safetensors files.

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

/// A named array to be written to a file: f32, f64 or i32, row-major.
pub struct Array<'a> {
    /// Key in the file.
    pub name: String,
    /// Extents of the array.
    pub shape: Shape,
    /// Type of its elements in the file.
    pub dtype: DType,
    /// Source of the bytes.
    pub content: Content<'a>,
}

/// The source of an array's bytes when it is written. At any time, the writer needs additional host memory for the
/// bytes of only one array.
pub enum Content<'a> {
    /// The bytes themselves, little-endian.
    Bytes(Vec<u8>),
    /// A tensor, read from its device.
    Tensor(&'a Tensor),
    /// Consecutive elements of a parameter.
    Weight(&'a Weight, Range<usize>),
    /// A function that computes the bytes when they are needed.
    Made(Box<dyn Fn() -> Result<Vec<u8>> + Send + 'a>),
}

impl<'a> Array<'a> {
    /// Creates an array that borrows a tensor.
    pub fn borrowed(name: impl Into<String>, tensor: &'a Tensor) -> Self {
        Array {
            name: name.into(),
            shape: tensor.shape(),
            dtype: tensor.dtype(),
            content: Content::Tensor(tensor),
        }
    }

    /// Creates an array that holds a copy of a tensor.
    pub fn copied(name: impl Into<String>, tensor: &Tensor) -> Self {
        Array {
            name: name.into(),
            shape: tensor.shape(),
            dtype: tensor.dtype(),
            content: Content::Bytes(tensor.bytes().to_vec()),
        }
    }

    /// Returns the same array with its own copy of the bytes.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn owned(&self) -> Result<Array<'static>> {
        Ok(Array {
            name: self.name.clone(),
            shape: self.shape,
            dtype: self.dtype,
            content: Content::Bytes(self.bytes()?.into_owned()),
        })
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }

    /// Returns the bytes, borrowed if host memory has them in the format of the file.
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

/// The types of arrays in files.
pub(super) const KINDS: [DType; 5] = {
    use DType::{Bf16, F32, F64, I16, I32};
    [F64, F32, Bf16, I16, I32]
};

/// Returns the name of a type in a file.
pub(super) fn in_file(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
    }
}

impl View for &Array<'_> {
    fn dtype(&self) -> Dtype {
        in_file(self.dtype)
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        // As elsewhere, a device failure ends the process.
        self.bytes().unwrap_or_else(|e| panic!("{e}"))
    }
    fn data_len(&self) -> usize {
        self.size()
    }
}

/// Writes `arrays` and at most one pair of metadata to a file. The bytes of the file depend only on these arguments.
pub(crate) fn write_file(path: &Path, arrays: &[&Array], metadata: &[(&str, &str)]) -> Result<()> {
    let named = arrays.iter().map(|a| (a.name.as_str(), *a));
    let owned = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
    let metadata = (!metadata.is_empty()).then(|| metadata.iter().map(owned).collect());
    safetensors::serialize_to_file(named, metadata, path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(e) => Error::io("write", path, e),
        e => Error::file(
            path,
            "arrays that fit the format",
            e.to_string(),
            "this is a bug: please report it",
        ),
    })
}

/// As [`write_file`], for a new file next to a `config.json`, whose mode it gets.
pub(crate) fn write(path: &Path, arrays: &[&Array], metadata: &[(&str, &str)]) -> Result<()> {
    write_file(path, arrays, metadata)?;
    // The library makes the file readable only by its owner; this sets the default mode of new files.
    let folder = path.parent().unwrap_or(Path::new("."));
    let probe = folder.join(super::CONFIG);
    fs::metadata(&probe)
        .and_then(|m| fs::set_permissions(path, m.permissions()))
        .map_err(|e| Error::io("set the mode of", path, e))
}
