//! Training: from a configuration to a trained model, and to a folder with its log, figures and checkpoints.
//!
//! [`Trainer`] is the only training loop; what happens beside the steps is a [`Hook`]. Every step is a pure function of the
//! configuration and the step before it, so that a run that was interrupted and resumed ends in the same bytes as one that
//! was not.

mod builder; // from a configuration or checkpoint to a trainer
pub mod checkpoint;
mod console; // lines on standard error
mod folder; // names of a run's files
pub mod hooks;
mod loader; // the sequences of a rank
mod memory;
pub mod optimizer;
mod outcome; // what a run comes to
mod ranks;
mod record; // a step's report as it is logged
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
