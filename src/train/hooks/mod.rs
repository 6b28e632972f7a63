//! Hooks of a run with a folder; those that evaluate and analyse the model are in [`crate::study::hooks`].

mod checkpoints;
mod log;
mod plots;
pub(crate) mod progress;
mod timeline;

pub use checkpoints::Checkpoints;
pub use log::{MetricsLog, TensorBoard};
pub use plots::Plots;
pub use progress::Progress;
pub use timeline::KernelTimeline;
