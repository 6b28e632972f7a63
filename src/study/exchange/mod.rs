//! Exchanges models with other frameworks: a folder with `config.json` and safetensors files, of this program or of
//! transformers (`mixtral`, `olmoe`, `qwen2_moe`, `qwen3_moe`).

mod dump;
mod import;
mod keys;
mod saved;
mod source;
pub mod tensors;

pub use dump::{Options, dump};
pub use import::{Import, import};
pub use saved::Saved;
pub use source::Source;
