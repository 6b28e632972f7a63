//! What the program writes: errors, files, logs, records, tables, plots and pages.

pub mod error;
pub mod events;
pub mod files;
pub mod metrics;
mod nearest;
pub mod page;
pub mod plots;
pub mod records;
pub mod version;

pub use nearest::{nearest, similarity};
