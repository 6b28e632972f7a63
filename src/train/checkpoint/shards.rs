//! Division of arrays into one file, or several files with an index, in the layout of Hugging Face's libraries:
//! `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`, which
//! names the file of each array.

use super::Array;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Upper bound of the bytes of arrays in one file, unless a single array is larger.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// The content of an index file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Index {
    pub metadata: Total,
    /// The file of each array.
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Total {
    /// Bytes of all arrays.
    pub total_size: u64,
}

/// The division of arrays into files.
pub struct Shards<'a, 'b> {
    /// Name and arrays of each file.
    pub files: Vec<(String, Vec<&'a Array<'b>>)>,
    /// Name and content of the index, if there are several files.
    pub index: Option<(String, Index)>,
}

impl<'a, 'b> Shards<'a, 'b> {
    /// Divides arrays, in their order, into files of up to `limit` bytes whose names begin with `stem`.
    pub fn new(stem: &str, arrays: &'a [Array<'b>], limit: u64) -> Self {
        let mut groups: Vec<Vec<&Array>> = vec![Vec::new()];
        let (mut total, mut size) = (0, 0);
        for array in arrays {
            let bytes = array.size() as u64;
            let last = groups.len() - 1;
            if size + bytes > limit && !groups[last].is_empty() {
                groups.push(vec![array]);
                size = 0;
            } else {
                groups[last].push(array);
            }
            size += bytes;
            total += bytes;
        }
        let n = groups.len();
        let name = |i: usize| match n {
            1 => single(stem),
            _ => format!("{stem}-{i:05}-of-{n:05}.safetensors"),
        };
        let files: Vec<_> = (1..).map(name).zip(groups).collect();
        let places = files
            .iter()
            .flat_map(|(file, arrays)| arrays.iter().map(|a| (a.name.clone(), file.clone())));
        let content = Index {
            metadata: Total { total_size: total },
            weight_map: places.collect(),
        };
        let index = (n > 1).then(|| (index(stem), content));
        Shards { files, index }
    }
}

/// Returns the file name if there is only one file.
pub fn single(stem: &str) -> String {
    format!("{stem}.safetensors")
}

/// Returns the name of the index of several files.
pub fn index(stem: &str) -> String {
    format!("{stem}.safetensors.index.json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn arrays(lengths: &[usize]) -> Vec<Array<'static>> {
        let array = |(i, n): (usize, &usize)| {
            Array::copied(format!("a{i}"), &Tensor::from_slice([*n], &vec![0f32; *n]))
        };
        lengths.iter().enumerate().map(array).collect()
    }

    #[test]
    fn a_file_is_full_when_the_next_array_would_pass_the_limit() {
        let arrays = arrays(&[1, 2, 3, 9, 0, 1]);
        let shards = Shards::new("model", &arrays, 24);
        let files: Vec<(&str, Vec<&str>)> = shards
            .files
            .iter()
            .map(|(name, a)| (name.as_str(), a.iter().map(|a| a.name.as_str()).collect()))
            .collect();
        assert_eq!(
            files,
            [
                ("model-00001-of-00003.safetensors", vec!["a0", "a1", "a2"]),
                ("model-00002-of-00003.safetensors", vec!["a3"]),
                ("model-00003-of-00003.safetensors", vec!["a4", "a5"]),
            ][..]
        );
        let (name, index) = shards.index.unwrap();
        assert_eq!(name, "model.safetensors.index.json");
        assert_eq!(index.metadata.total_size, 64);
        assert_eq!(index.weight_map["a3"], "model-00002-of-00003.safetensors");
        assert_eq!(index.weight_map.len(), 6);
    }

    #[test]
    fn what_fits_in_one_file_has_no_index() {
        for arrays in [arrays(&[]), arrays(&[3, 3])] {
            let shards = Shards::new("trainer", &arrays, 24);
            assert_eq!(shards.files.len(), 1);
            assert_eq!(shards.files[0].0, "trainer.safetensors");
            assert!(shards.index.is_none());
        }
    }
}
