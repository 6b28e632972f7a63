//! The learning rate of a step: linear warm-up, then half a cosine.

use crate::config::TrainConfig;

/// Rate of step `step`, from 0, of `config.steps`. The first w = ⌈`warmup_fraction` · N⌉ steps rise
/// in equal parts to `learning_rate`; the rest fall along a cosine and end, in the last step, at
/// `final_rate · learning_rate`.
pub fn learning_rate(config: &TrainConfig, step: u64) -> f64 {
    let warmup = (config.warmup_fraction * config.steps as f64).ceil() as u64;
    if step < warmup {
        return config.learning_rate * ((step + 1) as f64 / warmup as f64);
    }
    let remaining = config.steps.saturating_sub(warmup).max(1);
    let progress = ((step - warmup + 1) as f64 / remaining as f64).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    config.learning_rate * (config.final_rate + (1.0 - config.final_rate) * cosine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};

    fn rates(set: &[&str]) -> Vec<f64> {
        let mut layers = Layers::preset("tiny");
        layers.set = set.iter().map(|s| s.to_string()).collect();
        let train = Config::load(&layers, &|_| Ok(())).unwrap().train;
        (0..train.steps)
            .map(|step| learning_rate(&train, step))
            .collect()
    }

    #[test]
    fn the_rate_rises_to_its_height_and_falls_to_its_share() {
        let r = rates(&["train.steps=600"]);
        assert!((r[0] - 3e-3 / 6.0).abs() < 1e-15);
        assert_eq!(r[5], 3e-3);
        assert!(r[5..].windows(2).all(|w| w[1] < w[0]));
        assert!((r[599] - 3e-4).abs() < 1e-12);
        // Half of the cosine's way: the mean of both ends.
        assert!((r[6 + 296] - 1.65e-3).abs() < 1e-12);
    }

    #[test]
    fn a_run_without_warm_up_and_one_of_warm_up_alone_are_finite() {
        assert!(rates(&["train.steps=1"]).iter().all(|r| *r > 0.0));
        let all = rates(&["train.warmup_fraction=1", "train.steps=4"]);
        assert_eq!(all, [0.25 * 3e-3, 0.5 * 3e-3, 0.75 * 3e-3, 3e-3]);
        let none = rates(&["train.warmup_fraction=0", "train.steps=2"]);
        assert!(none[0] < 3e-3 && (none[1] - 3e-4).abs() < 1e-12);
    }
}
