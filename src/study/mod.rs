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

/// Returns the mean of numbers, and the sum of their squared differences from it.
fn moments(values: impl ExactSizeIterator<Item = f64> + Clone) -> (f64, f64) {
    let mean = values.clone().sum::<f64>() / values.len() as f64;
    (mean, values.map(|x| (x - mean).powi(2)).sum())
}
