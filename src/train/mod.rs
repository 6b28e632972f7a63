//! Training: it turns a configuration into a trained model, and a folder with its log, figures and checkpoints.
//!
//! [`Trainer`] is the only training loop; everything that happens between steps is a [`Hook`]. The state after a step
//! is a pure function of the configuration and the state before it, so a run that was interrupted and resumed ends
//! with the same bytes as one that was not.

mod builder; // from a configuration or checkpoint to a trainer
pub mod checkpoint;
mod console; // lines on standard error
mod folder; // names of a run's files
pub mod hooks;
mod loader; // the sequences of a rank
mod memory;
pub mod optimizer;
mod outcome; // the result of a run
mod ranks;
mod record; // a step's record in the log
mod schedule;
pub mod step;
mod trainer; // the training loop, and the trait of hooks

pub use builder::Builder;
pub use folder::{CHECKPOINTS, CONFIG_FILE, METRICS_FILE, RunOptions};
pub(crate) use folder::{refuse_existing, write_config};
pub use memory::{available as available_memory, least as least_memory};
pub use outcome::{Outcome, Summary};
pub(crate) use ranks::{check_alike, check_data};
pub use schedule::learning_rate;
pub use step::StepReport;
pub use trainer::{Hook, LaunchedStep, Trainer};
