//! Checks that two runs compute the same bytes: all losses, weights, moments and router states.

use super::outcome::Outcome;
use super::steps::{strict_trainer, uncaptured};
use crate::config::Config;
use crate::error::Result;
use serde_json::json;

type Digest = (String, blake3::Hash);

/// Trains twice and compares. `planted`: the second run uses another seed.
///
/// # Errors
/// When a step fails.
pub fn check(config: &Config, steps: u64, planted: bool) -> Result<Outcome> {
    let (first, uncaptured) = run(config, steps)?;
    let mut config = config.clone();
    config.train.seed += u64::from(planted);
    let second = run(&config, steps)?.0;
    let differ: Vec<&str> = (first.iter().zip(&second))
        .filter(|(a, b)| a != b)
        .map(|((name, _), _)| name.as_str())
        .collect();
    let unequal = differ.first().map(|name| {
        let (count, all) = (differ.len(), first.len());
        format!("two runs of {steps} steps differ in {count} of {all} arrays, first in {name}")
    });
    let mut all = blake3::Hasher::new();
    first.iter().for_each(|(_, hash)| {
        all.update(hash.as_bytes());
    });
    let digest = all.finalize().to_hex()[..16].to_string();
    let right = format!(
        "{steps} steps twice, {} arrays, digest {digest}",
        first.len()
    );
    let measured =
        json!({"steps": steps, "arrays": first.len(), "digest": digest, "differ": differ});
    let wrong = [uncaptured, unequal].into_iter().flatten();
    Ok(Outcome::judged(wrong, right, measured))
}

/// Returns digests of the losses of each step and of everything that is trained, and the reason if no graph was replayed.
fn run(config: &Config, steps: u64) -> Result<(Vec<Digest>, Option<String>)> {
    let mut training = strict_trainer(config.clone())?;
    let mut found = Vec::new();
    for step in 1..=steps {
        let report = training.step()?;
        let numbers = [report.cross_entropy, report.gradient_norm].map(f64::to_le_bytes);
        let name = format!("loss and gradient norm of step {step}");
        found.push((name, blake3::hash(&numbers.concat())));
    }
    found.extend(training.digests()?);
    Ok((found, uncaptured(&training)))
}
