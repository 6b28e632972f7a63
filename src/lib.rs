//! Training sparse Mixture-of-Experts transformers with hand-written CUDA kernels and a small tape autograd.
//!
//! # Quick start
//!
//! ```
//! use routegrad::prelude::*;
//!
//! # fn main() -> Result<()> {
//! // A small model on the embedded text; each step trains on two sequences.
//! let config = routegrad::preset(
//!     "tiny",
//!     &[
//!         "router.name=topk",
//!         "model.layers=2",
//!         "model.hidden=32",
//!         "model.heads=2",
//!         "model.sequence_length=16",
//!         "train.sequences_per_step=2",
//!         "train.micro_batch=2",
//!     ],
//! )?;
//! let mut trainer = Trainer::new(config)?;
//! for _ in 0..3 {
//!     let report = trainer.step()?;
//!     println!("step {}: loss {:.3}", trainer.steps_done(), report.cross_entropy);
//! }
//!
//! // Evaluate the trained model on validation text.
//! let report = validation_loss(&trainer.model, trainer.corpus(), 2, 2)?;
//! assert!(report.loss.is_finite());
//! # Ok(())
//! # }
//! ```
//!
//! For a run with a folder, logs and checkpoints, use [`Trainer::builder`] with [`run_folder`](train::Builder::run_folder)
//! and the hooks of [`study::hooks`]. To run your own code between steps, implement [`Hook`](train::Hook). To add a router
//! from another crate, call [`routers::register`]; [`cli::main`] then runs the complete program with this router.
//! `examples/own_router.rs` shows both.
//!
//! # Modules
//!
//! The modules are listed in dependency order: each imports only from modules above it.

#![warn(missing_docs)]

#[macro_use]
pub mod report;

pub mod device;
pub mod dist;
pub mod tensor;

pub mod kernels;
pub mod tape;

pub mod config;
pub mod ops;
pub mod routers;

pub mod model;

pub mod data;
pub mod train;

pub mod study;
pub mod verify;

pub mod cli;

pub use config::Config;
pub use device::Device;
pub use error::{Error, Result};
pub use model::Model;
pub use report::error;
pub use tensor::Tensor;
pub use train::Trainer;

/// The items that most programs that train with this crate need.
pub mod prelude {
    pub use crate::report::metrics::Record;
    pub use crate::routers::{self, LayerPass, Router, RouterInfo, Routing};
    pub use crate::study::eval::validation_loss;
    pub use crate::study::hooks::{Analysis, Benchmarks, Evaluation};
    pub use crate::tape::{Tape, Var};
    pub use crate::train::{Hook, Outcome, RunOptions, StepReport, checkpoint};
    pub use crate::{Config, Device, Error, Model, Result, Tensor, Trainer};
}

/// Returns the configuration of the preset `name` with some keys changed; `set` holds entries such as
/// `"router.name=topk"`.
///
/// # Errors
/// When the preset, a key or the router does not exist, or a value is not valid.
pub fn preset(name: &str, set: &[&str]) -> Result<Config> {
    let mut layers = config::Layers::preset(name);
    layers.set = set.iter().map(|key| key.to_string()).collect();
    data::configure(&layers, &routers::resolve)
}
