//! Work with models other than training: evaluation, analyses, ablations, generation, plans, exchange.

pub mod ablate;
pub mod analyze;
pub mod eval;
pub mod exchange;
pub mod export;
pub mod generate;
pub mod hooks;
pub mod plan;
pub mod tasks;
