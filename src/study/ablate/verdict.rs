//! Summarises the comparison with the baseline in one sentence per group.

use super::grid::Plan;
use super::summary::{Group, Spread, Summary};

/// 97.5% quantiles of Student's t for 1, 2, … degrees of freedom; the last is used for all larger numbers.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

impl Summary {
    /// Returns a sentence for each group with a baseline: which is better, by how much, and whether the difference is more
    /// than noise.
    pub fn verdicts(&self, plan: &Plan) -> Vec<String> {
        let compared = self.groups.iter().filter_map(|group| {
            let base = &self.groups[group.baseline];
            let gain = self
                .gain(plan, group)
                .filter(|_| base.label != group.label)?;
            let pairs = self.pairs(plan, group).count();
            Some(verdict(group, base, gain, pairs, plan.loss_unit()))
        });
        compared.collect()
    }
}

/// Returns the sentence of one group, compared in `pairs` pairs of runs.
fn verdict(group: &Group, base: &Group, gain: Spread, pairs: usize, unit: &str) -> String {
    let (ours, theirs, mean) = (&group.label, &base.label, gain.mean);
    let Some(deviation) = gain.deviation else {
        return format!(
            "{ours} against {theirs}: gain {mean:+.4} {unit} of one pair of runs; only more seeds can tell whether that is noise."
        );
    };
    let half = T[(pairs - 2).min(T.len() - 1)] * deviation / (pairs as f64).sqrt();
    let (low, high) = (mean - half, mean + half);
    let what = match (low > 0.0, high < 0.0) {
        (true, _) => format!("{ours} is better than {theirs}"),
        (_, true) => format!("{ours} is worse than {theirs}"),
        _ => format!("{ours} is within noise of {theirs}"),
    };
    format!(
        "{what}: gain {mean:+.4} {unit} (95% interval {low:+.4} to {high:+.4}, {pairs} pairs of runs)."
    )
}

#[cfg(test)]
mod tests {
    use super::super::summary::spread;
    use super::*;

    fn said(gains: &[f64]) -> String {
        let group = |label: &str| Group {
            label: label.into(),
            ..Group::default()
        };
        let (new, old, gain) = (group("new"), group("old"), spread(gains).unwrap());
        verdict(&new, &old, gain, gains.len(), "nats per byte")
    }

    #[test]
    fn an_interval_around_zero_is_noise_and_one_run_says_nothing() {
        // Mean 0.02, deviation 0.01, t of two degrees of freedom: 0.02 ± 4.303 · 0.01 / √3.
        assert_eq!(
            said(&[0.01, 0.02, 0.03]),
            "new is within noise of old: gain +0.0200 nats per byte (95% interval -0.0048 to +0.0448, 3 pairs of runs)."
        );
        // The same of six runs: 0.02 ± 2.571 · 0.00894 / √6.
        let better = said(&[0.01, 0.02, 0.03, 0.01, 0.02, 0.03]);
        let expected = "new is better than old: gain +0.0200 nats per byte (95% interval +0.0106";
        assert!(better.starts_with(expected), "{better}");
        assert!(said(&[-0.02, -0.02, -0.03]).starts_with("new is worse than old"));
        assert!(said(&[0.5]).contains("only more seeds"));
    }
}
