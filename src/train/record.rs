//! The log record of a step.

use super::step::StepReport;
use crate::config::Config;
use crate::report::metrics::Record;
use crate::routers::LayerStats;

/// Returns the record of step `step`, counted from 1, which took `seconds` seconds.
pub(super) fn record(
    config: &Config,
    step: u64,
    report: &StepReport,
    learning_rate: f64,
    seconds: f64,
) -> Record {
    let per_step = config.train.sequences_per_step * config.model.sequence_length;
    let finite = |x: f64| Some(x).filter(|x| x.is_finite());
    Record {
        step,
        tokens: step * per_step as u64,
        loss: finite(report.cross_entropy),
        auxiliary_loss: finite(report.auxiliary),
        z_loss: finite(report.z),
        gradient_norm: finite(report.gradient_norm),
        learning_rate,
        applied: report.skipped.is_none(),
        load: report
            .layers
            .iter()
            .map(|l| l.counts.iter().map(|c| *c as u64).collect())
            .collect(),
        router_entropy: report
            .layers
            .iter()
            .map(|l| finite(l.entropy / l.tokens))
            .collect(),
        sparsity: sparsity(&report.layers),
        router_state: (report.router_state.iter())
            .map(|(name, vectors)| (name.to_string(), vectors.clone()))
            .collect(),
        validation_loss: None,
        tasks: Default::default(),
        validation_by_source: Default::default(),
        seconds,
        tokens_per_second: per_step as f64 / seconds,
        saved: Vec::new(),
    }
}

/// Returns the mean over layers of the fraction of (token, expert) pairs that were not chosen.
fn sparsity(layers: &[LayerStats]) -> Option<f64> {
    let chosen = layers.iter().map(|l| {
        let pairs = l.tokens * l.counts.len() as f64;
        l.counts.iter().sum::<f64>() / pairs
    });
    let mean = 1.0 - chosen.sum::<f64>() / layers.len() as f64;
    Some(mean).filter(|s| s.is_finite())
}
