//! Arrays in one file, or in several beside an index, as Hugging Face's libraries write and read them: `model.safetensors`,
//! or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`, which says where each array is.

use super::Array;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Bytes of arrays that one file holds, unless a single array is larger.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// What an index file says.
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

/// The files for some arrays.
pub struct Shards<'a, 'b> {
    /// Name and arrays of each file.
    pub files: Vec<(String, Vec<&'a Array<'b>>)>,
    /// Name and content of the index, where there are several files.
    pub index: Option<(String, Index)>,
}

impl<'a, 'b> Shards<'a, 'b> {
    /// Arrays in their order, in files of up to `limit` bytes, whose names begin with `stem`.
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
        if n == 1 {
            let files = groups.into_iter().map(|g| (single(stem), g)).collect();
            return Shards { files, index: None };
        }
        let name = |i: usize| format!("{stem}-{:05}-of-{n:05}.safetensors", i + 1);
        let files: Vec<_> = groups
            .into_iter()
            .enumerate()
            .map(|(i, g)| (name(i), g))
            .collect();
        let places = files
            .iter()
            .flat_map(|(file, arrays)| arrays.iter().map(|a| (a.name.clone(), file.clone())));
        let content = Index {
            metadata: Total { total_size: total },
            weight_map: places.collect(),
        };
        let index = Some((index(stem), content));
        Shards { files, index }
    }
}

/// The name of the only file.
pub fn single(stem: &str) -> String {
    format!("{stem}.safetensors")
}

/// The name of the index of several.
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
